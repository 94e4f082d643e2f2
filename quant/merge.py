"""A trained part over the pixel initialisation it was trained from, or a LoRA into its model: `l2p
merge`."""

import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ..l2p_core.files.header import CheckpointError
from ..l2p_core.files.layout import FLOATS, Layout, Source, read_layout
from ..l2p_core.files.load import check
from ..l2p_core.files.lora import Change, changes
from ..l2p_core.files.naming import PACKED, name_in
from .export import DTYPES, arrange, note_left_out
from .stream import TORCH_DTYPES, Piece, Progress, modelspec, read_floats, write


def merge(
    trained: Path | list[Path],
    base: Path | list[Path],
    output: Path,
    dtype: str | None = None,
    skip: list[str] | None = None,
    strength: float | None = None,
    progress: bool | Progress = False,
) -> None:
    """Write the base with the trained tensors in place of its own, or with a LoRA added, under the
    base's names and prefix.

    trained: what a training saved, any naming. base: the pixel initialisation, or a LoRA's model,
    whole. dtype: fp32, bf16 or fp16 for all tensors; None keeps each tensor's own. skip: patterns
    such as "layers.0.*" of trained tensors to leave out, by published name. strength: of a LoRA;
    None for 1. Raises CheckpointError where a tensor does not fit the base, ValueError for an
    option that does not fit what was trained."""
    part, whole = read_layout(trained), read_layout(base)
    if part.kind == "model" and whole.kind == "part":
        raise CheckpointError(
            f"{whole.path.name} is the trained part and {part.path.name} the whole model; "
            "give them the other way round"
        )
    check(whole)
    if part.kind == "lora":
        if skip:
            raise ValueError(f"--skip is for whole tensors, and {part.path.name} is a LoRA")
        factor = 1.0 if strength is None else strength
        if not math.isfinite(factor):
            raise ValueError(f"--strength is {factor}; expected a number")
        found = changes(part, whole)
        reject_quantized(whole, found)
        pieces = with_changes(
            arrange(whole.tensors, whole.naming, whole.prefix, dtype and DTYPES[dtype]),
            found,
            whole.naming,
            whole.prefix,
            factor,
        )
        note_left_out(whole)
        write(
            output,
            pieces,
            [whole, part],
            "l2p merge",
            {"dtype": dtype, "strength": factor},
            {},
            progress,
            whole.default_settings | (part.default_settings if factor > 0 else {}),
        )
        return
    if strength is not None:
        raise ValueError(f"--strength is of a LoRA, and {part.path.name} is none")
    if part.kind not in ("part", "model", "unknown"):
        check(part)  # says what it is
    tensors = whole.tensors | fitting(part, whole, skip or [])
    note_left_out(whole)
    write(
        output,
        arrange(tensors, whole.naming, whole.prefix, dtype and DTYPES[dtype]),
        [part, whole],
        "l2p merge",
        {"dtype": dtype, "skip": skip or []},
        modelspec(whole) | modelspec(part),
        progress,
        whole.default_settings | part.default_settings,
    )


def fitting(part: Layout, whole: Layout, skip: list[str]) -> dict[str, Source]:
    """The trained tensors by published name. Raises CheckpointError where one is not in the base or
    has another shape."""
    found = part.tensors | {
        key.removeprefix(part.prefix): Source(part.entries[key])
        for key in (*part.unused, *part.outside)
    }
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise CheckpointError(
                f"--skip {pattern} matches none of the {len(found)} tensors of {part.path.name} "
                f"(first: {next(iter(found), None)})"
            )
    kept = {
        name: source
        for name, source in found.items()
        if not any(fnmatchcase(name, pattern) for pattern in skip)
    }
    if unknown := [name for name in kept if name not in whole.tensors]:
        raise CheckpointError(
            f"{part.path.name} has {len(unknown)} of {len(kept)} tensors that {whole.path.name}"
            f" lacks (first: {unknown[0]}). Give the pixel initialisation it was trained from, or"
            f" leave them out by name: --skip '{unknown[0]}'"
        )
    if misshapen := [
        name for name, source in kept.items() if source.shape != whole.tensors[name].shape
    ]:
        name = misshapen[0]
        raise CheckpointError(
            f"{len(misshapen)} tensors of {part.path.name} do not fit {whole.path.name} (first:"
            f" {name} is {kept[name].shape}, there {whole.tensors[name].shape}). Give the pixel"
            f" initialisation it was trained from, or leave them out by name: --skip '{name}'"
        )
    if not kept:
        raise CheckpointError(
            f"{part.path.name} holds no tensors to merge. Give the file that the training saved"
        )
    return kept


def reject_quantized(base: Layout, weights: Iterable[str]) -> None:
    """Raise CheckpointError where one of these weights of the base is not floating point."""
    for weight in weights:
        if (dtype := base.tensors[weight].entry.dtype) not in FLOATS:
            raise CheckpointError(
                f"{base.path.name}: {weight} is {dtype}. Merge the LoRA into the BF16 or FP32"
                " model, and quantize that: l2p quantize"
            )


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
        before = change
        if any("dora_scale" in each.parts for _, each in its):  # others need no number of it
            blocks = (block for each in piece.sources for block in read_floats(each, torch.float32))
            before = torch.cat([block.flatten(1) for block in blocks])
        height = len(change) // (3 if piece.name.endswith(PACKED[0]) else 1)
        for place, each in its:
            part = slice(place * height, (place + 1) * height)
            change[part] += each.rows(strength, before[part])
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
