"""Linears in 8 or 4 bits, in ComfyUI's own formats, the rest in BF16: `l2p quantize`. Every
tensor's loss is measured as it is written."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from ..l2p_core.backbones import Backbone
from ..l2p_core.files.atomic import atomic_write, readable_bytes
from ..l2p_core.files.header import DTYPE_BYTES, CheckpointError
from ..l2p_core.files.layout import Layout, Source, read_layout
from ..l2p_core.files.load import check
from ..l2p_core.files.quantization import FORMATS, dequantize, kernel, rotate
from .export import PREFIXES, arrange, marker_piece, note_left_out
from .stream import TORCH_DTYPES, Piece, Progress, on_all_cores, read_floats, single_threaded, write

# Which tensors become 8 bits, by ComfyUI's names: the linears of the blocks. Norms, biases,
# modulation, embedders and the
# decoder are a hundredth of the model's work and the most sensitive to rounding.
_LINEARS = r"(attention\.(qkv|out)|feed_forward\.w[123])\.weight"
PRESETS = {
    "card": (
        rf"layers\.(?!0\.)\d+\.{_LINEARS}"
    ),  # as the published 7.19 GB file: refiners and first layer in BF16
    "small": rf"(layers|noise_refiner|context_refiner)\.\d+\.{_LINEARS}",
}
LARGEST = {
    "int8_tensorwise": 127,
    "float8_e4m3fn": 448,
    "float8_e5m2": 57344,
    "nvfp4": 448 * 6,
}  # what a scale of 1 reaches
PREFERRED_GROUPSIZES = (
    256,
    64,
    16,
)  # ComfyUI's own size first; powers of 4 that must divide the inputs


@dataclass
class Tally:
    """What rounding did to one tensor."""

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    convrot_groupsize: int = 0
    signal: float = 0.0  # sums of squares
    noise: float = 0.0

    @property
    def snr_db(self) -> float | None:
        """Signal to noise in decibels; None where nothing was lost."""
        return 10 * math.log10(self.signal / self.noise) if self.noise else None

    def add(self, loss: tuple[float, float]) -> None:
        """Count the loss of one block in."""
        self.signal += loss[0]
        self.noise += loss[1]


def loss(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Sums of squares: of the signal, of the noise."""
    return float(before.norm()) ** 2, float(torch.dist(before, after)) ** 2


@dataclass
class Options:
    """What decides the bytes of a quantized file."""

    format: str = "int8_tensorwise"
    granularity: str | None = None  # what shares a scale: one of the format's, its first by default
    preset: str = "card"
    include: list[str] = field(
        default_factory=list
    )  # patterns of further tensors, by ComfyUI's names without prefix
    exclude: list[str] = field(default_factory=list)
    prefix: str = PREFIXES["comfyui"]

    def __post_init__(self):
        """Raises CheckpointError where they don't go together."""
        if self.format not in FORMATS or self.preset not in PRESETS:
            raise CheckpointError(
                f"format {self.format}, preset {self.preset}: expected {', '.join(FORMATS)};"
                f" {' or '.join(PRESETS)}"
            )
        known = FORMATS[self.format].granularities
        self.granularity = self.granularity or known[0]
        if self.granularity not in known:
            raise CheckpointError(
                f"granularity {self.granularity}: {self.format} has {', '.join(known)}. Leave it"
                " out, or take --format int8_tensorwise"
            )


def quantize(
    checkpoint: Path | list[Path],
    output: Path,
    options: Options | None = None,
    verify: bool = False,
    progress: bool | Progress = False,
) -> dict:
    """Write a whole model with its large linears in 8 or 4 bits, for ComfyUI and for `load_model`.
    Returns the report: sizes and signal-to-noise, in total and for each tensor, ready for JSON.

    verify: read the written file back: what is kept must equal the source, what is quantized must
    show the loss noted. Raises CheckpointError where the model is incomplete or is quantized
    already, where a pattern means nothing, and where verifying finds a difference."""
    options = options or Options()
    layout = read_layout(checkpoint)
    check(layout)
    tallies: list[Tally] = []
    pieces = plan(layout, options, tallies)
    note_left_out(layout)
    write(output, pieces, [layout], "l2p quantize", asdict(options), {}, progress)
    facts = report(layout, Path(output), options, tallies)
    if verify:
        compare(layout, Path(output), tallies)
        facts["verified"] = True
    return facts


def plan(layout: Layout, options: Options, tallies: list[Tally]) -> list[Piece]:
    """The file's tensors. tallies: gets one for each quantized tensor, filled while it is
    written."""
    if layout.quantization:
        raise CheckpointError(
            f"{layout.path.name} is quantized already ({layout.quantization}), and rounding twice"
            " loses twice. Give the model it was made from; l2p export changes names alone"
        )
    plain = arrange(layout.tensors, "comfyui", dtype="BF16")
    chosen = choose(plain, options, layout.backbone)
    if dull := [piece for piece in plain if piece.name in chosen and len(piece.shape) != 2]:
        raise CheckpointError(
            f"--include reaches {dull[0].name} of shape {dull[0].shape}; only the weights of linear"
            " layers, with two dimensions, can be quantized. Narrow the pattern"
        )
    pieces: list[Piece] = []
    for piece in plain:
        name, piece = piece.name, piece._replace(name=options.prefix + piece.name)
        pieces += (
            quantized(piece, options, tallies)
            if name in chosen and divides(piece.shape, options)
            else [piece]
        )
    if not tallies:
        raise CheckpointError(
            f"no tensor's sides divide into the blocks of {options.format}. Take --format"
            " int8_tensorwise"
        )
    return pieces


def divides(shape: tuple[int, ...], options: Options) -> bool:
    """Whether a weight can be had in that format; what can't stays BF16."""
    block = FORMATS[options.format].block
    return not (block and any(side % block for side in shape)) and (
        options.format != "convrot_w4a4" or shape[1] % PREFERRED_GROUPSIZES[1] == 0
    )


def preset_pattern(preset: str, row: Backbone | None) -> str:
    """What a preset quantizes, as a pattern of ComfyUI's names. row: of the model's backbone, whose
    names are diffusers'; None for Z-Image."""
    if row is None:
        return PRESETS[preset]
    linears = "|".join(row.lora[kind] for kind in ("attention", "feed_forward"))
    first = rf"(?!{next(iter(row.stacks))}\.0\.)" if preset == "card" else ""
    return rf"{first}({linears})\.weight"


def choose(pieces: list[Piece], options: Options, row: Backbone | None = None) -> set[str]:
    """The names to quantize: the preset's and the included, without the excluded. Raises
    CheckpointError."""
    names = [piece.name for piece in pieces]
    of_preset = preset_pattern(options.preset, row)
    for pattern in (*options.include, *options.exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(
                f"the pattern {pattern} matches no tensor; names are ComfyUI's, without prefix,"
                f" such as {next(name for name in names if re.fullmatch(of_preset, name))}"
            )

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    chosen = {
        name
        for name in names
        if (re.fullmatch(of_preset, name) or matches(name, options.include))
        and not matches(name, options.exclude)
    }
    if not chosen:
        raise CheckpointError("nothing is left to quantize; give fewer --exclude")
    return chosen


def quantized(piece: Piece, options: Options, tallies: list[Tally]) -> list[Piece]:
    """The pieces that stand for one linear's weights: numbers, scales, marker."""
    kind = FORMATS[options.format]
    rows, inputs = piece.shape
    groupsize = 0
    if options.granularity == "convrot":
        groupsize = next((size for size in PREFERRED_GROUPSIZES if inputs % size == 0), 0)
    scale_shape: tuple[int, ...] = (rows, 1)
    if options.granularity == "tensor":
        scale_shape = ()
    elif options.granularity == "block":
        scale_shape = kind.scale_shapes(rows, inputs)[0]
    elif options.format == "convrot_w4a4":
        scale_shape = (rows,)  # as its kernels want them
    scale_dtype = kind.scale_dtypes[0]
    stored = (
        math.prod(piece.shape) // kind.packed * DTYPE_BYTES[kind.dtype]
        + math.prod(scale_shape) * DTYPE_BYTES[scale_dtype]
    )
    before = sum(
        math.prod(source.shape) * DTYPE_BYTES[source.entry.dtype] for source in piece.sources
    )
    tally = Tally(piece.name, piece.shape, before, stored, groupsize)
    tallies.append(tally)
    made: dict[
        str, Tensor
    ] = {}  # by the numbers, which are written first; handed over once, to hold no memory

    def numbers() -> Iterator[Tensor]:
        tally.signal = tally.noise = 0.0
        if options.granularity == "tensor" or options.format == "nvfp4":
            largest = max(on_all_cores(lambda block: float(block.abs().max()), floats(piece)))
            made["shared"] = torch.tensor(largest / LARGEST[options.format]).clamp(min=1e-30)
        if options.granularity != "tensor":
            # One tensor for all blocks' scales: small ones kept between the large would take
            # malloc's large holes apart.
            made["scale"] = torch.empty(scale_shape, dtype=TORCH_DTYPES[scale_dtype])

        def rounded(block: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
            turn = groupsize
            if turn and options.format == "int8_tensorwise":  # once: rotated, the loss is the same
                block, turn = rotate(block, turn), 0
            codes, scale = round_block(block, options.format, made.get("shared"), turn)
            return (
                codes,
                scale,
                loss(
                    block,
                    dequantize(
                        options.format, codes, scale, made.get("shared"), turn, torch.float32
                    ),
                ),
            )

        filled = 0
        for codes, scale, lost in on_all_cores(
            rounded, in_tiles(floats(piece)) if kind.block else floats(piece)
        ):
            if options.granularity != "tensor":
                made["scale"].view(-1)[filled : filled + scale.numel()] = scale.flatten()
                filled += scale.numel()
            tally.add(lost)
            yield codes

    def once(name: str) -> Callable[[], Iterator[Tensor]]:
        def hand_over() -> Iterator[Tensor]:
            yield made.pop(name)

        return hand_over

    pieces = [
        Piece(piece.name, kind.dtype, (rows, inputs // kind.packed), numbers, piece.sources),
        Piece(
            f"{piece.name}_scale",
            scale_dtype,
            scale_shape,
            once("shared" if options.granularity == "tensor" else "scale"),
        ),
        marker_piece(piece.name, options.format, groupsize),
    ]
    if options.format == "nvfp4":
        pieces.append(Piece(f"{piece.name}_scale_2", "F32", (), once("shared")))
    return pieces


def round_block(
    block: Tensor, kind: str, shared: Tensor | None, groupsize: int
) -> tuple[Tensor, Tensor]:
    """Rows (R, K) float32 → what is stored of them, and their scales: comfy-kitchen's rounding. R
    is a multiple of 128 in all blocks but the last, so that block scales follow one another.
    shared: the scale of the whole tensor. groupsize: of convrot_w4a4's rotation."""
    if kind in ("float8_e4m3fn", "float8_e5m2"):
        return kernel("quantize_per_tensor_fp8")(block, shared, getattr(torch, kind)), shared
    if kind == "mxfp8":
        codes, scales = kernel("quantize_mxfp8")(block)
        return codes, scales.view(torch.uint8)
    if kind == "nvfp4":
        return kernel("quantize_nvfp4")(block, shared)
    if kind == "convrot_w4a4":
        return kernel("quantize_convrot_w4a4_weight")(block, groupsize)
    if shared is not None:
        return kernel("quantize_int8_tensorwise")(block, shared)
    return kernel("quantize_int8_rowwise")(block)


def in_tiles(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same rows in blocks of a multiple of 128, save the last one."""
    rest = None
    for block in blocks:
        block = block if rest is None else torch.cat([rest, block])
        count = len(block) // 128 * 128
        if count:
            yield block[:count]
        rest = block[count:]
    if rest is not None and len(rest):
        yield rest


def floats(piece: Piece) -> Iterator[Tensor]:
    """The source's numbers in blocks of rows, float32. Raises CheckpointError for NaN and
    infinities."""
    for source in piece.sources:
        for block in read_floats(source, torch.float32):
            if not math.isfinite(float(block.sum())):
                raise CheckpointError(
                    f"{source.entry.file.name}: {source.entry.key} holds NaN or infinite numbers."
                    " The file is damaged, or its training diverged"
                )
            yield block


def compare(layout: Layout, output: Path, tallies: list[Tally]) -> None:
    """Raise CheckpointError unless the file, read anew, is a whole model, BF16 of the source where
    it is not quantized, and as far from it as the tallies say where it is."""
    written = read_layout(output)
    check(written)

    def blocks() -> Iterator[tuple[Source, Tensor, Tensor]]:
        for name, source in written.tensors.items():
            originals = read_floats(
                layout.tensors[name], torch.float32
            )  # the same rows at a time, whatever the packing
            for before, after in zip(originals, read_floats(source, torch.float32), strict=True):
                yield source, before, after

    def measured(block: tuple[Source, Tensor, Tensor]) -> tuple[Source, tuple[float, float]]:
        source, before, after = block
        return source, loss(before if source.format else before.bfloat16().float(), after)

    found: dict[str, Tally] = {}
    with single_threaded():
        for source, lost in on_all_cores(measured, blocks()):
            found.setdefault(
                source.entry.key, Tally(source.entry.key, source.entry.shape, 0, 0)
            ).add(lost)
    noted = {tally.name: tally.snr_db for tally in tallies}
    for key, tally in found.items():
        wanted, there = noted.get(key), tally.snr_db
        if wanted is None or there is None:
            differ = wanted is not there
        else:
            differ = abs(wanted - there) > 0.1
        if differ:
            raise CheckpointError(
                f"{output.name} does not hold what was written: {key} reads with"
                f" {there and round(there, 1)} dB of signal to noise, expected"
                f" {wanted and round(wanted, 1)}. Check the disk, then quantize again"
            )


def report(layout: Layout, output: Path, options: Options, tallies: list[Tally]) -> dict:
    """Facts about the written file, ready for JSON."""
    noise = sum(tally.noise for tally in tallies)
    whole = Tally("", (), 0, 0, 0, sum(tally.signal for tally in tallies), noise)
    return {
        "source": str(layout.path),
        "output": str(output),
        **asdict(options),
        "bytes_before": sum(file.stat().st_size for file in layout.files),
        "bytes_after": output.stat().st_size,
        "quantized": len(tallies),
        "snr_db": whole.snr_db,
        "verified": False,
        "tensors": [
            {
                "name": tally.name,
                "shape": tally.shape,
                "bytes_before": tally.bytes_before,
                "bytes_after": tally.bytes_after,
                "convrot_groupsize": tally.convrot_groupsize,
                "snr_db": tally.snr_db,
            }
            for tally in tallies
        ],
    }


def table(facts: dict, worst: int = 10) -> str:
    """The report as lines for people: totals and the tensors that lost most."""

    def decibels(value: float | None) -> str:
        return "exact" if value is None else f"{value:.1f} dB"

    tensors = sorted(
        facts["tensors"],
        key=lambda tensor: math.inf if tensor["snr_db"] is None else tensor["snr_db"],
    )[:worst]
    width = max(len(tensor["name"]) for tensor in tensors)
    return "\n".join(
        [
            f"{facts['output']}: {facts['format']}, {facts['granularity']}, preset"
            f" {facts['preset']}" + (", verified" if facts["verified"] else ""),
            (
                f"  {readable_bytes(facts['bytes_before'])} became"
                f" {readable_bytes(facts['bytes_after'])}; {facts['quantized']} tensors quantized,"
                f" signal to noise {decibels(facts['snr_db'])}"
            ),
            f"  the {len(tensors)} that lost most:",
            *(
                f"    {tensor['name']:{width}}  {decibels(tensor['snr_db']):>8} "
                f" {' x '.join(map(str, tensor['shape']))}"
                for tensor in tensors
            ),
        ]
    )


def save_report(facts: dict, file: Path) -> None:
    """Write the report as JSON, atomically."""
    with atomic_write(file) as stream:
        stream.write((json.dumps(facts, indent=1) + "\n").encode())
