"""Files written a block at a time: the very bytes wanted, whole or not at all, wherever the writing
stops."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from comfyui_l2p.l2p_core import CheckpointError, read_layout
from comfyui_l2p.l2p_core.files.layout import Source
from comfyui_l2p.quant import stream
from comfyui_l2p.quant.stream import Piece, write
from safetensors import safe_open
from safetensors.torch import load_file


def copies(layout, dtype=None):
    return [
        Piece(key, dtype or entry.dtype, entry.shape, (Source(entry),))
        for key, entry in layout.entries.items()
    ]


def metadata_of(path):
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


@pytest.fixture
def source(
    request, tiny_weights
):  # odd sizes, an empty tensor, every width of numbers, and blocks that do not divide it
    return read_layout(
        request.getfixturevalue("write")(
            {
                "layers.0.a": torch.arange(15.0).reshape(5, 3),
                "b": torch.ones(7, dtype=torch.bfloat16),
                "c": torch.tensor([1, 2, 3], dtype=torch.int8),
                "d": torch.tensor(2.5, dtype=torch.float64),
                "e": torch.empty(0, 4),
                "ünïcode": tiny_weights["x_pad_token"],
            },
            "source.safetensors",
            metadata={
                "modelspec.resolution": "96x96",
                "modelspec.hash_sha256": "0x1",
                "other": "x",
            },
        )
    )


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_what_is_written_is_what_was_read(source, tmp_path, monkeypatch, block):
    monkeypatch.setattr(stream, "BLOCK", block)
    monkeypatch.setattr(stream, "STRIDE", block - 1)  # from all at once to every byte
    output = tmp_path / "out.safetensors"
    write(output, copies(source), [source], "test", {"a": 1}, {"title": "T"})
    there, back = load_file(source.path), load_file(output)
    assert list(there.keys() ^ back.keys()) == []
    assert all(
        torch.equal(there[key], back[key]) and there[key].dtype == back[key].dtype for key in there
    )
    write(tmp_path / "cast.safetensors", copies(source, "F32"), [source], "test", {}, {})
    cast = load_file(tmp_path / "cast.safetensors")
    assert all(torch.equal(there[key].float(), cast[key]) for key in there)


def test_metadata_says_what_made_the_file(source, tmp_path):
    write(
        tmp_path / "out.safetensors", copies(source), [source], "l2p test", {"a": 1}, {"title": "T"}
    )
    metadata = metadata_of(tmp_path / "out.safetensors")
    content = source.path.read_bytes()
    assert json.loads(metadata["l2p.inputs"]) == [
        {
            "name": "source.safetensors",
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    ]
    assert metadata["l2p.made_by"] == "ComfyUI-L2P, l2p test" and json.loads(
        metadata["l2p.options"]
    ) == {"a": 1}
    assert metadata["modelspec.resolution"] == "96x96" and metadata["modelspec.title"] == "T"
    assert metadata["format"] == "pt" and metadata["l2p.format_version"] == "1"
    assert "modelspec.hash_sha256" not in metadata, "it was of the other file's bytes"


def test_the_same_inputs_give_the_same_bytes_also_over_the_input(source, tmp_path):
    write(tmp_path / "a.safetensors", copies(source), [source], "test", {}, {})
    write(source.path, copies(source), [source], "test", {}, {})
    assert source.path.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "source.safetensors"]


@pytest.mark.parametrize(
    "trouble, raised, said",
    [
        (KeyboardInterrupt, KeyboardInterrupt, None),
        (MemoryError, MemoryError, None),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            CheckpointError,
            "is full, so out.safetensors was not written. out.safetensors needs .*Free some space",
        ),
        (
            OSError(errno.EFBIG, "File too large"),
            CheckpointError,
            r"out.safetensors can't be written \(File too large\).*write to another folder",
        ),
    ],
)
def test_a_stopped_run_leaves_the_old_file_and_nothing_else(
    source, tmp_path, trouble, raised, said
):
    def failing():
        yield torch.zeros(1)
        raise trouble

    (tmp_path / "out.safetensors").write_bytes(b"old")
    pieces = [*copies(source), Piece("new", "F32", (2,), failing)]
    with pytest.raises(raised, match=said):
        write(tmp_path / "out.safetensors", pieces, [source], "test", {}, {})
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "source.safetensors"]


def test_a_disk_that_fills_beside_the_writing_is_noticed(source, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream, "put_on_disk", full)
    with pytest.raises(CheckpointError, match="is full, so out.safetensors was not written"):
        write(tmp_path / "out.safetensors", copies(source), [source], "test", {}, {})
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_inputs_are_read_front_to_back(source, tmp_path):
    """Whatever the order in the output; what reads nothing follows its neighbour, as scales follow
    the numbers."""
    entries = sorted(
        (entry for entry in source.entries.values() if entry.count), key=lambda entry: entry.begin
    )
    first, second, third = (
        Piece(name, entry.dtype, entry.shape, (Source(entry),))
        for name, entry in zip("abc", entries)
    )
    numbers = Piece("numbers", third.dtype, third.shape, lambda: [], third.sources)
    scale = Piece("scale", "F32", (1,), lambda: [torch.zeros(1)])
    steps = stream.reading_order([numbers, scale, second, first], source.files)
    assert [piece for piece, _ in steps] == [first, second, numbers, scale]
    spans = [(entry.begin, entry.end) for entry in entries[:3]]
    assert [wanted[source.path] for _, wanted in steps] == [*spans, stream.NOTHING]


def test_work_on_all_cores_keeps_its_order():
    """The first takes longest. What is under way is bounded: the source is not read to its end
    first."""
    taken = []

    def numbers():
        for number in range(100):
            taken.append(number)
            yield number

    def work(number):
        time.sleep(0.05 if number == 0 else 0)
        return number, len(taken)

    done = list(stream.on_all_cores(work, numbers()))
    assert [number for number, _ in done] == list(range(100))
    assert done[0][1] < 100


PROGRAM = """
import sys, time, torch
from comfyui_l2p.quant.stream import Piece, write
from comfyui_l2p.l2p_core import read_layout
layout = read_layout(sys.argv[1])
def write_all(output, blocks):
    write(output, [Piece("a", "F32", (2,), blocks)], [layout], "test", {}, {})
"""


def start(program, *arguments):
    """That program after the common beginning, once it has said that it is under way."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + program, *map(str, arguments)], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"under way\n"
    return process


STUCK = """
def stuck():
    yield torch.zeros(1)
    print("under way", flush=True)
    time.sleep(600)
write_all(sys.argv[2], stuck)
"""


@pytest.mark.slow
def test_what_a_killed_run_left_is_cleared_by_the_next_in_that_folder(source, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"old")
    running = start(STUCK, source.path, output)
    running.kill()
    running.wait()
    assert output.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 4, "a temporary file, a lock, the old file and the source"
    write(tmp_path / "other.safetensors", copies(source), [source], "test", {}, {})
    assert sorted(os.listdir(tmp_path)) == [
        "other.safetensors",
        "out.safetensors",
        "source.safetensors",
    ]


@pytest.mark.slow
def test_two_runs_do_not_write_one_file(source, tmp_path):
    output = tmp_path / "out.safetensors"
    running = start(STUCK, source.path, output)
    try:
        with pytest.raises(
            CheckpointError, match="another run is writing .*out.safetensors. Wait for it, or"
        ):
            write(output, copies(source), [source], "test", {}, {})
        write(tmp_path / "other.safetensors", copies(source), [source], "test", {}, {})
        assert len(list(tmp_path.glob(".out.safetensors.*"))) == 2, (
            "the other run's file and lock are not cleared away"
        )
    finally:
        running.kill()
        running.wait()


@pytest.mark.slow
def test_killed_at_any_moment_the_old_file_or_the_new_one_is_whole(source, tmp_path):
    """A program that writes one of two contents over the other without pause, killed five times."""
    output = tmp_path / "out.safetensors"
    seen = set()
    for delay in (0.001, 0.013, 0.05, 0.11, 0.17):
        running = start(
            """
print("under way", flush=True)
while True:
    for number in (1.0, 2.0):
        write_all(sys.argv[2], lambda: [torch.tensor([number]), torch.tensor([number])])
""",
            source.path,
            output,
        )
        time.sleep(delay)
        running.kill()
        running.wait()
        if output.exists():
            first, second = load_file(output)["a"].tolist()
            assert first == second
            seen.add(first)
    assert seen, "it was never left to finish one"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda path: os.utime(path, (1, 1)), "changed while it was read"),
        (lambda path: path.unlink(), r"can't be read \(No such file|changed while"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-9]),
            "was cut short while it was read|changed while it was read",
        ),
    ],
)
def test_a_source_that_changes_is_noticed(source, tmp_path, change, said):
    def changes():
        change(source.path)
        yield torch.zeros(1)

    pieces = [Piece("new", "F32", (1,), changes), *copies(source)]
    with pytest.raises(CheckpointError, match=said):
        write(tmp_path / "out.safetensors", pieces, [source], "test", {}, {})
    assert not [name for name in os.listdir(tmp_path) if "out" in name]


def test_no_place_to_write_is_named_before_writing(source, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="nowhere is no folder.*mkdir -p"):
        write(tmp_path / "nowhere" / "out.safetensors", copies(source), [source], "test", {}, {})
    with pytest.raises(CheckpointError, match="expected a name that ends in .safetensors"):
        write(tmp_path / "out.bin", copies(source), [source], "test", {}, {})
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder; give the name of a file"):
        write(tmp_path / "folder.safetensors", copies(source), [source], "test", {}, {})
    with pytest.raises(
        CheckpointError, match=r"takes 4000000.00 GB, but .* has .* GB free. Free .* GB there"
    ):
        write(
            tmp_path / "out.safetensors",
            [Piece("a", "F32", (10**15,), list)],
            [source],
            "test",
            {},
            {},
        )

    def read_only(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(stream.os, "open", read_only)
    with pytest.raises(CheckpointError, match=r"can't be written \(Permission denied\)"):
        write(tmp_path / "out.safetensors", copies(source), [source], "test", {}, {})
    assert sorted(os.listdir(tmp_path)) == ["folder.safetensors", "source.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that opens but can't be read")
def test_a_disk_that_fails_is_named(source, tmp_path):
    broken = [
        Source(entry._replace(file=Path("/proc/self/mem")))
        for entry in source.entries.values()
        if entry.key == "b"
    ]
    pieces = [*copies(source), Piece("broken", "BF16", (7,), tuple(broken))]
    with pytest.raises(
        CheckpointError,
        match=r"/proc/self/mem can't be read \(Input/output error\). Check the disk",
    ):
        write(tmp_path / "out.safetensors", pieces, [source], "test", {}, {})
    assert os.listdir(tmp_path) == ["source.safetensors"]


def test_casting_rejects_what_does_not_fit(write, tmp_path):
    layout = read_layout(write({"a": torch.tensor([1e5])}))
    with pytest.raises(
        CheckpointError, match="a holds NaN or infinite numbers as F16.*or take bf16"
    ):
        stream.write(tmp_path / "out.safetensors", copies(layout, "F16"), [layout], "test", {}, {})
