"""A LoRA added to the weights it changes: W + strength * alpha / rank * B A (arXiv 2106.09685), for
`l2p merge`."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..l2p_core.files.header import CheckpointError
from ..l2p_core.files.layout import FLOATS, Layout, Source
from ..l2p_core.files.naming import lora_names, name_in
from .stream import TORCH_DTYPES, Piece, read_floats

FACTOR = re.compile(r"(.+)\.(?:(lora_A|lora_down)|(lora_B|lora_up))(?:\.default)?\.weight")


class Change(NamedTuple):
    """What is added to one weight of N rows."""

    down: Source  # A, (rank, ...)
    up: Source  # B, (N, rank, ...)
    alpha: Source | None  # a number; None for the rank

    def rows(self, strength: float) -> Tensor:
        """(N, K), float32, where K is what one row of the weight holds."""
        down, up = (
            torch.cat(list(read_floats(factor, torch.float32))).flatten(1)
            for factor in (self.down, self.up)
        )
        alpha = (
            len(down) if self.alpha is None else next(read_floats(self.alpha, torch.float32)).item()
        )
        return up * (strength * alpha / len(down)) @ down


def changes(lora: Layout, base: Layout) -> dict[str, Change]:
    """What the LoRA adds to which weight of the base, by published name. Raises CheckpointError
    where something has no place."""
    weights = {
        name: weight
        for weight in base.tensors
        if weight.endswith(".weight")
        for name in lora_names(weight.removesuffix(".weight"))
    }
    parts: dict[str, dict[str, Source]] = {}
    for key, entry in lora.entries.items():
        if factor := FACTOR.fullmatch(key):
            layer, part = factor[1], "down" if factor[2] else "up"
        else:
            layer, _, part = key.rpartition(".")
        if layer not in weights or part not in Change._fields:
            raise CheckpointError(
                f"{lora.path.name}: {key} belongs to nothing in {base.path.name}. Merging takes"
                " plain LoRAs (lora_A and lora_B, or lora_down and lora_up, and alpha) for L2P's"
                " layers; other kinds load in ComfyUI"
            )
        its = parts.setdefault(weights[layer], {})
        if part in its:
            raise CheckpointError(
                f"{lora.path.name} has {weights[layer]} under two names, of which one is {key}"
            )
        its[part] = Source(entry)
    found = {}
    for weight, its in parts.items():
        change, source = (
            Change(its.get("down"), its.get("up"), its.get("alpha")),
            base.tensors[weight],
        )
        if not (change.down and change.up):
            raise CheckpointError(
                f"{lora.path.name} has only one factor, or an alpha alone, for {weight}. The file"
                " is damaged"
            )
        shapes = change.up.shape, change.down.shape
        rank = math.prod(shapes[0][1:])
        if (
            not rank
            or shapes[1][:1] != (rank,)
            or shapes[0][:1] != source.shape[:1]
            or math.prod(shapes[1][1:]) != math.prod(source.shape[1:])
            or change.alpha
            and change.alpha.entry.count != 1
        ):
            raise CheckpointError(
                f"{lora.path.name}: the factors for {weight} are {shapes[0]} and {shapes[1]}, with"
                f" {'an' if change.alpha else 'no'} alpha, which make no {source.shape}. Give the"
                " model it was trained on"
            )
        if source.entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{base.path.name}: {weight} is {source.entry.dtype}. Merge the LoRA into the BF16"
                " or FP32 model, and quantize that: l2p quantize"
            )
        found[weight] = change
    return found


def with_changes(
    pieces: list[Piece], found: dict[str, Change], naming: str, prefix: str, strength: float
) -> list[Piece]:
    """The plan of the base, with what is added to each weight; of q, k and v where they are packed,
    to their rows."""
    by_piece: dict[str, list[tuple[int, Change]]] = {}
    for weight, change in found.items():
        name, place = name_in(naming, weight)
        by_piece.setdefault(prefix + name, []).append((place * change.up.shape[0], change))
    return [
        added(piece, by_piece[piece.name], strength) if piece.name in by_piece else piece
        for piece in pieces
    ]


def added(piece: Piece, its: list[tuple[int, Change]], strength: float) -> Piece:
    """its: changes, each with the first row it is added to."""

    def made() -> Iterator[Tensor]:
        change = torch.zeros(piece.shape[0], math.prod(piece.shape[1:]))
        for first, each in its:
            rows = each.rows(strength)
            change[first : first + len(rows)] += rows
        row = 0
        for source in piece.origin:
            for block in read_floats(source, torch.float32):
                block = (block + change[row : row + len(block)].view_as(block)).to(
                    TORCH_DTYPES[piece.dtype]
                )
                row += len(block)
                if not block.isfinite().all():
                    raise CheckpointError(
                        f"{piece.name} with the LoRA holds NaN or infinite numbers as"
                        f" {piece.dtype}. A file is damaged, or strength is too high; bf16 has the"
                        " range of fp32"
                    )
                yield block

    read = tuple(source for _, change in its for source in change if source)
    return piece._replace(origin=made, read=(*piece.origin, *read))
