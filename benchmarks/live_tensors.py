"""How many bytes of tensors are alive at the peak of a computation, on any device, the meta device included."""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Notes, after each operation, which of the tensors made inside are alive, on any device."""

    def __init__(self):
        super().__init__()
        self.moments: list[dict[StorageWeakRef, int]] = [{}]  # bytes of each storage

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        made = [tensor.untyped_storage() for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.moments.append({storage: size for storage, size in self.moments[-1].items() if not storage.expired()} | {
            StorageWeakRef(storage): storage.nbytes() for storage in made if storage._cdata not in given})  # views make none
        return result


def peak_bytes(decode: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """What `decode` holds at its peak beside what it was given and what it returns; and that."""
    with torch.no_grad(), LiveTensors() as live:
        output = decode()
    returned = StorageWeakRef(output.untyped_storage())
    return max(sum(size for storage, size in moment.items() if storage != returned) for moment in live.moments), output
