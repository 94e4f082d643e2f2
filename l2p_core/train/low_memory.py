"""What lets a large model train on a small card: frozen linears in 8 or 4 bits, and stochastic
rounding."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .transfer import is_gpu, to_host

NF4_BLOCK = 64  # weights that share a scale


def bitsandbytes() -> ModuleType:
    """The bitsandbytes module. Raises ImportError with the command that installs it."""
    try:
        import bitsandbytes
    except ImportError:
        raise ImportError(
            "8-bit AdamW and NF4 need bitsandbytes: pip install 'comfyui-l2p[low-memory]'"
        ) from None
    return bitsandbytes


class FrozenLinear(nn.Linear):
    """A linear without bias that is not trained: its weight lies in INT8 with a scale for each row,
    or in NF4 with one for every 64 numbers (QLoRA, arXiv 2305.14314), and is unpacked for as long
    as it is multiplied with, on the way back once more. It may wait in the CPU's memory."""

    def __init__(self, linear: nn.Linear, kind: str, swapped: bool = False):
        """kind: int8, nf4, or "" for the weight as it is. swapped: keep the weight in the CPU's
        memory, and bring it to the device for each product."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            None,
        )
        self.kind, self.swapped, weight = kind, swapped, linear.weight.detach()
        packed, scale = weight, None
        if kind == "nf4":
            bitsandbytes()
            packed, scale = torch.ops.bitsandbytes.quantize_4bit(
                weight.contiguous(), NF4_BLOCK, kind, torch.uint8
            )
        elif kind == "int8":
            scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            packed = (weight / scale).round().to(torch.int8)
        if swapped and is_gpu(packed.device):
            packed = to_host(packed)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)

    def _apply(self, function: Callable, recurse: bool = True) -> "FrozenLinear":
        """Move the module; a swapped weight stays."""
        if not self.swapped:
            return super()._apply(function, recurse)
        weight = self._parameters.pop("weight")
        try:
            return super()._apply(function, recurse)
        finally:
            self._parameters["weight"] = weight

    def unpacked(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """(out_features, in_features). device: where to, by default where the weight is."""
        weight = self.weight.to(device, non_blocking=True) if self.swapped else self.weight
        if self.kind == "nf4":
            shape = [self.out_features, self.in_features]
            return torch.ops.bitsandbytes.dequantize_4bit(
                weight, self.scale, NF4_BLOCK, self.kind, shape, dtype
            )
        if self.kind == "":
            return weight.to(dtype)
        # Multiplied in float32, rounded once: a scale in bfloat16 would stretch its whole row.
        result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        return torch.mul(weight, self.scale, out=result)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N)."""
        return _Multiply.apply(x, self.unpacked)


class _Multiply(torch.autograd.Function):
    """x W^T, keeping neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpacked: Callable[..., Tensor]) -> Tensor:
        """(..., K) → (..., N)."""
        ctx.unpacked = unpacked
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return x.to(dtype) @ unpacked(dtype, x.device).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.unpacked(gradient.dtype, gradient.device), None


def quantize_frozen(
    module: nn.Module, kind: str, device: torch.device | None = None, swapped: bool = False
) -> None:
    """Put a `FrozenLinear` in the place of each linear in a frozen module that has no bias, made on
    `device` where one is given."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and child.bias is None:
            there = child.to(device) if device else child
            setattr(module, name, FrozenLinear(there, kind, swapped))
        else:
            quantize_frozen(child, kind, device, swapped)


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 → bfloat16, up or down at random, the nearer the likelier: the mean stays, so that
    steps far smaller than a bfloat16 can tell apart add up (arXiv 2010.06192)."""
    bits = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits += x.contiguous().view(torch.int32)
    bits &= -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)
