"""Adapters added to the weights they change, for `l2p merge`: LoRA, LoHa, LoKr and differences.

LoRA (arXiv 2106.09685) adds strength * alpha / rank * B A, LoHa and LoKr (LyCORIS, arXiv
2309.14859) the Hadamard and the Kronecker product of two such products.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..l2p_core.files.header import CheckpointError
from ..l2p_core.files.layout import FLOATS, Layout
from ..l2p_core.files.naming import lora_targets, name_in, split_packed_lora
from .stream import TORCH_DTYPES, Piece, read_floats

# How files call the two factors of a LoRA, behind the layer's name.
FACTOR = re.compile(
    r"(.+?)[._](?:lora_(?:(A|down)|(?:B|up))(?:\.default)?(?:\.weight)?"
    r"|lora(?:_linear_layer)?\.(?:(down)|up)\.weight)"
)
PARTS = re.compile(r"(.+)\.(alpha|diff|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)")


class Change(NamedTuple):
    """What an adapter holds for one weight."""

    parts: Mapping[str, Tensor]  # down and up; or hada_w1_a ...; or lokr_w1 ...; or diff
    alpha: float | None  # None for the rank, a factor of 1

    def rows(self, strength: float) -> Tensor:
        """What is added: (N, K), float32, where K is what one row of the weight holds.

        Raises RuntimeError, KeyError or IndexError where the parts do not fit one another."""
        parts = {name: tensor.float() for name, tensor in self.parts.items()}
        if "diff" in parts:
            return strength * parts["diff"].flatten(1)
        if "up" in parts or "down" in parts:
            down = parts["down"].flatten(1)
            return self._scale(strength, len(down)) * parts["up"].flatten(1) @ down
        if "hada_w1_a" in parts:
            first, second = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
            return self._scale(strength, len(parts["hada_w1_b"])) * first * second
        factors, rank = [], None
        for name in ("lokr_w1", "lokr_w2"):
            if name not in parts:
                rank = len(parts[f"{name}_b"])
                parts[name] = parts[f"{name}_a"] @ parts[f"{name}_b"]
            factors.append(parts[name])
        return (self._scale(strength, rank) if rank else strength) * torch.kron(*factors)

    def _scale(self, strength: float, rank: int) -> float:
        return strength if self.alpha is None else strength * self.alpha / rank


class Recorded(NamedTuple):
    """The alpha of all layers, and those of layers by pattern, as peft records them."""

    alpha: float | None
    patterns: Mapping[str, float]

    def of(self, weight: str) -> float | None:
        """The alpha of a weight; None where none is recorded."""
        layer = weight.removesuffix(".weight")
        for pattern, alpha in self.patterns.items():
            if f".{layer}".endswith(f".{pattern}"):
                return float(alpha)
        return self.alpha


def changes(lora: Layout, base: Layout) -> dict[str, Change]:
    """Return what the adapter adds to which weight of the base, by published name.

    Raises CheckpointError where something has no place."""
    weights = lora_targets(base.tensors)
    tensors: dict[str, Tensor] = {}
    for file in lora.files:
        tensors |= load_file(file)
    recorded = recorded_alphas(lora)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in split_packed_lora(tensors).items():
        if factor := FACTOR.fullmatch(key):
            layer, part = factor[1], "down" if factor[2] or factor[3] else "up"
        elif other := PARTS.fullmatch(key):
            layer, part = other[1], other[2]
        else:
            layer, part = key, ""
        if layer not in weights or not part:
            raise CheckpointError(
                f"{lora.path.name}: {key} belongs to nothing in {base.path.name}. Merging takes"
                " LoRA, LoHa, LoKr and differences of L2P's layers; other kinds load in ComfyUI"
            )
        its = parts.setdefault(weights[layer], {})
        if part in its:
            raise CheckpointError(
                f"{lora.path.name} has {weights[layer]} under two names, of which one is {key}"
            )
        its[part] = tensor
    return {
        weight: checked_change(lora, base, weight, its, recorded) for weight, its in parts.items()
    }


def checked_change(
    lora: Layout,
    base: Layout,
    weight: str,
    parts: dict[str, Tensor],
    recorded: Recorded,
) -> Change:
    """Return the change of one weight. Raises CheckpointError where it does not fit the weight."""
    source = base.tensors[weight]
    if source.entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{base.path.name}: {weight} is {source.entry.dtype}. Merge the LoRA into the BF16 or"
            " FP32 model, and quantize that: l2p quantize"
        )
    alpha = parts.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise CheckpointError(
            f"{lora.path.name}: the alpha for {weight} is {tuple(alpha.shape)}; expected one number"
        )
    change = Change(parts, recorded.of(weight) if alpha is None else float(alpha))
    wanted = source.shape[0], math.prod(source.shape[1:])
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    try:
        on_meta = Change({name: tensor.to("meta") for name, tensor in parts.items()}, change.alpha)
        found = tuple(on_meta.rows(1.0).shape)
    except KeyError as missing:
        raise CheckpointError(
            f"{lora.path.name} has {', '.join(shapes) or 'an alpha alone'} for {weight}, but no"
            f" {missing.args[0]}. The file is damaged"
        ) from None
    except (RuntimeError, IndexError):
        found = None
    if found != wanted:
        raise CheckpointError(
            f"{lora.path.name}: what it has for {weight} is {shapes}, which makes no"
            f" {source.shape}. Give the model it was trained on"
        )
    return change


def recorded_alphas(lora: Layout) -> Recorded:
    """Return the alphas of a file that has no tensors for them.

    From the metadata that diffusers writes, or the adapter_config.json that peft writes beside."""
    try:
        facts = json.loads(lora.metadata.get("lora_adapter_metadata", "{}"))
        facts = {key.removeprefix("transformer."): value for key, value in facts.items()}
        config = Path(lora.files[0]).with_name("adapter_config.json")
        if not facts and config.is_file():
            facts = json.loads(config.read_text(encoding="utf-8"))
        alpha, rank = facts.get("lora_alpha"), facts.get("r")
        if facts.get("use_rslora") and alpha is not None:
            alpha = alpha * math.sqrt(rank)  # its factor is alpha / sqrt(rank)
        return Recorded(None if alpha is None else float(alpha), facts.get("alpha_pattern") or {})
    except (OSError, ValueError, TypeError, AttributeError):
        raise CheckpointError(
            f"{lora.path.name}: its alpha can't be read from its metadata or from"
            " adapter_config.json, which is no JSON of peft. Correct or remove it"
        ) from None


def with_changes(
    pieces: list[Piece], found: dict[str, Change], naming: str, prefix: str, strength: float
) -> list[Piece]:
    """Return the plan of the base, with what is added to each weight.

    Where q, k and v are packed, it is added to their rows."""
    by_piece: dict[str, list[tuple[int, Change]]] = {}
    for weight, change in found.items():
        name, place = name_in(naming, weight)
        by_piece.setdefault(prefix + name, []).append((place, change))
    return [
        added(piece, by_piece[piece.name], strength) if piece.name in by_piece else piece
        for piece in pieces
    ]


def added(piece: Piece, its: list[tuple[int, Change]], strength: float) -> Piece:
    """Return the piece with its changes, each with its place among the packed weights."""

    def made() -> Iterator[Tensor]:
        change = torch.zeros(piece.shape[0], math.prod(piece.shape[1:]))
        for place, each in its:
            rows = each.rows(strength)
            change[place * len(rows) :][: len(rows)] += rows
        row = 0
        for source in piece.sources:
            for block in read_floats(source, torch.float32):
                block = block + change[row : row + len(block)].view_as(block)
                block = block.to(TORCH_DTYPES[piece.dtype])
                row += len(block)
                if not block.isfinite().all():
                    raise CheckpointError(
                        f"{piece.name} with the LoRA holds NaN or infinite numbers as"
                        f" {piece.dtype}. A file is damaged, or strength is too high; bf16 has the"
                        " range of fp32"
                    )
                yield block

    return piece._replace(origin=made, read=piece.sources)
