"""Checkpoint files as files: which belong together, whether they are whole, and the table of
tensors in their header.

safetensors: 8 bytes of length, a JSON table, the tensors (github.com/huggingface/safetensors,
README, "Format")."""

import hashlib
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from threading import Event
from typing import BinaryIO, NamedTuple

from .content import identify_file, left_by_system

# Bytes per number, by safetensors' dtype names.
DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
# Far above any real model's: the header of the 1K checkpoint takes 60 kB. Parsed, a header takes 30
# times its bytes.
MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 20_000  # the 1K checkpoint has 453, in INT8 three times as many
# of a header: each costs time and memory as it is parsed, whatever it turns out to be
MAX_BRACKETS = 100_000
MAX_DIMENSIONS, MAX_NUMBER = 8, 2**48  # of a shape; of its numbers, and of byte offsets
# Of the end of a file, which an aborted download leaves as zeros. No model's ends in so many.
MAX_ZEROS = 1 << 20
SHARD_NAME = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")


class CheckpointError(ValueError):
    """A file that can't be used, with what it is and what to do about it."""

    def __init__(self, message: str):
        """Names may come from a broken file: of a very long message the middle is left out."""
        super().__init__(
            message if len(message) < 2000 else f"{message[:1000]} ... {message[-800:]}"
        )


class Entry(NamedTuple):
    """One tensor in a file."""

    file: Path
    key: str
    dtype: str  # safetensors' name: F32, BF16, I8, ...
    shape: tuple[int, ...]
    begin: int  # byte offsets in the file
    end: int

    @property
    def count(self) -> int:  # type: ignore[override]  # stands for elements, not tuple.count
        """Number of elements."""
        return math.prod(self.shape)


def find_files(path: Path) -> tuple[list[Path], set[str]]:
    """The .safetensors files of a checkpoint given as a file, an index or a folder, and the keys
    that an index promises.

    Raises CheckpointError where there is none, or not every shard."""
    if path.is_dir():
        indexes, files = (
            sorted(file for file in path.glob(pattern) if not left_by_system(file))
            for pattern in ("*.safetensors.index.json", "*.safetensors")
        )
        shards = [shard for file in files if (shard := SHARD_NAME.search(file.name))]
        if len(indexes) == 1:
            path = indexes[0]
        elif shards and len(shards) == len(files):
            if len(files) < (count := int(shards[0][1])):
                raise CheckpointError(
                    f"{path} holds {len(files)} of the model's {count} shards. Download the rest"
                    " into it"
                )
            return files, set()
        elif len(files) == 1:
            return files, set()
        else:
            raise CheckpointError(
                f"{path} holds {len(files)} .safetensors files and {len(indexes)} shard indexes; "
                "expected one file, or the shards of one model. Name the file itself"
            )
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    if path.suffix != ".json":
        return [path], set()
    try:
        with reading(path) as stream:
            weight_map = json.loads(stream.read(MAX_HEADER_BYTES))["weight_map"]
        files = [path.parent / name for name in sorted(set(weight_map.values()))]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{path.name} is no shard index: it has no weight_map of tensor names to files"
        ) from None
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{path.name} names {len(files)} shards, of which {len(absent)} are missing "
            f"(first: {absent[0]}). Download the rest into {path.parent}"
        )
    return files, set(weight_map)


def stamp(file: Path) -> tuple[int, ...]:
    """What tells that a file was changed or replaced: size, time of the last change, inode."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


@contextmanager
def reading(file: Path) -> Iterator[BufferedReader]:
    """The file, opened. Raises CheckpointError where the system can't read it, now or later."""
    if file.exists() and not file.is_file():  # a FIFO would wait for ever
        raise CheckpointError(f"{file} is no file, so it can't be read. Give the checkpoint's file")
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise CheckpointError(
            f"{file} can't be read ({error.strerror}). Check the disk it is on, or get the file"
            " again"
        ) from None


def hash_files(
    files: list[Path], stop: Event | None = None, between: Callable[[BinaryIO], None] | None = None
) -> str:
    """SHA-256 of a file, or of its shards one after the other. stop: ends it early, with a hash of
    no use. between: called with the file after every block."""
    digest = hashlib.sha256()
    for file in files:
        with reading(file) as stream:
            while not (stop and stop.is_set()) and (block := stream.read(1 << 24)):
                digest.update(block)
                if between:
                    between(stream)
    return digest.hexdigest()


def reject_zeros(file: Path) -> None:
    """Raise CheckpointError where the file, of safetensors, ends in more zeros than any model's and
    does not begin with them: a download that was aborted, padded to its full size."""
    with reading(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= 2 * MAX_ZEROS:
            return
        header = 8 + struct.unpack("<Q", stream.read(8))[0]
        if size - header <= 2 * MAX_ZEROS:
            return
        stream.seek(header)
        begins_with_zeros = not stream.read(MAX_ZEROS).strip(b"\0")
        stream.seek(size - MAX_ZEROS)
        ends_in_zeros = not stream.read(MAX_ZEROS).strip(b"\0")
    if begins_with_zeros or not ends_in_zeros:
        return
    raise CheckpointError(
        f"{file.name} has its full size, but ends in zeros: its download was aborted, or left out"
        " parts. Download the file again"
    )


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by key and metadata of one .safetensors file. Raises CheckpointError where anything
    is inconsistent."""

    def malformed(why: str) -> CheckpointError:
        if found := identify_file(file):
            return CheckpointError(f"{file.name} is {found.name}. {found.advice}")
        return CheckpointError(
            f"{file.name} is not a whole .safetensors file: {why}. Get the file again"
        )

    def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise malformed(
                f"its header names {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} twice"
            )
        return found

    with reading(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length_bytes = stream.read(8)
        if len(length_bytes) < 8:
            raise malformed(f"it has {size} bytes")
        length = struct.unpack("<Q", length_bytes)[0]
        if length > min(MAX_HEADER_BYTES, size - 8):
            if length <= size - 8:
                raise malformed(f"its header takes {length} bytes, more than any model's")
            raise malformed(f"its header should take {length} bytes, the file has {size}")
        encoded = stream.read(length)
        if encoded.count(b"{") + encoded.count(b"[") > MAX_BRACKETS:
            raise malformed("its header holds more than any model's")
        try:
            header = json.loads(encoded, object_pairs_hook=without_duplicates)
        except CheckpointError:
            raise
        except (ValueError, RecursionError):  # not UTF-8, not JSON, numbers of thousands of digits
            raise malformed("its header is not JSON") from None
    if not isinstance(header, dict):
        raise malformed("its header is not a table of tensors")
    if len(header) > MAX_TENSORS:
        raise malformed(
            f"its header names {len(header):,} tensors, and models have at most {MAX_TENSORS:,}"
        )
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise malformed("its metadata is not a table of strings")
    entries = {}
    for key, info in header.items():
        match info:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if len(
                shape
            ) <= MAX_DIMENSIONS and all(
                type(number) is int and 0 <= number <= MAX_NUMBER for number in [*shape, begin, end]
            ):
                pass
            case _:
                raise malformed(f"the header's entry for {key!r} is malformed")
        if dtype not in DTYPE_BYTES:
            raise CheckpointError(
                f"{file.name}: {key} is {dtype}, which this program does not read. Use the BF16 or"
                " INT8 version of the model"
            )
        if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
            raise malformed(f"{key} is {dtype} of shape {shape} but has {end - begin} bytes")
        entries[key] = Entry(file, key, dtype, tuple(shape), 8 + length + begin, 8 + length + end)
    expected = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != expected:
            raise malformed(f"{entry.key} starts at byte {entry.begin}, expected {expected}")
        expected = entry.end
    if expected != size:
        raise malformed(
            f"its tensors end at byte {expected}, the file at {size}"
            + (": the download was cut short" if expected > size else "")
        )
    return entries, metadata
