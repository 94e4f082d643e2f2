"""Quantized weights as ComfyUI stores them: the formats, what their numbers stand for, and the INT8
linear layer.

INT8 weights stay 8 bits in memory and are multiplied as such by comfy-kitchen; the other formats
are dequantized."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn


class Format(NamedTuple):
    """How one of ComfyUI's formats stores a weight (N, K)."""

    dtype: str  # safetensors' name of what is stored
    granularities: tuple[
        str, ...
    ]  # what shares a scale, the default first; convrot: a row, rotated first
    packed: int = 1  # numbers in each one stored
    scale_dtypes: tuple[str, ...] = (
        "F32",
        "F64",
        "F16",
        "BF16",
    )  # what `weight_scale` may be; the first is written
    # numbers of a row that share a scale, in cuBLAS's order, and multiple that N and K must be
    block: int = 0

    def scale_shapes(self, rows: int, inputs: int) -> tuple[tuple[int, ...], ...]:
        """What `weight_scale` may be."""
        if self.block:
            return ((-(-rows // 128) * 128, -(-inputs // (4 * self.block)) * 4),)
        return ((), (1,), (rows,), (rows, 1))


FORMATS = {
    "int8_tensorwise": Format("I8", ("row", "tensor", "convrot")),
    "float8_e4m3fn": Format("F8_E4M3", ("tensor",)),
    "float8_e5m2": Format("F8_E5M2", ("tensor",)),
    "mxfp8": Format("F8_E4M3", ("block",), scale_dtypes=("U8", "F8_E8M0"), block=32),
    "nvfp4": Format("U8", ("block",), packed=2, scale_dtypes=("F8_E4M3", "U8"), block=16),
    "convrot_w4a4": Format("I8", ("convrot",), packed=2),
}


# What files keep beside a quantized weight: ComfyUI's names, and its older ones of scaled FP8.
BESIDE_WEIGHTS = (
    ".comfy_quant",
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".scale_weight",
    ".scale_input",
)
SCALED_FP8 = "scaled_fp8"  # the older spelling's mark of a file
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

Kept = TypeVar("Kept")


def scale_beside(key: str, kept: Mapping[str, Kept]) -> Kept | None:
    """Return the scale kept for a weight: LAYER.weight_scale, or the older LAYER.scale_weight.

    key: LAYER.weight. kept: tensors, or entries, by key."""
    older = f"{key.removesuffix('weight')}scale_weight"
    return kept.get(f"{key}_scale", kept.get(older))


def dequantize_all(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return floating-point tensors in dtype, FP8 weights times their scales; scales and markers
    are left out. Raises ValueError, naming the tensor, for other quantizations."""
    out = {}
    for key, tensor in tensors.items():
        if key.rpartition(".")[2] == SCALED_FP8 or key.endswith(BESIDE_WEIGHTS):
            continue
        scale = scale_beside(key, tensors)
        if not tensor.is_floating_point() or scale is not None and tensor.dtype not in FP8_DTYPES:
            raise ValueError(f"{key} is {str(tensor.dtype).removeprefix('torch.')}")
        if scale is not None:
            out[key] = dequantize("float8_e4m3fn", tensor, scale, None, 0, dtype)
        else:
            out[key] = tensor.to(dtype)
    return out


class QuantizedLinear(nn.Module):
    """A linear whose weight and scale keep their dtypes: `to(dtype)` casts the bias alone.

    weight: (N, K). weight_scale: (1,) or (N, 1) float32."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        stored = {"weight": self.weight, "weight_scale": self.weight_scale}
        super()._apply(fn, recurse)
        for name, tensor in stored.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self


class Int8Linear(QuantizedLinear):
    """y = x W^T + b, the inputs rounded per row as they come and, with convrot, turned as the
    weights were by a matrix that spreads outliers. weight: int8. convrot_groupsize: 0 for none."""

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, convrot_groupsize: int = 0
    ):
        super().__init__(weight, weight_scale, bias)
        self.convrot_groupsize = convrot_groupsize

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N), in the input's dtype."""
        compiling = torch.compiler.is_compiling()  # as one operator, which is traced in one piece
        linear = torch.ops.comfyui_l2p.int8_linear if compiling else int8_linear
        return linear(x, self.weight, self.weight_scale, self.bias, self.convrot_groupsize)

    def dequantized(self) -> Tensor:
        """The weight as float32: (N, K)."""
        return dequantize(
            "int8_tensorwise",
            self.weight,
            self.weight_scale,
            None,
            self.convrot_groupsize,
            torch.float32,
        )


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, convrot_groupsize: int
) -> Tensor:
    """Return x W^T + b as `Int8Linear` does, by comfy-kitchen's kernel; by torch's on a CPU and on
    accelerators that it has no kernel for."""
    if x.device.type == "cpu" or not kernel_runs(x.device):
        return int8_linear_on_cpu(x, weight, scale, bias, convrot_groupsize)
    return kernel("int8_linear")(
        x,
        weight,
        scale,
        bias,
        out_dtype=x.dtype,
        convrot=convrot_groupsize > 0,
        convrot_groupsize=convrot_groupsize or 256,
    )


@cache
def kernel_runs(device: torch.device) -> bool:
    """Whether comfy-kitchen multiplies INT8 matrices on this device: tried once, on a small one.

    MPS, XPU and old cards may have no such product."""
    x = torch.zeros(64, 64, dtype=torch.float16, device=device)
    weight, scale = x.to(torch.int8), torch.ones(1, device=device)
    try:
        kernel("int8_linear")(x, weight, scale, None, out_dtype=x.dtype)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def int8_linear_on_cpu(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, convrot_groupsize: int
) -> Tensor:
    """Return what comfy-kitchen's `int8_linear` does, which copies the transposed weight at each
    call, by products that every device has."""
    return multiply_rows(quantize_rows(x, convrot_groupsize), x, weight, scale, bias)


class Rows(NamedTuple):
    """Rows rounded to whole numbers, (n, K), int8 or float32, and the scale of each, (n, 1)."""

    numbers: Tensor
    scale: Tensor


def quantize_rows(x: Tensor, convrot_groupsize: int) -> Rows:
    """Round (..., K) to INT8, with a scale for each row, as int8 where torch multiplies that."""
    if convrot_groupsize:
        hadamard_matrix = hadamard(convrot_groupsize).to(x)
        x = (x.unflatten(-1, (-1, convrot_groupsize)) @ hadamard_matrix).flatten(-2)
    rows = x.flatten(0, -2)
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / 127).clamp(min=1e-30)
    numbers = (rows / scale.to(x.dtype)).round_().clamp_(-128, 127)
    if x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        return Rows(numbers.to(torch.int8), scale)
    # torch has no 8-bit kernel: its loop takes 10 times as long as a float32 product
    return Rows(numbers.float(), scale)


def multiply_rows(
    rows: Rows, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Return x W^T + b of the rows of x."""
    if rows.numbers.dtype == torch.int8:
        product = torch._int_mm(rows.numbers, weight.t()).float()
    else:
        product = rows.numbers @ weight.t().float()
    out = product.mul_(rows.scale * scale.reshape(1, -1)).to(x.dtype)
    if bias is not None:
        out += bias.to(out)
    return out.unflatten(0, x.shape[:-1])


def apply_linears(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Apply several layers to the same input. INT8 ones on a CPU quantize it once for all."""
    first = layers[0]
    shared = isinstance(first, Int8Linear) and all(
        isinstance(layer, Int8Linear) and layer.convrot_groupsize == first.convrot_groupsize
        for layer in layers
    )
    if not shared or x.device.type != "cpu" or torch.compiler.is_compiling():
        return [layer(x) for layer in layers]
    rows = quantize_rows(x, first.convrot_groupsize)
    return [
        multiply_rows(rows, x, layer.weight, layer.weight_scale, layer.bias) for layer in layers
    ]


@torch.library.custom_op(
    "comfyui_l2p::int8_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int convrot_groupsize) -> Tensor",
)
def _int8_linear_operator(x, weight, scale, bias, convrot_groupsize):
    return int8_linear(x, weight, scale, bias, convrot_groupsize)


@_int8_linear_operator.register_fake
def _(x, weight, scale, bias, convrot_groupsize):
    return x.new_empty(*x.shape[:-1], len(weight))


def dequantize(
    kind: str,
    weight: Tensor,
    scale: Tensor,
    scale_2: Tensor | None,
    convrot_groupsize: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weights (N, K) that a tensor stored in that format stands for. scale, scale_2: as they
    are stored."""
    if kind == "mxfp8":
        if not hasattr(torch, "float8_e8m0fnu"):
            raise ImportError(f"mxfp8 needs torch 2.7 or newer, and this is {torch.__version__}")
        return kernel("dequantize_mxfp8")(weight, scale.view(torch.float8_e8m0fnu), dtype)
    if kind == "nvfp4":
        return kernel("dequantize_nvfp4")(weight, scale_2, scale.view(torch.float8_e4m3fn), dtype)
    scale = scale.float().flatten()
    if kind == "convrot_w4a4":
        return kernel("dequantize_convrot_w4a4_weight")(
            weight, scale, convrot_groupsize, output_dtype=dtype
        )
    weight = weight.float() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return (rotate(weight, convrot_groupsize) if convrot_groupsize else weight).to(dtype)


def rotate(rows: Tensor, groupsize: int) -> Tensor:
    """Rows (N, K) as convrot turns them before rounding: each group of a row times the Hadamard
    matrix, its own inverse."""
    return (rows.unflatten(1, (-1, groupsize)) @ hadamard(groupsize).to(rows.device)).flatten(1)


@cache
def hadamard(size: int) -> Tensor:
    """Kronecker powers of the 4 x 4 regular Hadamard matrix, scaled to be orthogonal (ConvRot,
    arXiv 2512.03673). size: a power of 4."""
    four = 1 - 2 * torch.eye(4, device="cpu").flip(1)  # kept, so never on shapes alone
    return four / 2 if size == 4 else torch.kron(hadamard(size // 4), four) / 2


def kernel(name: str) -> Callable:
    """comfy-kitchen's function of that name. Raises ImportError, with the command that installs it,
    without one."""
    try:
        import comfy_kitchen
    except ImportError:
        raise ImportError(
            "quantized checkpoints run on comfy-kitchen, which is not installed: "
            "pip install comfy-kitchen"
        ) from None
    if not hasattr(comfy_kitchen, name):
        raise ImportError(
            f"the installed comfy-kitchen is too old for this checkpoint: it lacks {name}. Update"
            " it, in ComfyUI by updating ComfyUI, or use the BF16 version of the model"
        )
    return getattr(comfy_kitchen, name)


def split_block_scales(scales: Tensor, rows: int, parts: int) -> list[Tensor]:
    """Split the block scales of a weight of `rows` rows into those of `parts` weights, one below
    another.

    scales: 8-bit numbers in cuBLAS's order, tiles of 128 x 4 that interleave their rows, (rows
    padded to 128, columns padded to 4). Source of the order: NVIDIA cuBLAS documentation, "1D Block
    Scaling Factors Layout"."""
    columns = scales.shape[1]
    tiles = scales.view(torch.uint8).reshape(-1, columns // 4, 32, 4, 4)
    by_rows = tiles.permute(0, 3, 2, 1, 4).reshape(-1, columns)[:rows]
    out = []
    for part in by_rows.chunk(parts):
        part = nn.functional.pad(part, (0, 0, 0, -len(part) % 128))
        tiles = part.reshape(-1, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
        out.append(tiles.reshape(-1, columns).view(scales.dtype))
    return out
