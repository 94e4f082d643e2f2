"""The same model under other names: `l2p export`. Also how every tool here lays tensors out in a
file."""

import json
import warnings
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ..l2p_core.files.header import CheckpointError
from ..l2p_core.files.layout import Layout, Source, read_layout
from ..l2p_core.files.load import check
from ..l2p_core.files.naming import PACKED, name_in
from ..l2p_core.files.quantization import FORMATS
from .stream import TORCH_DTYPES, Piece, Progress, read_scale, scale_source, write

PREFIXES = {
    "published": "",
    "comfyui": "model.diffusion_model.",
}  # what each naming usually stands behind
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def export(
    checkpoint: Path,
    output: Path,
    naming: str = "comfyui",
    prefix: str | None = None,
    dtype: str | None = None,
    convrot_groupsize: int | None = None,
    progress: bool | Progress = False,
) -> None:
    """Write a model or a trained part under another naming. Bytes are kept where names are all that
    changes.

    naming: published or comfyui, which packs q, k and v. prefix: None for the naming's usual one.
    dtype: fp32, bf16 or fp16 for all tensors, quantized ones dequantized; None keeps each
    tensor's. convrot_groupsize: see `read_layout`. Raises CheckpointError where the file is no L2P
    model, or can't be laid out so."""
    layout = read_layout(checkpoint, convrot_groupsize)
    if layout.kind != "part":
        check(layout)
    elif layout.unused:
        raise CheckpointError(
            f"{layout.path.name} has {len(layout.unused)} tensors that no L2P model has (first: "
            f"{layout.unused[0]}). Was it made by a program this one does not know?"
        )
    prefix = PREFIXES[naming] if prefix is None else prefix
    note_left_out(layout)
    write(
        output,
        arrange(layout.tensors, naming, prefix, dtype and DTYPES[dtype]),
        [layout],
        "l2p export",
        {"naming": naming, "prefix": prefix, "dtype": dtype},
        {},
        progress,
    )


def arrange(
    tensors: Mapping[str, Source], naming: str, prefix: str = "", dtype: str | None = None
) -> list[Piece]:
    """The plan of a file that holds these tensors, given by published name.

    dtype: safetensors' name for all of them; None keeps each tensor's, the widest where three are
    packed into one, and what is quantized stays so, with its scale and ComfyUI's marker. Raises
    CheckpointError where q, k and v can't be packed."""
    pieces = []
    for name, sources in packs(tensors, naming).items():
        if name.endswith(PACKED[0]) and len(sources) != 3:
            raise CheckpointError(
                f"{name} packs q, k and v, of which only {len(sources)} of 3 are there. "
                "Keep the published naming: --naming published"
            )
        if len({source.entry.key for source in sources}) == 1 and [
            source.third for source in sources
        ] == [0, 1, 2]:
            sources = (sources[0]._replace(third=None),)  # packed already
        shape = (
            (sum(source.shape[0] for source in sources), *sources[0].shape[1:])
            if len(sources) > 1
            else sources[0].shape
        )
        formats = {
            (source.format, source.convrot_groupsize, source.format and source.entry.dtype)
            for source in sources
        }
        (kind, groupsize, _), *others = formats
        if dtype is not None or kind is None and not others:
            pieces.append(
                Piece(
                    prefix + name,
                    dtype or widest([source.entry.dtype for source in sources]),
                    shape,
                    sources,
                )
            )
            continue
        if others:
            raise CheckpointError(
                f"{name} packs q, k and v, which are quantized in different ways. Keep the"
                " published naming, or dequantize them: --dtype bf16"
            )
        assert kind is not None  # what is not quantized is done
        if FORMATS[kind].block and (len(sources) > 1 or sources[0].third is not None):
            raise CheckpointError(
                f"{name} is {kind}, whose scales can't be packed or taken apart. Keep the file's"
                f" {'published' if len(sources) > 1 else 'comfyui'} naming, or dequantize it:"
                " --dtype bf16"
            )
        stored = (sum(source.stored_shape[0] for source in sources), *sources[0].stored_shape[1:])
        pieces += [
            Piece(prefix + name, sources[0].entry.dtype, stored, sources),
            scale_piece(prefix + name, sources),
            marker_piece(prefix + name, kind, groupsize),
        ]
        if scale_2 := sources[0].scale_2:
            pieces.append(
                Piece(f"{prefix}{name}_scale_2", scale_2.dtype, scale_2.shape, (Source(scale_2),))
            )
    return pieces


def packs(tensors: Mapping[str, Source], naming: str) -> dict[str, tuple[Source, ...]]:
    """What lies under each name of that naming: q, k and v in their order where it packs them, else
    one tensor."""
    found: dict[str, dict[int, Source]] = {}
    for name, source in tensors.items():
        name, place = name_in(naming, name)
        found.setdefault(name, {})[place] = source
    return {name: tuple(pack[place] for place in sorted(pack)) for name, pack in found.items()}


def scale_piece(weight: str, sources: tuple[Source, ...]) -> Piece:
    """The scale of a quantized tensor: as it is where it can be, one for each row where q, k and v
    differ."""
    scales = tuple(scale_source(source) for source in sources)
    first = scales[0]
    if len({(scale.entry.dtype, scale.shape) for scale in scales}) == 1:
        if first.entry.count > 1:
            return Piece(
                f"{weight}_scale",
                first.entry.dtype,
                (len(scales) * first.shape[0], *first.shape[1:]),
                scales,
            )
        if len({read_scale(source).item() for source in sources}) == 1:
            return Piece(f"{weight}_scale", first.entry.dtype, first.shape, scales[:1])

    def rows_of_each() -> list[Tensor]:
        return [read_scale(source)[:, None].expand(source.shape[0], 1) for source in sources]

    return Piece(
        f"{weight}_scale", "F32", (sum(source.shape[0] for source in sources), 1), rows_of_each
    )


def marker_piece(weight: str, kind: str, groupsize: int) -> Piece:
    """The plan of a layer's `comfy_quant` tensor."""
    content = marker(kind, groupsize)
    return Piece(
        f"{weight.removesuffix('.weight')}.comfy_quant",
        "U8",
        tuple(content.shape),
        lambda: [content],
    )


def marker(kind: str, groupsize: int) -> Tensor:
    """ComfyUI's `comfy_quant`: JSON that tells how the layer is quantized."""
    facts = {
        "format": kind,
        **({"convrot": True, "convrot_groupsize": groupsize} if groupsize else {}),
    }
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def widest(dtypes: list[str]) -> str:
    """The safetensors dtype that holds all of these exactly."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    dtype = reduce(torch.promote_types, (TORCH_DTYPES[dtype] for dtype in dtypes))
    return next(name for name, known in TORCH_DTYPES.items() if known == dtype)


def note_left_out(layout: Layout) -> None:
    """Say so where the file holds other models too: what is written is the L2P model alone."""
    if layout.outside:
        warnings.warn(
            f"{layout.path.name} also holds {len(layout.outside)} tensors of other models (first: "
            f"{layout.outside[0]}); they are not written",
            stacklevel=3,
        )
