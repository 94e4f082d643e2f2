"""Files written a block at a time: the very bytes wanted, whole or not at all, wherever the writing stops."""
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from comfyui_l2p.l2p_core import CheckpointError, read_layout
from comfyui_l2p.l2p_core.layout import Source
from comfyui_l2p.quant import stream
from comfyui_l2p.quant.stream import Piece, check_place, write


def copies(layout, dtype=None):
    return [Piece(key, dtype or entry.dtype, entry.shape, (Source(entry),)) for key, entry in layout.entries.items()]


def metadata_of(path):
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


@pytest.fixture
def source(request, tiny_weights):  # odd sizes, an empty tensor, every width of numbers, and blocks that do not divide it
    return read_layout(request.getfixturevalue("write")({"layers.0.a": torch.arange(15.0).reshape(5, 3), "b": torch.ones(7, dtype=torch.bfloat16),
                              "c": torch.tensor([1, 2, 3], dtype=torch.int8), "d": torch.tensor(2.5, dtype=torch.float64),
                              "e": torch.empty(0, 4), "ünïcode": tiny_weights["x_pad_token"]}, "source.safetensors",
                             metadata={"modelspec.resolution": "96x96", "modelspec.hash_sha256": "0x1", "other": "x"}))


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_what_is_written_is_what_was_read(source, tmp_path, monkeypatch, block):
    monkeypatch.setattr(stream, "BLOCK", block)
    output = tmp_path / "out.safetensors"
    write(output, copies(source), [source], "test", {"a": 1}, {"title": "T"})
    there, back = load_file(source.path), load_file(output)
    assert list(there.keys() ^ back.keys()) == []
    assert all(torch.equal(there[key], back[key]) and there[key].dtype == back[key].dtype for key in there)
    write(tmp_path / "cast.safetensors", copies(source, "F32"), [source], "test", {}, {})
    cast = load_file(tmp_path / "cast.safetensors")
    assert all(torch.equal(there[key].float(), cast[key]) for key in there)


def test_metadata_says_what_made_the_file(source, tmp_path):
    write(tmp_path / "out.safetensors", copies(source), [source], "l2p test", {"a": 1}, {"title": "T"})
    metadata = metadata_of(tmp_path / "out.safetensors")
    content = source.path.read_bytes()
    assert json.loads(metadata["l2p.inputs"]) == [
        {"name": "source.safetensors", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}]
    assert metadata["l2p.made_by"] == "ComfyUI-L2P, l2p test" and json.loads(metadata["l2p.options"]) == {"a": 1}
    assert metadata["modelspec.resolution"] == "96x96" and metadata["modelspec.title"] == "T"
    assert metadata["format"] == "pt" and metadata["l2p.format_version"] == "1"
    assert "modelspec.hash_sha256" not in metadata, "it was of the other file's bytes"


def test_the_same_inputs_give_the_same_bytes_also_over_the_input(source, tmp_path):
    write(tmp_path / "a.safetensors", copies(source), [source], "test", {}, {})
    write(source.path, copies(source), [source], "test", {}, {})
    assert source.path.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "source.safetensors"]


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, MemoryError, OSError(28, "No space left on device")])
def test_a_stopped_run_leaves_the_old_file_and_nothing_else(source, tmp_path, trouble):
    def failing():
        yield torch.zeros(1)
        raise trouble
    (tmp_path / "out.safetensors").write_bytes(b"old")
    pieces = [*copies(source), Piece("new", "F32", (2,), failing)]
    with pytest.raises(CheckpointError if isinstance(trouble, OSError) else trouble,
                       match="is full: .*Make room" if isinstance(trouble, OSError) else None):
        write(tmp_path / "out.safetensors", pieces, [source], "test", {}, {})
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "source.safetensors"]


def test_a_killed_run_leaves_what_the_next_one_clears(source, tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"old")
    program = f"""
import os, signal, torch
from comfyui_l2p.quant.stream import Piece, write
from comfyui_l2p.l2p_core import read_layout
def dies():
    yield torch.zeros(1)
    os.kill(os.getpid(), signal.SIGKILL)
write({str(tmp_path / "out.safetensors")!r}, [Piece("a", "F32", (2,), dies)], [read_layout({str(source.path)!r})], "test", {{}}, {{}})
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert (tmp_path / "out.safetensors").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == [".out.safetensors.part", "out.safetensors", "source.safetensors"]
    write(tmp_path / "out.safetensors", copies(source), [source], "test", {}, {})
    assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "source.safetensors"]


@pytest.mark.parametrize("change, said", [
    (lambda path: os.utime(path, (1, 1)), "changed while it was read"),
    (lambda path: path.unlink(), "No such file|changed while"),
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), "was cut short while it was read|changed while it was read"),
])
def test_a_source_that_changes_is_noticed(source, tmp_path, change, said):
    def changes():
        change(source.path)
        yield torch.zeros(1)
    pieces = [Piece("new", "F32", (1,), changes), *copies(source)]
    with pytest.raises((CheckpointError, FileNotFoundError), match=said):
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
    with pytest.raises(CheckpointError, match=r"takes 1000000.00 GB, but .* has .* GB free. Free .* GB there"):
        check_place(tmp_path / "out.safetensors", tmp_path / ".part", 10**15)

    def read_only(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(type(tmp_path), "touch", read_only)
    with pytest.raises(CheckpointError, match=r"can't be written to \(Permission denied\)"):
        write(tmp_path / "out.safetensors", copies(source), [source], "test", {}, {})
    assert sorted(os.listdir(tmp_path)) == ["folder.safetensors", "source.safetensors"]


def test_casting_refuses_what_does_not_fit(write, tmp_path):
    layout = read_layout(write({"a": torch.tensor([1e5])}))
    with pytest.raises(CheckpointError, match="a holds NaN or infinite numbers as F16.*or take bf16"):
        stream.write(tmp_path / "out.safetensors", copies(layout, "F16"), [layout], "test", {}, {})
