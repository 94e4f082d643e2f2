"""How many bytes of tensors are alive at the peak of a computation: of a real one, or of one on
tensors that have only a shape.

torch's FakeTensorMode carries shapes, dtypes and devices through the very code that generates and
trains. What lies outside of tensors is not counted: the program itself, a GPU's context, a kernel's
workspace."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .devices import memory_counter
from .files.quantization import hadamard
from .model import rope_of_image, rope_of_prompt


class Meter(TorchDispatchMode):
    """Notes when a storage that an operation made comes to life and when it is gone. What was there
    before is not counted.

    elsewhere: a device that is not counted."""

    def __init__(self, elsewhere: str = ""):
        super().__init__()
        self.elsewhere = elsewhere
        self.events: list[tuple[int, int]] = []  # (number of the storage, bytes more or less)
        self.alive: dict[int, int] = {}  # a storage's address → its number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            tensor.untyped_storage()._cdata
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != self.elsewhere:
                storage = tensor.untyped_storage()
                if (
                    storage._cdata not in given and storage._cdata not in self.alive
                ):  # views make none
                    self.add(storage)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        """Note that a storage came to life."""
        number, size = len(self.events), storage.nbytes()
        self.alive[storage._cdata] = number
        self.events.append((number, size))
        weakref.finalize(storage, self.remove, storage._cdata, number, size)

    def remove(self, address: int, number: int, size: int) -> None:
        """Note that a storage is gone."""
        del self.alive[address]
        self.events.append((number, -size))

    def now(self) -> int:
        """Bytes that are alive."""
        return sum(size for _, size in self.events)

    def peak(self, since: int = 0, without: Tensor | None = None) -> int:
        """The most bytes there were after so many events, one tensor left out."""
        out = self.alive.get(without.untyped_storage()._cdata) if without is not None else None
        return max(
            list(accumulate(0 if number == out else size for number, size in self.events))[since:],
            default=0,
        )


def peak_bytes(run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """What `run` holds at its peak, without gradients, beside what it was given and what it
    returns; and that."""
    with torch.no_grad(), Meter() as meter:
        output = run()
    return meter.peak(without=output), output


def peak_on(device: torch.device, run: Callable[[], object]) -> int:
    """Return the bytes that a device holds at the peak of `run`, beside those before.

    The device's own counter says so where it has one (`memory_counter`); elsewhere the tensors
    that are alive are counted."""
    counter = memory_counter(device)
    if counter is None:
        with Meter() as meter:
            run()
        return meter.peak()
    counter.reset_peak_memory_stats(device)
    before = counter.memory_allocated(device)
    run()
    return counter.max_memory_allocated(device) - before


@contextmanager
def shapes_only(*models: nn.Module):
    """Within it tensors have only a shape, the models' too, which may come from the meta device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # They keep what they made, and here that has no numbers.
    tables = (rope_of_image, rope_of_prompt, hadamard)
    for table in tables:
        table.cache_clear()
    try:
        # Classes of diffusers keep tables with numbers outside of their buffers.
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in (module for model in models for module in model.modules()):
                for name, weight in list(module.named_parameters(recurse=False)):
                    setattr(
                        module,
                        name,
                        nn.Parameter(
                            torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad
                        ),
                    )
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
            yield
    finally:
        for table in tables:
            table.cache_clear()


def bytes_of(values: Iterable[object]) -> int:
    """Of those that are tensors."""
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def table(parts: dict[str, int]) -> str:
    """Bytes as lines of GB."""
    return "\n".join(f"{name:<28}{size / 1e9:8.2f} GB" for name, size in parts.items())
