"""FP8 weights that stay FP8 and are multiplied as such, where the device can."""

from functools import cache

import torch
from torch import Tensor

from .quantization import QuantizedLinear

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
MULTIPLE = 16  # of inputs and outputs, which FP8 products need


class Fp8Linear(QuantizedLinear):
    """y = x W^T + b, the inputs rounded to FP8 as they come, with a scale for each row. weight:
    float8_e4m3fn."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N), in the input's dtype."""
        rows = x.flatten(0, -2)
        row_scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-4) / LARGEST
        numbers = (rows / row_scale).clamp(-LARGEST, LARGEST).to(FP8)
        scale = self.weight_scale.reshape(1, -1).expand(1, len(self.weight)).contiguous()
        scales = row_scale.float(), scale
        # products with a scale for each row come in bfloat16 alone
        out = torch._scaled_mm(numbers, self.weight.t(), *scales, out_dtype=torch.bfloat16)
        out = out.to(x.dtype)
        if self.bias is not None:
            out = out + self.bias.to(out)
        return out.unflatten(0, x.shape[:-1])


@cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device multiplies FP8 matrices with a scale for each row: tried once, on a small
    one. Of NVIDIA's cards, those of compute capability 8.9 and higher do.

    Never on a CPU, where it is slower than a product of dequantized weights."""
    if device.type == "cpu":
        return False
    x = torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
    try:
        Fp8Linear(x.to(FP8), torch.ones(1, device=device), None)(x)
    except (RuntimeError, AttributeError):  # NotImplementedError is the first
        return False
    return True
