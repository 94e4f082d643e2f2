"""Headers that are broken, or made to harm: each is refused in words or read, quickly and in little memory."""
import json
import random
import resource
import struct
from pathlib import Path

import pytest

from comfyui_l2p.l2p_core import CheckpointError, inspect, read_layout
from comfyui_l2p.quant import convert, export, merge, quantize

from helpers import comfyui_naming, int8

CASES = 10_000
JUNK = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, -(10**18), 1.5, float("nan"), float("inf"), "", "F32", "I8", "\0", "ü" * 70, [], [[]], [0],
        [2**62, 2**62], [-1], [0, 2**40], {}, {"a": 1}]
NAMES = ["layers.0.attention.to_q.weight", "layers.99999999999.attention.to_q.weight", f"layers.{'9' * 5000}.a", "layers.٣.a", "__metadata__",
         "x_pad_token", "all_x_embedder.999999999999-1.weight", "all_x_embedder.0-1.weight", "x_embedder.weight", "layers.0.attention.qkv.weight",
         "layers.0.attention.to_q.weight_scale", "layers.0.attention.to_q.comfy_quant", "local_decoder.enc_8k.0.weight", "", ".", "a" * 3000, "\ud800"]


def header_of(path: Path) -> tuple[dict, int]:
    """The table of a whole file and the bytes of its tensors."""
    content = path.read_bytes()
    length, = struct.unpack("<Q", content[:8])
    return json.loads(content[8:8 + length]), len(content) - 8 - length


def write_broken(path: Path, table: dict, size: int, rng: random.Random) -> None:
    """That file, its tensors zeros that take no room, with one to three things wrong: in the table, in its JSON, in the
    length, at the end."""
    table = json.loads(json.dumps(table))
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([key for key in table if isinstance(table[key], dict)])
        match rng.randrange(7):
            case 0:
                table[key][rng.choice(["dtype", "shape", "data_offsets", "other"])] = rng.choice(JUNK)
            case 1:
                table[key]["data_offsets"] = [rng.choice([0, 1, 8, size, 2**40]), rng.choice([0, 1, 8, size, 2**40])]
            case 2:
                table[rng.choice(NAMES)] = table.pop(key)
            case 3:
                table[key] = rng.choice(JUNK)
            case 4:
                table["__metadata__"] = rng.choice([*JUNK, {"modelspec.resolution": rng.choice(["0x0", "9" * 5000 + "x1", "²x²", "-1x-1", "x"])},
                                                    {"_quantization_metadata": rng.choice(["{}", "[" * 9999, "null", '{"layers": {"a": [1]}}', "NaN"])},
                                                    {"_quantization_metadata": json.dumps({"layers": {key.removesuffix(".weight"): rng.choice([
                                                        {}, {"format": []}, {"format": "int8_tensorwise", "convrot": 1, "convrot_groupsize": rng.choice(JUNK)},
                                                        {"format": "int8_tensorwise", "params": 3}])}})}])
            case 5:
                table[rng.choice(NAMES)] = {"dtype": rng.choice(["F32", "I8", "U8", "C64", "F4"]), "shape": rng.choice([[], [0], [3, 0], [0] * 9]),
                                            "data_offsets": [size, size]}
            case 6:
                if isinstance(table[key], dict) and isinstance(table[key].get("shape"), list):
                    table[key]["shape"] = table[key]["shape"][::-1] + rng.choice([[], [1], [1] * 60, [2**50]])
        if not any(isinstance(value, dict) for value in table.values()):
            break
    encoded = json.dumps(table).encode()
    match rng.randrange(12):
        case 0:
            at = rng.randrange(len(encoded))
            encoded = encoded[:at] + bytes([rng.randrange(256)]) + encoded[at + 1:]
        case 1:
            encoded = encoded[:rng.randrange(len(encoded))]
        case 2:
            encoded = rng.choice([b"[" * 100_000, b"", b"null", b"[]", b'{"a":' * 5000, b"\xff\xfe", b"9" * 10_000])
        case 3:
            encoded = encoded.replace(b"x_pad_token", b"cap_pad_token")
    length = rng.choice([len(encoded)] * 24 + [0, max(0, len(encoded) - 1), len(encoded) + 1, 2**63, 2**64 - 1])
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", length) + encoded)
        stream.truncate(8 + len(encoded) + rng.choice([size] * 12 + [0, size - 1]))


def use(path: Path, whole) -> None:
    """All that a tool does with a file before it reads a tensor. Any error but CheckpointError is a fault."""
    inspect.describe(path)
    layout = read_layout(path)
    for plan in (lambda: quantize.plan(layout, quantize.Options(), []), lambda: convert.plan(layout, 64, 0),
                 lambda: merge.fitting(layout, whole, []), lambda: export.arrange(layout.tensors, "comfyui"),
                 lambda: layout.trained_size):
        try:
            plan()
        except CheckpointError:
            pass


@pytest.fixture
def whole(write, tiny_weights):
    return read_layout(write(tiny_weights))


def test_no_broken_header_does_harm(whole, tiny_weights, write, tmp_path):
    """Seeds 0..9999, of a model and of an INT8 model with its markers in the metadata. A failure names its seed."""
    tensors, metadata = int8(comfyui_naming(tiny_weights), "model.diffusion_model.", marked="metadata", convrot=16)
    sources = [header_of(whole.path), header_of(write(tensors, "int8.safetensors", metadata))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path, refused = tmp_path / "hostile.safetensors", 0
    for seed in range(CASES):
        write_broken(path, *sources[seed % 2], random.Random(seed))
        try:
            use(path, whole)
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 2000, f"seed {seed}"
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    assert 0.5 < refused / CASES < 0.98, "the cases no longer reach all checks"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"
