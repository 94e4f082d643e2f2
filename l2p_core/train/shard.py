"""A model in training, split over processes by torch's FSDP2, and put together again for its
files."""

from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from ..model import L2PTransformer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def shard(
    model: L2PTransformer,
    device: torch.device,
    weights: bool,
    dtype: torch.dtype | None = None,
) -> None:
    """Leave each process a part of every parameter, of its gradient and of what the optimizer keeps
    for it.

    weights: split them from pass to pass too, not only from step to step: less memory, more
    traffic. dtype: weights are gathered in it, which autocast would cast them to anyway; gradients
    are summed in float32. What is already an optimizer's stays whole, so it is made afterwards, and
    so are lists of parameters."""
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError:
        raise ImportError("shard needs torch 2.6 or newer") from None
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, None, False)
    for part in (
        *model.blocks,
        model.local_decoder,
        model,
    ):
        fully_shard(part, mesh=mesh, reshard_after_forward=weights, mp_policy=precision)


def reshard(model: torch.nn.Module) -> None:
    """Let go of the whole weights that a pass without a backward one has left; nothing where the
    model is not split."""
    for part in model.modules():
        if hasattr(part, "reshard"):
            part.reshard()


def is_split(value: object) -> TypeGuard["DTensor"]:
    """Whether a tensor is split over processes."""
    return hasattr(value, "full_tensor")


def gather(tree: T, keep: bool) -> T:
    """The same dictionaries and lists with every split tensor whole, in the CPU's memory: for the
    process that keeps it, and nothing for the others, which must all take part."""

    def whole(value: object) -> object:
        if not is_split(value):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if keep else None

    return tree_map(whole, tree)


def as_split_as(like: Tensor, value: object) -> object:
    """A whole tensor in the way that another of its shape is split; anything else as it is."""
    if not is_split(like) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
