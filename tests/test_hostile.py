"""Headers that are broken, or made to harm: each is refused in words or read, quickly and in little memory."""
import json
import random
import resource
import struct
from pathlib import Path

import pytest

from comfyui_l2p.l2p_core import CheckpointError, inspect, read_layout
from comfyui_l2p.quant import convert, export, merge, quantize

CASES = 1_000
JUNK = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, -(10**18), 1.5, float("nan"), float("inf"), "", "F32", "I8", "\0", "ü" * 70, [], [[]], [0],
        [2**62, 2**62], [-1], [0, 2**40], {}, {"a": 1}]
NAMES = ["layers.0.attention.to_q.weight", "layers.99999999999.attention.to_q.weight", f"layers.{'9' * 5000}.a", "layers.٣.a", "__metadata__",
         "x_pad_token", "all_x_embedder.999999999999-1.weight", "all_x_embedder.0-1.weight", "x_embedder.weight", "layers.0.attention.qkv.weight",
         "layers.0.attention.to_q.weight_scale", "layers.0.attention.to_q.comfy_quant", "local_decoder.enc_8k.0.weight", "", ".", "a" * 3000, "\ud800"]


def header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length, = struct.unpack("<Q", content[:8])
    return json.loads(content[8:8 + length]), content[8 + length:]


def broken_bytes(table: dict, data: bytes, rng: random.Random) -> bytes:
    """That file with one to three things wrong: in the table, in its JSON, in the length, at the end."""
    table = json.loads(json.dumps(table))
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([key for key in table if isinstance(table[key], dict)])
        match rng.randrange(7):
            case 0:
                table[key][rng.choice(["dtype", "shape", "data_offsets", "other"])] = rng.choice(JUNK)
            case 1:
                table[key]["data_offsets"] = [rng.choice([0, 1, 8, len(data), 2**40]), rng.choice([0, 1, 8, len(data), 2**40])]
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
                                            "data_offsets": [len(data), len(data)]}
            case 6:
                if isinstance(table[key], dict) and isinstance(table[key].get("shape"), list):
                    table[key]["shape"] = table[key]["shape"][::-1] + rng.choice([[], [1], [1] * 60, [2**50]])
        if not any(isinstance(value, dict) for value in table.values()):
            break
    encoded = json.dumps(table).encode()
    match rng.randrange(8):
        case 0:
            at = rng.randrange(len(encoded))
            encoded = encoded[:at] + bytes([rng.randrange(256)]) + encoded[at + 1:]
        case 1:
            encoded = encoded[:rng.randrange(len(encoded))]
        case 2:
            encoded = rng.choice([b"[" * 100_000, b"", b"null", b"[]", b'{"a":' * 5000, b"\xff\xfe", b"9" * 10_000])
        case 3:
            encoded = encoded.replace(b"x_pad_token", b"cap_pad_token")
    length = rng.choice([len(encoded)] * 6 + [0, len(encoded) - 1, len(encoded) + 1, 2**63, 2**64 - 1])
    return struct.pack("<Q", length) + encoded + data[:rng.choice([len(data)] * 6 + [0, len(data) - 1])]


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


def test_no_broken_header_does_harm(whole, tiny_weights, tmp_path):
    """Seeds 0..9999; a failure names its seed. The table is the tiny model's, its numbers one byte each, so that cases are quick."""
    rows = {key: {"dtype": "U8", "shape": list(tensor.shape), "data_offsets": [0, 0]} for key, tensor in list(tiny_weights.items())[::3]}
    at = 0
    for row in rows.values():
        row["shape"] = row["shape"][:1]
        row["data_offsets"] = [at, at := at + row["shape"][0] if row["shape"] else at + 1]
    data = bytes(at)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    path = tmp_path / "hostile.safetensors"
    for seed in range(CASES):
        path.write_bytes(broken_bytes(rows, data, random.Random(seed)))
        try:
            use(path, whole)
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 2000, f"seed {seed}"
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    assert refused > CASES / 2, "the cases no longer reach the checks"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"
