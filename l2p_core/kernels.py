"""comfy-kitchen's fused kernels, where it is installed and has them for the device."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def fused_rotation(x: Tensor) -> Callable | None:
    """Return the kernel that normalizes and rotates queries and keys such as x, or None where
    there is none. It has no gradient, and computes in 16 bits."""
    supported = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    if not supported or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    return kernel_of_device("rms_rope")


@cache
def kernel_of_device(name: str) -> Callable | None:
    """Return comfy-kitchen's function, or None where only its slower form in torch would run."""
    try:
        import comfy_kitchen
    except ImportError:
        return None
    for backend, found in comfy_kitchen.list_backends().items():
        usable = found["available"] and not found["disabled"]
        if backend != "eager" and usable and name in found["capabilities"]:
            return getattr(comfy_kitchen, name)
    return None
