"""A safetensors file written from a plan, a block of rows at a time, atomically
(l2p_core/files/atomic.py).

A plan is a list of pieces, one for each tensor; nothing is read before `write`. The output may be
one of the inputs, and one run at a time writes it. Sources are read, not mapped: a mapped file that
shrinks would end the program.

At full size the disk and the system's cache set the pace. So inputs are read front to back, the
hashing of each just ahead of its tensors, what is written goes to the disk as it comes, and the
cache is given back once both have passed: filling gigabytes of it takes longer than reading them
(docs/measurements.md, "File tools")."""

import json
import math
import os
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import BinaryIO, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ..l2p_core.files.atomic import WriteError, atomic_write, locked
from ..l2p_core.files.header import DTYPE_BYTES, CheckpointError, hash_files, reading, stamp
from ..l2p_core.files.layout import Layout, Source, defaults_metadata
from ..l2p_core.files.quantization import FORMATS, dequantize
from ..l2p_core.prefetch import ahead

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    TORCH_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
BLOCK = 1 << 18  # numbers in memory at a time: 1 MB as float32, which stays in a core's cache
STRIDE = (
    1 << 26
)  # bytes that are put on the disk at a time, and that hashing reads ahead of the next tensor
FORMAT_VERSION = "1"  # of the l2p.* metadata below
T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]  # (bytes done, bytes in all); raise from it to stop
PENDING_HASH = (
    "0" * 64
)  # stands in the header until the inputs are hashed, which runs while the file is written


class Piece(NamedTuple):
    """One tensor of the file to be written."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    origin: (
        tuple[Source, ...] | Callable[[], Iterable[Tensor]]
    )  # read below one another, or made in blocks of rows
    read: tuple[Source, ...] = ()  # by what makes it

    @property
    def sources(self) -> tuple[Source, ...]:
        """The tensors that it is made from."""
        return self.read if callable(self.origin) else self.origin

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def write(
    path: Path,
    pieces: list[Piece],
    inputs: list[Layout],
    command: str,
    options: dict[str, object],
    modelspec: dict[str, str],
    progress: bool | Progress = False,
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Write the pieces as one file, laid out in their order, and say in its metadata how it was
    made.

    inputs: what the pieces read; hashed into the metadata. command, options: what makes the file,
    for the metadata. modelspec: fields beside those of the first input; an empty value drops one.
    progress: show a bar, or call this. defaults: settings to generate with, by default those of the
    first input. Raises ValueError, with nothing left behind, where there is
    no place to write or a source changed meanwhile."""
    path = Path(path)
    files = [(file, before) for layout in inputs for file, before in layout.stamps.items()]
    metadata = {
        "format": "pt",
        "l2p.format_version": FORMAT_VERSION,
        "l2p.made_by": f"ComfyUI-L2P, {command}",
        "l2p.options": json.dumps(options),
        **next((each.backbone.metadata for each in inputs if each.backbone), {}),
        **carried_modelspec(inputs[0], modelspec),
        **defaults_metadata(inputs[0].default_settings if defaults is None else defaults),
    }

    def header(hashes: list[str]) -> bytes:
        facts = [
            {"name": file.name, "bytes": before[0], "sha256": sha256}
            for (file, before), sha256 in zip(files, hashes, strict=True)
        ]
        return encode_header(pieces, {**metadata, "l2p.inputs": json.dumps(facts)})

    head = header([PENDING_HASH] * len(files))
    begins = offsets(pieces)
    total = len(head) + sum(piece.bytes for piece in pieces)
    steps = reading_order(pieces, [file for file, _ in files])
    wanted: dict[Path, Span] = {}  # at the piece that is being written
    stop = Event()

    def hash_beside(file: Path) -> str:
        def keep_step(stream: BinaryIO) -> None:
            give_back(stream, min(stream.tell(), wanted[file][0]))
            while stream.tell() > wanted[file][1] + STRIDE and not stop.wait(0.01):
                pass

        return hash_files([file], stop, keep_step)

    def all_blocks() -> Iterator[tuple[str, memoryview]]:
        for piece, spans in steps:
            wanted.update(spans)
            for block in blocks(piece):
                yield piece.name, block
        wanted.update(dict.fromkeys(wanted, NOTHING))

    with (
        exclusive(path, total) as stream,
        single_threaded(),
        ThreadPoolExecutor(len(files) + 1) as beside,
    ):
        try:
            wanted.update(steps[0][1])
            hashes = [beside.submit(hash_beside, file) for file, _ in files]
            flushed = beside.submit(put_on_disk, stream)
            with tqdm(
                total=total,
                desc=f"writing {path.name}",
                unit="B",
                unit_scale=True,
                disable=progress is not True,
            ) as bar:
                stream.write(head)
                done = flushing = len(head)
                ends = {
                    name: len(head) + begin for name, begin in begins.items()
                }  # of what is written of each tensor
                for name, block in ahead(all_blocks()):
                    stream.seek(ends[name])
                    count = stream.write(block)
                    ends[name] += count
                    done += count
                    bar.update(done - bar.n)
                    if callable(progress):
                        progress(done, total)
                    if done - flushing >= STRIDE:
                        flushed.result()
                        flushed, flushing = beside.submit(put_on_disk, stream), done
                for piece in pieces:
                    assert ends[piece.name] == len(head) + begins[piece.name] + piece.bytes, (
                        piece.name
                    )
                flushed.result()
                final = header([future.result() for future in hashes])
            assert len(final) == len(head)
            stream.seek(0)
            stream.write(final)
            for file, before in files:
                if not file.exists() or stamp(file) != before:
                    raise CheckpointError(
                        f"{file} changed while it was read, so {path.name} was not written. "
                        "Wait until the other program is done, then run this again"
                    )
        finally:
            stop.set()


Span = tuple[int, int]  # where in a file the next tensors to be read begin and end
NOTHING = (sys.maxsize, sys.maxsize)  # where nothing more is to be read


def reading_order(pieces: list[Piece], files: list[Path]) -> list[tuple[Piece, dict[Path, Span]]]:
    """The pieces as their sources lie in the files, those that read nothing behind the one they
    follow, and what is wanted next of every file at each."""
    place, placed = (Path(), 0), []
    for piece in pieces:
        place = min(
            ((source.entry.file, source.entry.begin) for source in piece.sources), default=place
        )
        placed.append((place, piece))
    spans, steps = dict.fromkeys(files, NOTHING), []
    for _, piece in reversed(sorted(placed, key=lambda pair: pair[0])):
        for file in {source.entry.file for source in piece.sources}:
            entries = [source.entry for source in piece.sources if source.entry.file == file]
            spans = spans | {
                file: (min(entry.begin for entry in entries), max(entry.end for entry in entries))
            }
        steps.append((piece, spans))
    return steps[::-1]


def put_on_disk(stream: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    os.fsync(stream.fileno())
    give_back(stream)


def give_back(stream: BinaryIO, end: int = 0) -> None:
    """Take the file's beginning, or all of it, out of the system's cache, as far as it is on the
    disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), 0, end, os.POSIX_FADV_DONTNEED)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Within, each thread computes on one core, since blocks are shared out among threads whole,
    and memory that is free is used again: glibc takes blocks up to the largest it saw freed, at
    most 32 MB, from what it holds (mallopt(3))."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.empty(31 << 20, dtype=torch.uint8)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_all_cores(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """work(item) for each, in their order; a few items are in memory at a time."""
    cores = min(8, os.cpu_count() or 1)  # one thread reads for them
    with ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def exclusive(path: Path, total: int) -> Iterator[BinaryIO]:
    """Open the file that becomes `path` for this run alone. total: bytes it will take.

    Raises CheckpointError where it can't be written or another run is writing it."""
    folder = path.parent
    if path.suffix != ".safetensors":
        raise CheckpointError(f"the output is {path}; expected a name that ends in .safetensors")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder, so {path.name} can't be written there. "
            f"Make it first: mkdir -p {folder}"
        )
    if path.is_dir():
        raise CheckpointError(f"the output {path} is a folder; give the name of a file in it")
    busy = f"another run is writing {path}. Wait for it, or give another output"
    try:
        with locked(path, busy), atomic_write(path, total) as stream:
            yield stream
    except WriteError as error:
        raise CheckpointError(str(error)) from None


def encode_header(pieces: list[Piece], metadata: dict[str, str]) -> bytes:
    """The file's beginning: length, then JSON padded to a multiple of 8 bytes, so that all tensors
    are aligned."""
    begins = offsets(pieces)
    table = {
        piece.name: {
            "dtype": piece.dtype,
            "shape": piece.shape,
            "data_offsets": [begins[piece.name], begins[piece.name] + piece.bytes],
        }
        for piece in sorted(pieces, key=lambda piece: begins[piece.name])
    }
    encoded = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def offsets(pieces: list[Piece]) -> dict[str, int]:
    """Where each tensor begins after the header: wide numbers first, so that each is aligned to its
    own width."""
    begins, begin = {}, 0
    for piece in sorted(pieces, key=lambda piece: -DTYPE_BYTES[piece.dtype]):
        assert piece.name not in begins, piece.name
        begins[piece.name] = begin
        begin += piece.bytes
    return begins


def blocks(piece: Piece) -> Iterator[memoryview]:
    """The piece's bytes: as they lie in the source where its dtype is kept, else cast or multiplied
    out."""
    if callable(piece.origin):
        yield from map(as_bytes, piece.origin())
        return
    for source in piece.origin:
        if source.entry.dtype == piece.dtype:
            yield from map(as_bytes, read_blocks(source, 16))
            continue
        for block in read_floats(source, TORCH_DTYPES[piece.dtype]):
            if not block.isfinite().all():
                raise CheckpointError(
                    f"{source.entry.file.name}: {source.entry.key} holds NaN or infinite numbers as"
                    f" {piece.dtype}. The file is damaged, or its training diverged"
                    + (
                        "; or take bf16, whose range is that of fp32"
                        if piece.dtype == "F16"
                        else ""
                    )
                )
            yield as_bytes(block)


def read_floats(source: Source, dtype: torch.dtype) -> Iterator[Tensor]:
    """Blocks of rows as floating point; quantized tensors are dequantized."""
    if source.format is None:
        yield from (block.to(dtype) for block in read_blocks(source))
    elif FORMATS[source.format].block:  # the order of its scales is not that of the rows
        codes, scale, scale_2 = (
            entry and torch.cat(list(read_blocks(Source(entry))))
            for entry in (source.entry, source.scale, source.scale_2)
        )
        floats = dequantize(source.format, codes, scale, scale_2, 0, torch.float32)
        floats = floats if source.third is None else floats.chunk(3)[source.third]
        yield from floats.to(dtype).split(rows_at_a_time(source.shape))
    else:
        scale, row = read_scale(source), 0
        for block in read_blocks(source):
            rows = scale if len(scale) == 1 else scale[row : row + len(block)]
            row += len(block)
            yield dequantize(
                source.format, block, rows, None, source.convrot_groupsize, torch.float32
            ).to(dtype)


def read_scale(source: Source) -> Tensor:
    """The scales of a quantized tensor whose rows, or all of it, share one: float32, (1,) or
    (rows,)."""
    return torch.cat([block.flatten() for block in read_blocks(scale_source(source))]).float()


def scale_source(source: Source) -> Source:
    """The scales of a quantized tensor as a tensor: of packed q, k and v its third, save where all
    share one number."""
    assert source.scale is not None  # `quantized_source` saw to that
    return Source(source.scale, source.third if source.scale.count > 1 else None)


def read_blocks(source: Source, times: int = 1) -> Iterator[Tensor]:
    """The tensor as it is stored, in blocks of whole rows: (rows, ...). times: so many blocks at
    once, to copy."""
    entry, shape = source.entry, source.stored_shape
    if entry.dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{entry.file.name}: {entry.key} is {entry.dtype}; this program reads "
            f"{', '.join(TORCH_DTYPES)}. Use the BF16 version of the model"
        )
    rows, row_shape = (shape or (1,))[0], shape[1:]
    row_bytes = math.prod(row_shape) * DTYPE_BYTES[entry.dtype]
    step = rows_at_a_time(source.shape) * times
    with reading(entry.file) as stream:
        stream.seek(entry.begin + (source.third or 0) * rows * row_bytes)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            buffer = torch.empty(count * row_bytes, dtype=torch.uint8)
            view, filled = memoryview(buffer.numpy()), 0
            while filled < len(view):
                if not (got := stream.readinto(view[filled:])):
                    raise CheckpointError(
                        f"{entry.file} ended in the middle of {entry.key}: it was cut short while"
                        " it was read. Get the file again"
                    )
                filled += got
            if filled:
                yield buffer.view(TORCH_DTYPES[entry.dtype]).view(count, *row_shape)


def rows_at_a_time(shape: tuple[int, ...]) -> int:
    """How many rows make a block: a multiple of 128, the tiles of block scales, where there is room
    for that."""
    rows = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return rows - rows % 128 if rows > 128 else rows


def as_bytes(block: Tensor) -> memoryview:
    """A tensor's memory."""
    return memoryview(block.contiguous().view(-1).view(torch.uint8).numpy())


def carried_modelspec(first: Layout, changes: dict[str, str]) -> dict[str, str]:
    """The first input's modelspec fields with these changed. What it says of the file's own bytes
    is left out."""
    of_zimage = {
        "architecture": "z-image-l2p",
        "implementation": "https://github.com/TencentYoutuResearch/T2I-L2P",
    }
    of_backbone = {"architecture": f"{first.backbone.name}-l2p"} if first.backbone else of_zimage
    fields = {
        "sai_model_spec": "1.0.1",
        **of_backbone,
        **modelspec(first),
        **changes,
        "hash_sha256": "",
    }
    return {f"modelspec.{key}": value for key, value in fields.items() if value}


def modelspec(layout: Layout) -> dict[str, str]:
    """A file's modelspec fields, without that prefix."""
    return {
        key.removeprefix("modelspec."): value
        for key, value in layout.metadata.items()
        if key.startswith("modelspec.")
    }
