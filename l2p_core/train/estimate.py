"""What a training step will hold in memory, without a byte of weights: the step runs on tensors that have only a shape.

torch's FakeTensorMode carries shapes, dtypes and devices through the very code that trains, and a meter counts the storages
that are alive. What lies outside of tensors is not counted: the program itself, a GPU's context, a kernel's workspace.
"""
import weakref
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..checkpoint import check
from ..layout import read_layout
from ..model import L2PTransformer, rope_of_caption, rope_of_image
from .config import TrainConfig
from .loss import flow_matching_loss
from .trainer import compute_dtype, make_optimizer, prepare

CAPTION_TOKENS = 512  # the longest a caption can be
HOST = "meta"  # stands for the memory beside the device's, which is not counted


class Meter(TorchDispatchMode):
    """Counts the bytes of the storages that operations made and that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != HOST:
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def estimate(config: TrainConfig) -> dict[str, int]:
    """Bytes that one process holds at the peak of a step, by what they are for, and their sum as "in all"; then what it keeps
    in the CPU's memory, where a GPU's is meant by the rest.

    Reads the checkpoint's header alone, and neither the data nor the text encoder: pictures are of `height` x `width`, or of the
    checkpoint's trained size; captions of 512 tokens. Raises CheckpointError."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    layout = read_layout(Path(config.checkpoint))
    check(layout)
    height, width = (config.height, config.width) if config.height else layout.trained_size
    dtype = compute_dtype(config)
    with torch.device("meta"):
        model = L2PTransformer(layout.config).to(dtype)
    prepare(model, config)
    with FakeTensorMode(), Meter() as meter, ExitStack() as afterwards:
        for table_of in (rope_of_image, rope_of_caption):  # they keep what they made, and here that has no numbers
            table_of.cache_clear()
            afterwards.callback(table_of.cache_clear)
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), weight.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = make_optimizer(trained, replace(config, optimizer="adamw"), HOST)  # bitsandbytes' looks at numbers
        picture = torch.empty(config.batch, 3, height, width)
        captions = [torch.empty(CAPTION_TOKENS, layout.config.cap_feat_dim, dtype=dtype) for _ in range(config.batch)]

        def step() -> int:
            """Returns what all gradients together take."""
            kept = saved_tensors_hooks(lambda tensor: tensor.to(HOST), lambda kept: kept.to("cpu")) if config.offload_activations else nullcontext()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), kept:
                loss = flow_matching_loss(model, picture, captions, torch.empty_like(picture), torch.empty(config.batch))
            loss.backward()
            gradients = bytes_of(parameter.grad for parameter in trained.values())
            optimizer.step()
            optimizer.zero_grad()
            return gradients

        step()  # makes the optimizer's state
        lasting, meter.peak = meter.alive, 0
        gradients = step()
        state = bytes_of(tree_leaves(optimizer.state_dict()))
    if config.optimizer == "adamw8bit":
        state = sum(state_in_8_bits(parameter.numel()) for parameter in trained.values())
    learned = bytes_of(trained.values())
    parts = {"weights that are trained": learned, "frozen weights": bytes_of(model.state_dict().values()) - learned,
             "gradients": gradients, "optimizer state": 0 if config.offload_state else state,
             "activations and what passes": meter.peak - lasting - gradients}
    beside = {"in the CPU's memory": state} if config.offload_state else {}
    return {**parts, "in all": sum(parts.values()), **beside}


def state_in_8_bits(count: int) -> int:
    """Bytes of bitsandbytes' AdamW for a tensor of so many numbers: two means of each, with a float32 scale for every 256 of them
    and two tables of 256 levels; a tensor below 4096 keeps float32."""
    return 8 * count if count < 4096 else 2 * count + 2 * 4 * -(-count // 256) + 2 * 4 * 256


def bytes_of(values: Iterable[object]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def table(parts: dict[str, int]) -> str:
    return "\n".join(f"{name:<28}{size / 1e9:8.2f} GB" for name, size in parts.items())
