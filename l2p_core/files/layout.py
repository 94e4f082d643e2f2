"""Identify a checkpoint by its safetensors headers. No weight is read.

A layout maps every tensor of the model, under its published name, to where a file keeps it: under
which key, as which rows of a packed tensor, with which INT8 scale."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..backbones import DECODER, Backbone, find_backbone
from ..config import L2PConfig, PixelConfig, block_numbers
from ..settings import checked
from .header import CheckpointError, Entry, find_files, read_header, reading, stamp
from .naming import ADAPTER, COMFYUI_NAMES, PACKED, layer_name
from .quantization import BESIDE_WEIGHTS, FORMATS, SCALED_FP8, scale_beside

FLOATS = ("F64", "F32", "F16", "BF16")
UNSCALED = ("F8_E4M3", "F8_E5M2")  # where there is no scale: simply cast
MAX_MARKER_BYTES = 10_000  # of a comfy_quant, which takes 100
MAX_SIDE = 16_384  # pixels; the largest published model is trained at 10,240
DEFAULTS_KEY = "l2p.default_settings"  # of the metadata: JSON
# What a file may say there. A distilled one is made for these.
DEFAULT_SETTINGS = ("num_inference_steps", "cfg_scale", "shift", "sampler")
CONVROT_GROUPSIZES = (4, 16, 64, 256, 1024)
# What names of an L2P model's tensors begin with, on Z-Image.
STEMS = (
    "layers.",
    "noise_refiner.",
    "context_refiner.",
    "t_embedder.",
    "cap_embedder.",
    "cap_pad",
    "x_pad",
    "x_embedder.",
    "all_x_embedder.",
    "local_decoder.",
)
DIT = "dit."  # stands before the transformer's names, not the decoder's, in some files
KNOWN_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "pipe.dit.",
    "",
)  # any other is found as well


class Source(NamedTuple):
    """Where one tensor of the model lies: a whole entry, or a third of the rows of a packed q, k,
    v."""

    entry: Entry
    third: int | None = None
    scale: Entry | None = None
    scale_2: Entry | None = None  # nvfp4 scales its scales
    format: str | None = None  # ComfyUI's name of the quantization, one of quantization.FORMATS
    convrot_groupsize: int = 0  # of the rotation applied before rounding; 0 for none

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape as the file stores it; of packed q, k and v, one third."""
        rows, *rest = self.entry.shape or (1,)
        return (rows // 3, *rest) if self.third is not None else self.entry.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights that it stands for."""
        *rest, last = self.stored_shape or (1,)
        return (*rest, last * FORMATS[self.format].packed) if self.format else self.stored_shape


@dataclass
class Layout:
    """A checkpoint's description: one file or all its shards."""

    path: Path
    files: list[Path]
    entries: dict[str, Entry]  # by the files' own keys
    metadata: dict[str, str]
    kind: str  # model, part, latent, lora, text encoder, unknown
    prefix: str  # what stands before the model's names
    naming: str  # published or comfyui
    tensors: dict[str, Source]  # by published name
    outside: list[str] = field(default_factory=list)  # keys of other models in the same file
    unused: list[str] = field(default_factory=list)  # keys under the prefix that mean nothing to us
    stamps: dict[Path, tuple[int, ...]] = field(
        default_factory=dict
    )  # what each file was when it was described
    backbone: Backbone | None = None  # None for Z-Image

    @property
    def model(self) -> str:
        """The latent model that it is made from."""
        return self.backbone.title if self.backbone else "Z-Image"

    @cached_property
    def config(self) -> PixelConfig:
        """The model's numbers, read from tensor shapes. Raises CheckpointError where none fit."""
        shapes = {name: source.shape for name, source in self.tensors.items()}
        try:
            return self.backbone.config(shapes) if self.backbone else L2PConfig.from_shapes(shapes)
        except KeyError as missing:
            raise CheckpointError(
                f"{self.path.name} lacks {missing.args[0]}, which every L2P model has: "
                "it is damaged or incomplete. Get the file again"
            ) from None
        except ValueError as odd:
            raise CheckpointError(f"{self.path.name} does not fit an L2P model: {odd}") from None
        except (IndexError, ZeroDivisionError):
            raise CheckpointError(
                f"{self.path.name} does not fit an L2P model: a tensor that tells its sizes has"
                " none, or too few dimensions. Get the file again"
            ) from None

    @property
    def trained_size(self) -> tuple[int, int]:
        """Height and width in pixels: the file's modelspec.resolution, else the square of 64 x 64
        tokens."""
        width, _, height = self.metadata.get("modelspec.resolution", "").partition("x")
        sides = [int(side) for side in (height, width) if re.fullmatch(r"[0-9]{1,5}", side)]
        if len(sides) == 2 and all(
            0 < side <= MAX_SIDE and side % self.config.size_multiple == 0 for side in sides
        ):
            return sides[0], sides[1]
        return self.config.nominal_size, self.config.nominal_size

    @property
    def default_settings(self) -> dict[str, str | int | float]:
        """What the file says to generate with, by names of `Settings`: see DEFAULT_SETTINGS.

        What does not fit is left out, as the file may be of any program."""
        try:
            found = dict(json.loads(self.metadata.get(DEFAULTS_KEY, "{}")))
        except (ValueError, TypeError, RecursionError):
            return {}
        settings = {}
        for name in DEFAULT_SETTINGS:
            with suppress(ValueError):
                if name in found:
                    settings[name] = checked(name, found[name])
        return settings

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(math.prod(source.shape) for source in self.tensors.values())

    @property
    def quantization(self) -> str | None:
        """ "int8_tensorwise, 34 tensors, convrot 256" or None."""
        formats = Counter(
            (source.format, source.convrot_groupsize)
            for source in self.tensors.values()
            if source.format
        )
        return (
            "; ".join(
                f"{name}, {count} tensors" + (f", convrot {groupsize}" if groupsize else "")
                for (name, groupsize), count in formats.items()
            )
            or None
        )


def defaults_metadata(settings: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata by which a file says what to generate with; none for no settings.

    modelspec.usage_hint says it to people, in programs that show it."""
    if not settings:
        return {}
    hint = ", ".join(f"{name} {value}" for name, value in settings.items())
    return {DEFAULTS_KEY: json.dumps(settings), "modelspec.usage_hint": hint}


def read_layout(
    path: str | Path | Sequence[str | Path], convrot_groupsize: int | None = None
) -> Layout:
    """Describe a checkpoint: a .safetensors file, a shard index (.index.json), a folder that holds
    either, or a list of shards.

    convrot_groupsize: the rotation of INT8 weights that carry no marker; it cannot be seen in the
    file, and none is assumed. Raises CheckpointError where the file is missing, truncated,
    inconsistent or no safetensors file. A whole file that is not an L2P model is described, not
    rejected: see `kind`."""
    paths = [Path(path)] if isinstance(path, (str, Path)) else [Path(part) for part in path]
    path, files, promised = paths[0], [], set()
    for each in paths:
        more_files, more_promised = find_files(each)
        files += more_files
        promised |= more_promised
    stamps = {file: stamp(file) for file in files}
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    markers: dict[str, dict] = {}
    for file in files:
        header_entries, header_metadata = read_header(file)
        if twice := entries.keys() & header_entries.keys():
            raise CheckpointError(
                f"{min(twice)} is in {entries[min(twice)].file.name} and in {file.name}: "
                "these are not shards of one model. Give one file, or the folder of one model"
            )
        entries |= header_entries
        metadata |= header_metadata
        markers |= quantization_markers(header_entries, header_metadata)
    if absent := promised - entries.keys():
        raise CheckpointError(
            f"{path.name} names {len(absent)} tensors that its shards lack (first: {min(absent)}). "
            "The shards are not this index's. Get them again"
        )
    return describe(path, files, entries, metadata, markers, stamps, convrot_groupsize)


def describe(
    path: Path,
    files: list[Path],
    entries: dict[str, Entry],
    metadata: dict[str, str],
    markers: dict[str, dict],
    stamps: dict[Path, tuple[int, ...]],
    convrot_groupsize: int | None = None,
) -> Layout:
    """The layout of these entries, wherever they are kept. markers: of quantized layers, by
    `layer_name`."""
    backbone = find_backbone(entries)
    if backbone is None:
        prefix = find_prefix(entries)
        kind, naming = classify(entries, prefix)
    else:
        prefix = backbone_prefix(entries, backbone)
        kind, naming = classify_backbone(entries, prefix, backbone), "published"
    stems = backbone.stems if backbone else STEMS
    layout = Layout(
        path, files, entries, metadata, kind, prefix, naming, {}, stamps=stamps, backbone=backbone
    )
    for key, entry in entries.items():
        if not key.startswith(prefix):
            layout.outside.append(key)
            continue
        name = key.removeprefix(prefix)
        if backbone:
            name = name.removeprefix(DIT)
        of_weight = f"{key.rpartition('.')[0]}.weight" in entries
        if name == SCALED_FP8 or name.endswith(BESIDE_WEIGHTS) and of_weight:
            continue
        if not name.startswith(stems):
            layout.unused.append(key)
            continue
        source = Source(entry)
        if name.endswith(".weight"):
            scale = scale_beside(key, entries)
            marker = markers.get(name.removesuffix(".weight"))
            if scale is not None or marker is not None:
                source = quantized_source(
                    source, scale, entries.get(f"{key}_scale_2"), marker, convrot_groupsize
                )
        if naming == "comfyui":
            for theirs, ours in COMFYUI_NAMES.items():
                name = name.replace(theirs, ours)
            embedder = entries.get(f"{prefix}x_embedder.weight")
            if name.startswith("x_embedder.") and embedder and embedder.shape:
                name = name.replace(
                    "x_embedder.", f"all_x_embedder.{math.isqrt(embedder.shape[-1] // 3)}-1."
                )
        packed, parts = PACKED
        if name.endswith(packed):
            if len(entry.shape) != 2 or entry.shape[0] % 3:
                raise CheckpointError(
                    f"{key} is {entry.shape}; expected q, k and v packed below one another. "
                    "The file is damaged"
                )
            found = {
                name.removesuffix(packed) + part: source._replace(third=third)
                for third, part in enumerate(parts)
            }
        else:
            found = {name: source}
        if twice := layout.tensors.keys() & found.keys():
            raise CheckpointError(
                f"{path.name} has {min(twice)} under two names, of which one is {key}. "
                "It mixes two models, or was made by a program this one does not know"
            )
        layout.tensors |= found
    return layout


def find_prefix(entries: dict[str, Entry]) -> str:
    """What stands before `cap_embedder.1.weight` or, where a trained part lacks that, before the
    decoder."""
    for landmark in ("cap_embedder.1.weight", "local_decoder.enc1.0.weight"):
        if found := [key.removesuffix(landmark) for key in entries if key.endswith(landmark)]:
            if len(found) > 1 and not set(found) & set(KNOWN_PREFIXES):
                raise CheckpointError(
                    f"there are {len(found)} models in it, under {' and '.join(map(repr, found))}. "
                    "Give a file that holds one"
                )
            return next((prefix for prefix in KNOWN_PREFIXES if prefix in found), found[0])
    return ""


def classify(entries: dict[str, Entry], prefix: str) -> tuple[str, str]:
    """(kind, naming). A model is whole as far as its landmarks go; `checkpoint.check` compares
    every tensor."""
    names = {key.removeprefix(prefix) for key in entries if key.startswith(prefix)}
    starts = {name.split(".")[0] for name in names}
    naming = (
        "comfyui"
        if any(".attention.qkv." in name or name.startswith("x_embedder.") for name in names)
        else "published"
    )
    if any(ADAPTER.search(key) for key in entries):
        return "lora", naming
    if (
        "x_pad_token" in names
        and starts & {"all_final_layer", "final_layer"}
        and "local_decoder" not in starts
    ):
        return "latent", naming
    if starts & {"local_decoder", "x_pad_token"}:
        depths = block_numbers(names)
        whole = (
            len(depths) == max(depths, default=-1) + 1
            and {"layers", "cap_embedder", "local_decoder"} <= starts
        )
        return ("model" if whole else "part"), naming
    if any(key.endswith("embed_tokens.weight") for key in entries):
        return "text encoder", naming
    return "unknown", naming


def backbone_prefix(entries: dict[str, Entry], backbone: Backbone) -> str:
    """What stands before the names of a backbone's tensors and of its decoder, without `dit.`."""
    found = {
        key[: match.start()]
        for key in entries
        if (match := re.search(rf"(?<![^.]){backbone.signature}$", key))
    }
    if len(found) > 1:
        raise CheckpointError(
            f"there are {len(found)} models in it, under {' and '.join(map(repr, sorted(found)))}. "
            "Give a file that holds one"
        )
    return found.pop().removesuffix(DIT)


def classify_backbone(entries: dict[str, Entry], prefix: str, backbone: Backbone) -> str:
    """The kind of a file of this backbone."""
    if any(ADAPTER.search(key) for key in entries):
        return "lora"
    names = {key.removeprefix(prefix).removeprefix(DIT) for key in entries}
    starts = {f"{name.partition('.')[0]}." for name in names}
    if f"{DECODER}." not in starts:
        return "latent" if f"{backbone.output}." in starts else "part"
    numbers = [block_numbers(names, stack) for stack in backbone.stacks]
    whole = starts.issuperset(backbone.stems) and all(
        len(found) == max(found, default=0) + 1 for found in numbers
    )
    return "model" if whole else "part"


def quantization_markers(entries: dict[str, Entry], metadata: dict[str, str]) -> dict[str, dict]:
    """One file's descriptions of quantized layers, by the layer's name without any prefix: from its
    metadata and its `comfy_quant` tensors."""
    markers: dict[str, dict] = {}
    if "_quantization_metadata" in metadata:
        try:
            layers = json.loads(metadata["_quantization_metadata"])["layers"]
            markers = {layer_name(layer): dict(marker) for layer, marker in layers.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(
                "the file's _quantization_metadata is not ComfyUI's table of layers"
            ) from None
    for key, entry in entries.items():
        if key.endswith(".comfy_quant"):
            with reading(entry.file) as stream:
                stream.seek(entry.begin)
                content = stream.read(min(entry.end - entry.begin, MAX_MARKER_BYTES))
            markers[layer_name(key.removesuffix(".comfy_quant"))] = read_marker(key, content)
    return markers


def read_marker(key: str, content: bytes) -> dict:
    """What a `comfy_quant` tensor of these bytes says. Raises CheckpointError."""
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError, RecursionError):
        raise CheckpointError(
            f"{key} is not the JSON that ComfyUI writes there. The file is damaged"
        ) from None


def quantized_source(
    source: Source,
    scale: Entry | None,
    scale_2: Entry | None,
    marker: dict | None,
    convrot_groupsize: int | None,
) -> Source:
    """`source` with its scales and format. marker: None where the file has none. Raises
    CheckpointError."""
    key, dtype, shape = source.entry.key, source.entry.dtype, source.entry.shape
    if marker is None:  # 8 bits with a scale for a tensor or a row need none
        name = next(
            (name for name, known in FORMATS.items() if known.dtype == dtype and known.packed == 1),
            None,
        )
        groupsize = convrot_groupsize or 0 if dtype == "I8" and len(shape) == 2 else 0
    else:
        params = marker.get("params")
        options = {**(params if isinstance(params, dict) else {}), **marker}
        name = marker.get("format")
        groupsize = (
            options.get("convrot_groupsize", 256)
            if options.get("convrot") or name == "convrot_w4a4"
            else 0
        )
    if name not in list(FORMATS) or FORMATS[name].dtype != dtype:
        raise CheckpointError(
            f"{key} is {dtype} quantized as {name}; this program reads {', '.join(FORMATS)}. "
            "Use the BF16 or INT8 version of the model"
        )
    source = source._replace(scale=scale, scale_2=scale_2, format=name)
    block, scale_dtypes = FORMATS[name].block, FORMATS[name].scale_dtypes
    rows, inputs = source.shape if len(shape) == 2 else (math.prod(shape[:1]), 0)
    shapes = FORMATS[name].scale_shapes(rows, inputs)
    if scale is None or scale.dtype not in scale_dtypes or scale.shape not in shapes:
        wanted = (
            f"{scale_dtypes[0]} {shapes[0]}"
            if block
            else f"one number, or one for each of its {rows} rows"
        )
        raise CheckpointError(
            f"{key} is {name} but its weight_scale is {scale and f'{scale.dtype} {scale.shape}'};"
            f" expected {wanted}. The file is damaged"
        )
    if block and (len(shape) != 2 or rows % block or inputs % block):
        raise CheckpointError(
            f"{key}, {source.shape}, is {name}, which this program reads where both sides are"
            f" multiples of {block}. Use the BF16 or INT8 version of the model"
        )
    if (scale_2 is not None and scale_2.dtype == "F32" and scale_2.count == 1) != (name == "nvfp4"):
        raise CheckpointError(
            f"{key} is {name} but its weight_scale_2 is"
            f" {scale_2 and (scale_2.dtype, scale_2.shape)}; expected"
            f" {'one F32 number' if name == 'nvfp4' else 'none'}. The file is damaged"
        )
    if groupsize and (
        type(groupsize) is not int
        or groupsize not in CONVROT_GROUPSIZES
        or len(shape) != 2
        or inputs % groupsize
    ):
        raise CheckpointError(
            f"{key}, {source.shape}, can't be rotated in groups of {groupsize}; expected a power of"
            " 4 that divides its inputs"
        )
    return source._replace(convrot_groupsize=groupsize)
