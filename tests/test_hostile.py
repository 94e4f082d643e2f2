"""Headers that are broken, or made to harm: each is rejected in words or read, quickly and in
little memory."""

import json
import random
import resource
import struct
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from comfyui_l2p.l2p_core import CheckpointError, read_layout
from comfyui_l2p.l2p_core.files.describe import describe
from comfyui_l2p.quant import convert, export, merge, quantize
from helpers import comfyui_naming, int8

CASES = 10_000
JUNK = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**400,
    -(10**18),
    1.5,
    float("nan"),
    float("inf"),
    "",
    "F32",
    "I8",
    "\0",
    "ü" * 70,
    [],
    [[]],
    [0],
    [2**62, 2**62],
    [-1],
    [0, 2**40],
    {},
    {"a": 1},
]
NAMES = [
    "layers.0.attention.to_q.weight",
    "layers.99999999999.attention.to_q.weight",
    f"layers.{'9' * 5000}.a",
    "layers.٣.a",
    "__metadata__",
    "x_pad_token",
    "all_x_embedder.999999999999-1.weight",
    "all_x_embedder.0-1.weight",
    "x_embedder.weight",
    "layers.0.attention.qkv.weight",
    "layers.0.attention.to_q.weight_scale",
    "layers.0.attention.to_q.comfy_quant",
    "local_decoder.enc_8k.0.weight",
    "",
    ".",
    "a" * 3000,
    "\ud800",
]


def junk(rng: random.Random) -> object:
    """One of them, that a later case may change without changing it for others."""
    return deepcopy(rng.choice(JUNK))


def header_of(path: Path) -> tuple[dict, int]:
    """The table of a whole file and the bytes of its tensors."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), len(content) - 8 - length


def write_broken(path: Path, table: dict, size: int, rng: random.Random) -> None:
    """That file, its tensors zeros that take no room, with one to three things wrong: in the table,
    in its JSON, in the length, at the end."""
    table = json.loads(json.dumps(table))
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([key for key in table if isinstance(table[key], dict)])
        match rng.randrange(7):
            case 0:
                table[key][rng.choice(["dtype", "shape", "data_offsets", "other"])] = junk(rng)
            case 1:
                table[key]["data_offsets"] = [
                    rng.choice([0, 1, 8, size, 2**40]),
                    rng.choice([0, 1, 8, size, 2**40]),
                ]
            case 2:
                table[rng.choice(NAMES)] = table.pop(key)
            case 3:
                table[key] = junk(rng)
            case 4:
                table["__metadata__"] = deepcopy(
                    rng.choice(
                        [
                            *JUNK,
                            {
                                "modelspec.resolution": rng.choice(
                                    ["0x0", "9" * 5000 + "x1", "²x²", "-1x-1", "x"]
                                )
                            },
                            {
                                "_quantization_metadata": rng.choice(
                                    ["{}", "[" * 9999, "null", '{"layers": {"a": [1]}}', "NaN"]
                                )
                            },
                            {
                                "_quantization_metadata": json.dumps(
                                    {
                                        "layers": {
                                            key.removesuffix(".weight"): rng.choice(
                                                [
                                                    {},
                                                    {"format": []},
                                                    {
                                                        "format": "int8_tensorwise",
                                                        "convrot": 1,
                                                        "convrot_groupsize": junk(rng),
                                                    },
                                                    {"format": "int8_tensorwise", "params": 3},
                                                ]
                                            )
                                        }
                                    }
                                )
                            },
                        ]
                    )
                )
            case 5:
                table[rng.choice(NAMES)] = {
                    "dtype": rng.choice(["F32", "I8", "U8", "C64", "F4"]),
                    "shape": rng.choice([[], [0], [3, 0], [0] * 9]),
                    "data_offsets": [size, size],
                }
            case 6:
                if isinstance(table[key], dict) and isinstance(table[key].get("shape"), list):
                    table[key]["shape"] = table[key]["shape"][::-1] + rng.choice(
                        [[], [1], [1] * 60, [2**50]]
                    )
        if not any(isinstance(value, dict) for value in table.values()):
            break
    encoded = json.dumps(table).encode()
    match rng.randrange(12):
        case 0:
            at = rng.randrange(len(encoded))
            encoded = encoded[:at] + bytes([rng.randrange(256)]) + encoded[at + 1 :]
        case 1:
            encoded = encoded[: rng.randrange(len(encoded))]
        case 2:
            encoded = rng.choice(
                [b"[" * 100_000, b"", b"null", b"[]", b'{"a":' * 5000, b"\xff\xfe", b"9" * 10_000]
            )
        case 3:
            encoded = encoded.replace(b"x_pad_token", b"cap_pad_token")
    length = rng.choice(
        [len(encoded)] * 24 + [0, max(0, len(encoded) - 1), len(encoded) + 1, 2**63, 2**64 - 1]
    )
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", length) + encoded)
        stream.truncate(8 + len(encoded) + rng.choice([size] * 12 + [0, size - 1]))


def use(path: Path, whole) -> None:
    """All that a tool does with a file before it reads a tensor. Any error but CheckpointError is a
    fault."""
    describe(path)
    layout = read_layout(path)
    for plan in (
        lambda: quantize.plan(layout, quantize.Options(), []),
        lambda: convert.plan(layout, 64, 0),
        lambda: merge.fitting(layout, whole, []),
        lambda: export.arrange(layout.tensors, "comfyui"),
        lambda: layout.trained_size,
    ):
        try:
            plan()
        except CheckpointError:
            pass


@pytest.fixture
def whole(write, tiny_weights):
    return read_layout(write(tiny_weights))


@pytest.mark.slow
def test_no_broken_header_does_harm(whole, tiny_weights, write, tmp_path):
    """Seeds 0..9999, of a model and of an INT8 model with its markers in the metadata. A failure
    names its seed."""
    tensors, metadata = int8(
        comfyui_naming(tiny_weights), "model.diffusion_model.", marked="metadata", convrot=16
    )
    sources = [header_of(whole.path), header_of(write(tensors, "int8.safetensors", metadata))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path, rejected = tmp_path / "hostile.safetensors", 0
    for seed in range(CASES):
        write_broken(path, *sources[seed % 2], random.Random(seed))
        try:
            use(path, whole)
        except CheckpointError as error:
            rejected += 1
            assert len(str(error)) < 2000, f"seed {seed}"
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
    assert 0.5 < rejected / CASES < 0.98, "the cases no longer reach all checks"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"


# Small files that ask for much


def empty(names, size, shape=(0,)):
    return {
        name: {"dtype": "F32", "shape": list(shape), "data_offsets": [size, size]} for name in names
    }


def put(path, table, size):
    """A file of that table, given as a dict or as bytes, its tensors zeros that take no room."""
    encoded = table if isinstance(table, bytes) else json.dumps(table).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + size)
    return path


MEASURED = """
import resource, sys, time
from pathlib import Path
from comfyui_l2p.l2p_core import CheckpointError, load_model, read_layout
from comfyui_l2p.l2p_core.files.describe import describe
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
describe(Path(sys.argv[2]))  # whole: what reading takes at all
before, began = peak(), time.process_time()
try:
    print(describe(Path(sys.argv[1]))["advice"])
    load_model(sys.argv[1])
except CheckpointError as error:
    print(error)
print(peak() - before, time.process_time() - began)
"""

GREEDY = {
    "10,000 main layers": lambda size: empty(
        (f"layers.{number}.x" for number in range(4, 10_000)), size
    ),
    "150,000 layers": lambda size: empty(
        (f"layers.{number}.x" for number in range(4, 150_000)), size
    ),
    "10,000 refiner layers": lambda size: empty(
        (f"noise_refiner.{number}.x" for number in range(1, 10_000)), size
    ),
    "many decoder levels": lambda size: empty(
        (f"local_decoder.enc{number}.0.weight" for number in range(19_000)), size, (0, 0)
    ),
    "a wide one": lambda size: empty(["layers.0.feed_forward.w1.weight"], size, (2**40, 0)),
    "tensors of 8 dimensions": lambda size: empty(
        (f"layers.0.x{number}" for number in range(18_000)), size, [2**40] * 7 + [0]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", GREEDY)
def test_a_small_header_takes_little_memory_and_time(write, tiny_weights, tmp_path, what):
    source = write(tiny_weights)
    table, size = header_of(source)
    greedy = put(tmp_path / "greedy.safetensors", table | GREEDY[what](size), size)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(greedy), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    *said, measured = done.stdout.splitlines()
    megabytes, seconds = map(float, measured.split())
    assert said and done.returncode == 0, done.stderr
    assert megabytes < 150, "before, a gigabyte"
    assert seconds < 20, "CPU; before, minutes"


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
        b"{" + b",".join(b'"%d":{}' % number for number in range(700_000)) + b"}",
        b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b"{"
        + b",".join(
            b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % number
            for number in range(20_001)
        )
        + b"}",
    ],
    ids=["lists", "objects", "nested", "tensors"],
)
def test_a_header_of_more_than_any_models_is_rejected(tmp_path, header):
    with pytest.raises(CheckpointError, match="holds more than any model's|names 20,001 tensors"):
        read_layout(put(tmp_path / "greedy.safetensors", header, 0))


@pytest.mark.parametrize(
    "key, shape",
    [
        ("all_x_embedder.16-1.weight", [0, 768]),
        ("layers.0.feed_forward.w1.weight", [0, 64]),
        ("layers.0.feed_forward.w1.weight", [2**40, 0]),
        ("cap_embedder.1.weight", [0, 2**40]),
        ("cap_embedder.1.weight", [0]),
        ("t_embedder.mlp.0.weight", [2**47, 0]),
        ("local_decoder.bottleneck.0.weight", [0, 1, 1, 1]),
        ("layers.0.attention.norm_q.weight", [0]),
        ("local_decoder.enc1.0.weight", [0, 3, 3, 3]),
    ],
)
def test_a_width_of_nothing_or_too_much_is_rejected_before_it_is_built(
    write, tiny_weights, tmp_path, monkeypatch, key, shape
):
    table, size = header_of(write(tiny_weights))
    assert key in table
    old = table.pop(key)
    path = put(
        tmp_path / "odd.safetensors",
        {**table, "layers.0.spare": old, **empty([key], size, shape)},
        size,
    )
    monkeypatch.setattr(
        "comfyui_l2p.l2p_core.files.load.L2PTransformer", lambda *_: pytest.fail("it was built")
    )
    layout = read_layout(path)
    with pytest.raises(
        CheckpointError,
        match=(
            "does not fit an L2P model: .*expected 1 to 131072|does not fit an L2P model: a"
            " tensor|numbers"
        ),
    ):
        layout.config


@pytest.mark.parametrize(
    "marker",
    [
        torch.tensor(2**31),
        torch.tensor([2**31]),
        torch.tensor([b"2147483648"[0]] * 3, dtype=torch.uint8),
        torch.empty(0, dtype=torch.uint8),
        torch.tensor(list(b"[2147483648]"), dtype=torch.uint8),
        torch.tensor(list(b"null"), dtype=torch.uint8),
        torch.full((9999,), b"["[0], dtype=torch.uint8),
        torch.full((9999,), b"9"[0], dtype=torch.uint8),
        torch.full((9,), 255, dtype=torch.uint8),
    ],
    ids=[
        "a number",
        "a list of a number",
        "digits",
        "nothing",
        "JSON of a number",
        "null",
        "nested",
        "a long number",
        "no UTF-8",
    ],
)
def test_a_marker_that_is_no_text_is_rejected(write, tiny_weights, marker):
    tensors, _ = int8(comfyui_naming(tiny_weights), marked="tensors")
    key = next(key for key in tensors if key.endswith(".comfy_quant"))
    with pytest.raises(CheckpointError, match="is not the JSON that ComfyUI writes there"):
        read_layout(write({**tensors, key: marker}))


@pytest.mark.parametrize("groupsize", [2**31, 16.0, True, "16", [16], -16, None, 10**400])
def test_a_rotation_in_groups_of_no_size_is_rejected(write, tiny_weights, groupsize):
    tensors, _ = int8(comfyui_naming(tiny_weights), convrot=16)
    layers = {
        key.removesuffix(".weight"): {
            "format": "int8_tensorwise",
            "convrot": True,
            "convrot_groupsize": groupsize,
        }
        for key in tensors
        if f"{key}_scale" in tensors
    }
    path = write(tensors, metadata={"_quantization_metadata": json.dumps({"layers": layers})})
    if groupsize is None:
        assert {source.convrot_groupsize for source in read_layout(path).tensors.values()} <= {
            0,
            None,
        }
    else:
        with pytest.raises(CheckpointError, match="can't be rotated in groups of"):
            read_layout(path)


@pytest.mark.parametrize("resolution", ["99999x99999", "99968x99968", "16400x16400", "0x96", "96"])
def test_a_trained_size_beyond_any_models_is_ignored(write, tiny_weights, resolution):
    layout = read_layout(write(tiny_weights, metadata={"modelspec.resolution": resolution}))
    assert layout.trained_size == (layout.config.nominal_size, layout.config.nominal_size)
