"""The INT8 linear layer: 8-bit weights in memory, 8-bit products on the device, through comfy-kitchen.

The weights are rounded once, per tensor or per row; the inputs per row, as they come. With convrot, both are first
turned by the same orthogonal matrix in groups of columns, which spreads outliers (comfy-kitchen rotates the inputs).
"""
from typing import Callable

import torch
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """y = x W^T + b. weight: (N, K) int8. weight_scale: (1,) or (N, 1) float32. convrot_groupsize: 0 for none."""

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, convrot_groupsize: int = 0):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self.convrot_groupsize = convrot_groupsize

    def forward(self, x: Tensor) -> Tensor:
        return comfy_kitchen().int8_linear(
            x, self.weight, self.weight_scale, self.bias, out_dtype=x.dtype,
            convrot=self.convrot_groupsize > 0, convrot_groupsize=self.convrot_groupsize or 256)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        scale = self.weight_scale
        super()._apply(fn, recurse)
        self.weight_scale = scale.to(self.weight.device)  # .to(dtype) would round it
        return self


def dequantize(weight: Tensor, weight_scale: Tensor, convrot_groupsize: int, dtype: torch.dtype) -> Tensor:
    """The weights (N, K) that an INT8 or FP8 tensor and its scale (1,) or (N, 1) stand for."""
    if not convrot_groupsize:
        return (weight.float() * weight_scale.reshape(-1, *[1] * (weight.dim() - 1))).to(dtype)
    code = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]
    comfy_kitchen()
    return torch.ops.comfy_kitchen.dequantize_int8_convrot_weight_dtype(weight, weight_scale, convrot_groupsize, code)


def comfy_kitchen():
    """The comfy_kitchen module. Raises ImportError with the command that installs it."""
    try:
        import comfy_kitchen
    except ImportError:
        raise ImportError("INT8 checkpoints run on comfy-kitchen, which is not installed: "
                          "pip install comfy-kitchen") from None
    return comfy_kitchen
