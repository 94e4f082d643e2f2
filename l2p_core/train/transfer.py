"""Copies between a GPU and the CPU's memory. They are queued and not waited for, which takes pinned
memory on the CPU's side."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def pinned_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return empty pinned memory for such a tensor. torch keeps it for reuse until queued copies
    are done."""
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, pin_memory=True)


def is_gpu(device: torch.device) -> bool:
    """Whether copies to and from the device can be queued."""
    return device.type == "cuda"


def to_host(tensor: Tensor, host: torch.device | str = "cpu") -> Tensor:
    """Queue a copy to the CPU's memory. It is there once an event that follows is over.

    host: another place, such as meta, where nothing is a GPU's."""
    if not is_gpu(tensor.device):
        return tensor.to(host)
    copy = pinned_like(tensor)
    copy.copy_(tensor, non_blocking=True)
    return copy


def to_device(tensor: Tensor, target: Tensor) -> None:
    """Queue a copy from the CPU's memory into a tensor of any dtype."""
    if is_gpu(target.device):
        pinned = tensor.is_pinned() and tensor.dtype == target.dtype
        source = tensor if pinned else pinned_like(tensor, target.dtype).copy_(tensor)
        target.copy_(source, non_blocking=True)
    else:
        target.copy_(tensor)


def arrived(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for the copies queued so far, and for no more."""
    if not is_gpu(device):
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def saved_on_host() -> AbstractContextManager:
    """Within it, tensors saved for the backward pass wait in the CPU's memory. torch's own
    `save_on_cpu` waits for each of them."""

    def back(saved: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = saved
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(lambda tensor: (tensor.device, to_host(tensor)), back)
