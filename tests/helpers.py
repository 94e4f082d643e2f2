"""Stand-ins and measures that the tests share: checkpoints written by hand in every naming, apart
from the code under test."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

GOLDEN = Path(__file__).parent / "golden"


def comfyui_naming(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under ComfyUI's names, q, k and v packed. Written out by hand, apart from
    the code under test."""
    out = {}
    for name, tensor in weights.items():
        if ".attention.to_q." in name:
            parts = [weights[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            out[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        elif name.startswith("all_x_embedder."):
            out["x_embedder." + name.rpartition(".")[2]] = tensor
        else:
            out[
                name.replace("attention.to_out.0", "attention.out")
                .replace("attention.norm_q", "attention.q_norm")
                .replace("attention.norm_k", "attention.k_norm")
            ] = tensor
    return out


def int8(
    weights: dict[str, torch.Tensor],
    prefix: str = "",
    granularity: str = "row",
    marked: str | None = None,
    convrot: int = 0,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata): block linears as int8 with `weight_scale`. granularity: tensor, flat
    (N,) or row (N, 1). marked: None, "tensors" (comfy_quant) or "metadata"."""
    hadamard = regular_hadamard(convrot) if convrot else None
    marker = {
        "format": "int8_tensorwise",
        **({"convrot": True, "convrot_groupsize": convrot} if convrot else {}),
    }
    out, layers = {}, {}
    for name, weight in weights.items():
        if weight.dim() != 2 or not name.startswith(
            ("layers.", "noise_refiner.", "context_refiner.")
        ):
            out[prefix + name] = weight
            continue
        if convrot:
            weight = (weight.unflatten(1, (-1, convrot)) @ hadamard.T).flatten(1)
        scale = (
            weight.abs().amax() if granularity == "tensor" else weight.abs().amax(1, keepdim=True)
        ) / 127
        out[prefix + name] = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        out[f"{prefix}{name}_scale"] = scale[:, 0].clone() if granularity == "flat" else scale
        layers[prefix + name.removesuffix(".weight")] = marker
    if marked == "tensors":
        for layer in layers:
            out[f"{layer}.comfy_quant"] = torch.tensor(
                list(json.dumps(marker).encode()), dtype=torch.uint8
            )
    metadata = (
        {"_quantization_metadata": json.dumps({"layers": layers})} if marked == "metadata" else {}
    )
    return out, metadata


def scaled_fp8(
    weights: dict[str, torch.Tensor], wanted: Callable[[str, torch.Tensor], bool], spelling: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(FP8 tensors with a scale each, the numbers they stand for). spelling: weight_scale, or the
    older scale_weight with its mark of the file and its scales of inputs."""
    scaled, plain = dict(weights), dict(weights)
    for key, tensor in weights.items():
        if not wanted(key, tensor):
            continue
        layer = key.removesuffix(".weight")
        scale = tensor.float().abs().max() / 448
        scaled[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        scaled[f"{layer}.{spelling}"] = scale
        plain[key] = (scaled[key].float() * scale).bfloat16()
        if spelling == "scale_weight":
            scaled[f"{layer}.scale_input"] = torch.tensor(1.0)
    if spelling == "scale_weight":
        scaled["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return scaled, plain


def regular_hadamard(size: int) -> torch.Tensor:
    """Kronecker powers of the symmetric 4 x 4 Hadamard matrix with a constant row sum, scaled to be
    orthogonal."""
    four = 1 - 2 * torch.eye(4).flip(1)
    out = torch.ones(1, 1)
    while len(out) < size:
        out = torch.kron(out, four)
    return out / size**0.5


def apart(one: Image.Image | np.ndarray, other: Image.Image | np.ndarray) -> int:
    """The largest difference of two images, in levels. The same program run twice may differ by
    one: where a tensor happens to lie in memory decides in which order some kernels add."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())


def rms(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of a difference, relative to the reference's."""
    return float(difference.float().norm() / reference.float().norm())
