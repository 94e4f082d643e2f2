"""Every known way to store a model loads to the same model; everything else is named for what it
is."""

import json
import random
import re
import struct
from copy import deepcopy

import pytest
import torch
from comfyui_l2p.l2p_core import CheckpointError, load_model, read_layout
from comfyui_l2p.l2p_core.files import quantization
from comfyui_l2p.l2p_core.files.describe import describe, report
from comfyui_l2p.l2p_core.files.header import read_header
from comfyui_l2p.l2p_core.files.quantization import Int8Linear, int8_linear, kernel_runs
from comfyui_l2p.l2p_core.model import Hooks, rope_of_prompt
from golden import recipe
from helpers import GOLDEN, comfyui_naming, int8, rms, scaled_fp8

PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "pipe.dit."]


@pytest.fixture(scope="module")
def arguments():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(1, 3, 64, 48, generator=generator),
        torch.tensor([0.4]),
        [torch.randn(9, 64, generator=generator)],
    )


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def assert_loads_exactly(path, weights):
    """Numbers, not outputs: where a file's tensors lie in memory may change the last bits of a
    product."""
    loaded = load_model(path, dtype=torch.float32).state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def outputs(path, arguments, **options):
    with torch.no_grad():
        return load_model(path, dtype=torch.float32, **options)(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("naming", [dict, comfyui_naming])
def test_any_naming_and_prefix_is_the_same_model(tiny_weights, write, naming, prefix):
    path = write(prefixed(naming(tiny_weights), prefix))
    assert_loads_exactly(path, tiny_weights)
    layout = read_layout(path)
    assert (layout.kind, layout.prefix, layout.naming) == (
        "model",
        prefix,
        "comfyui" if naming is comfyui_naming else "published",
    )


@pytest.mark.parametrize("given", ["index", "folder", "folder without index"])
def test_shards_are_the_same_model(tiny_weights, write, given):
    names = sorted(tiny_weights)
    shards = {f"shards/model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, keys in shards.items():
        path = write({key: tiny_weights[key] for key in keys}, file)
    index = path.parent / "model.safetensors.index.json"
    if given != "folder without index":
        index.write_text(
            json.dumps(
                {
                    "weight_map": {
                        key: file.split("/")[1] for file, keys in shards.items() for key in keys
                    }
                }
            )
        )
    assert_loads_exactly(index if given == "index" else path.parent, tiny_weights)
    with pytest.raises(
        CheckpointError, match="model-00003-of-00003.safetensors is one of 3 shards"
    ):
        load_model(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="1 are missing|holds 2 of the model's 3 shards"):
        load_model(index if given == "index" else path.parent)


def test_an_index_whose_shards_lack_tensors_is_rejected(tiny_weights, write):
    path = write(without(tiny_weights, "layers.3."), "model-00001-of-00001.safetensors")
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {name: path.name for name in tiny_weights}}))
    with pytest.raises(
        CheckpointError, match="names 15 tensors that its shards lack .first: layers.3.adaLN"
    ):
        load_model(index)


def test_mixed_dtypes_become_one(tiny_weights, write):
    mixed = {
        name: tensor if name.startswith("layers.2.") else tensor.bfloat16()
        for name, tensor in tiny_weights.items()
    }
    path = write(mixed)
    assert {tensor.dtype for tensor in load_model(path).state_dict().values()} == {torch.bfloat16}
    whole = {name: tensor.float() for name, tensor in mixed.items()}
    assert_loads_exactly(path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("marked", [None, "tensors", "metadata"])
@pytest.mark.parametrize("granularity", ["tensor", "flat", "row"])
@pytest.mark.parametrize("naming", [dict, comfyui_naming])
def test_int8_stays_int8_and_close(
    tiny_weights, tiny_model, write, arguments, naming, granularity, marked
):
    path = write(
        *reversed_metadata(
            int8(naming(tiny_weights), "model.diffusion_model.", granularity, marked)
        )
    )
    model = load_model(path, dtype=torch.float32)
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 8 * 6 + 2 * 7 and all(
        layer.weight.dtype == torch.int8 for layer in layers
    )
    with torch.no_grad():
        reference = tiny_model(*arguments)
        assert rms(model(*arguments) - reference, reference) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("marked", [None, "tensors", "metadata"])
def test_int8_with_convrot(tiny_weights, tiny_model, write, arguments, marked):
    weights = {name: tensor for name, tensor in comfyui_naming(tiny_weights).items()}
    path = write(*reversed_metadata(int8(weights, marked=marked, convrot=16)))
    with torch.no_grad():
        reference = tiny_model(*arguments)
    told = outputs(path, arguments, **({} if marked else {"convrot_groupsize": 16}))
    assert rms(told - reference, reference) < 0.02
    if not marked:  # the file can't show it; taken for plain INT8 it is another model
        assert rms(outputs(path, arguments) - reference, reference) > 0.1


def test_each_shard_keeps_its_own_markers(tiny_weights, tiny_model, write, arguments):
    """Metadata markers of two INT8 convrot shards, under another prefix than the tensors'."""
    for number in range(2):
        half = {
            name: tensor
            for name, tensor in tiny_weights.items()
            if name.startswith(("layers.0", "layers.1", "noise")) == (number == 0)
        }
        tensors, _ = int8(half, convrot=16)
        _, metadata = int8(half, "model.diffusion_model.", marked="metadata", convrot=16)
        path = write(tensors, f"model-{number + 1:05d}-of-00002.safetensors", metadata)
    with torch.no_grad():
        reference = tiny_model(*arguments)
    assert rms(outputs(path.parent, arguments) - reference, reference) < 0.02


def reversed_metadata(tensors_and_metadata):
    tensors, metadata = tensors_and_metadata
    return tensors, "model.safetensors", metadata


def test_int8_layer_is_the_dequantized_product_within_input_rounding(tiny_weights, write):
    tensors, _ = int8(tiny_weights)
    layer = load_model(write(tensors), dtype=torch.float32).layers[1].feed_forward.w2
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    longhand = (
        x
        @ (
            tensors["layers.1.feed_forward.w2.weight"].float()
            * tensors["layers.1.feed_forward.w2.weight_scale"]
        ).T
    )
    assert rms(layer(x) - longhand, longhand) < 0.01  # inputs are rounded to 8 bits, row by row
    assert layer.to(torch.bfloat16).weight_scale.dtype == torch.float32


def test_a_quantized_convolution_is_dequantized(tiny_weights, tiny_model, write, arguments):
    key = "local_decoder.bottleneck.0.weight"
    scale = tiny_weights[key].abs().amax((1, 2, 3))[:, None] / 127
    quantized = {
        **tiny_weights,
        key: (tiny_weights[key] / scale[..., None, None]).round().to(torch.int8),
        key + "_scale": scale,
    }
    with torch.no_grad():
        reference = tiny_model(*arguments)
    assert (
        rms(outputs(write(quantized), arguments, convrot_groupsize=16) - reference, reference)
        < 0.02
    )


def test_float8_is_dequantized(tiny_weights, tiny_model, write, arguments):
    key = "layers.0.feed_forward.w1.weight"
    scale = tiny_weights[key].abs().max() / 448
    quantized = {
        **tiny_weights,
        key: (tiny_weights[key] / scale).to(torch.float8_e4m3fn),
        key + "_scale": scale,
    }
    with torch.no_grad():
        reference = tiny_model(*arguments)
    assert rms(outputs(write(quantized), arguments) - reference, reference) < 0.02


def of_layers(key, tensor):
    return tensor.dim() == 2 and key.startswith("layers.")


@pytest.mark.parametrize("naming", ["published", "comfyui"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_float8_in_the_older_spelling_is_dequantized(tiny_weights, write, prefix, naming):
    """LAYER.scale_weight, and a tensor scaled_fp8 that marks the file."""
    weights = tiny_weights if naming == "published" else comfyui_naming(tiny_weights)
    scaled, plain = scaled_fp8(weights, of_layers, "scale_weight")
    path = write({prefix + key: tensor for key, tensor in scaled.items()}, "scaled.safetensors")
    expected = load_model(write(plain), dtype=torch.bfloat16).state_dict()
    found = load_model(path, dtype=torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert "float8_e4m3fn" in read_layout(path).quantization and describe(path)["usable"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_without_a_scale_is_simply_cast(tiny_weights, write, dtype):
    cast = {
        name: tensor.to(dtype) if name.startswith("layers.1.feed_forward") else tensor
        for name, tensor in tiny_weights.items()
    }
    assert_loads_exactly(write(cast), {name: tensor.float() for name, tensor in cast.items()})


def test_a_scale_of_inputs_is_left_out(tiny_weights, write):
    """Some FP8 files of ComfyUI's have one for each layer; here inputs are not rounded."""
    key = "layers.0.feed_forward.w1"
    quantized = {
        **tiny_weights,
        f"{key}.weight": (tiny_weights[f"{key}.weight"] / 2).to(torch.float8_e4m3fn),
        f"{key}.weight_scale": torch.tensor(2.0),
        f"{key}.input_scale": torch.tensor(0.5),
    }
    expected = {**tiny_weights, f"{key}.weight": quantized[f"{key}.weight"].float() * 2}
    assert_loads_exactly(write(quantized), expected)


def test_same_dtype_weights_stay_in_the_file(tiny_weights, write):
    path = write(tiny_weights)
    model = load_model(path, dtype=torch.float32)
    mapped = model.layers[0].feed_forward.w1.weight.data_ptr()
    ranges = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith(str(path))]
    assert any(
        int(line[0].split("-")[0], 16) <= mapped < int(line[0].split("-")[1], 16) for line in ranges
    )


# --- what can't be used is named
# -----------------------------------------------------------------------------------


def latent_zimage():
    keys = json.loads((GOLDEN / "zimage_turbo_keys.json").read_text())
    shapes = keys.get("keys", keys)
    return {name: torch.zeros(1, 1) for name in shapes}


def without(weights, *starts):
    return {name: tensor for name, tensor in weights.items() if not name.startswith(starts)}


REJECTED = {
    "trained part": (
        lambda w: without(w, "layers.1.", "layers.2."),
        "lacks main layers 1..2: it is a trained part. Merge .*: l2p merge",
    ),
    "prefixed trained part": (
        lambda w: prefixed(without(w, "layers.1."), "pipe.dit."),
        "it is a trained part. Merge .*: l2p merge",
    ),
    "latent Z-Image": (lambda w: latent_zimage(), "is a latent Z-Image.*Convert it .* l2p convert"),
    "latent Z-Image of ComfyUI": (
        lambda w: prefixed(comfyui_naming(latent_zimage()), "model.diffusion_model."),
        "is a latent Z-Image",
    ),
    "LoRA": (
        lambda w: {"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.zeros(4, 96)},
        "is a LoRA",
    ),
    "text encoder": (
        lambda w: {"model.embed_tokens.weight": torch.zeros(8, 4)},
        "is a text encoder",
    ),
    "another model": (
        lambda w: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4)},
        "is not an L2P model.*double_blocks.0",
    ),
    "nothing": (lambda w: {}, "is not an L2P model: it holds no tensors"),
    "a missing tensor": (
        lambda w: without(w, "layers.1.ffn_norm2."),
        "lacks 1 of the model's 155 tensors.*layers.1.ffn_norm2.weight",
    ),
    "a tensor too many": (
        lambda w: {**w, "layers.1.extra.weight": torch.zeros(2)},
        "1 tensors that an L2P model.*layers.1.extra",
    ),
    "a foreign tensor": (
        lambda w: {**w, "final_layer.weight": torch.zeros(2)},
        "1 tensors that an L2P model.*final_layer.weight",
    ),
    "a wrong shape": (
        lambda w: {**w, "layers.1.ffn_norm2.weight": torch.ones(95)},
        r"layers.1.ffn_norm2.weight is \(95,\), expected \(96,\)",
    ),
    "a wrong embedder": (
        lambda w: {**w, "all_x_embedder.16-1.weight": torch.ones(96, 700)},
        "takes 700 numbers",
    ),
    "NaN": (
        lambda w: {**w, "layers.3.feed_forward.w2.weight": torch.full((96, 256), torch.nan)},
        "layers.3.feed_forward.w2.weight holds NaN",
    ),
    "infinity": (
        lambda w: {**w, "x_pad_token": torch.full((1, 96), torch.inf)},
        "x_pad_token holds NaN or infinite",
    ),
    "INT8 without a scale": (
        lambda w: {**w, "layers.0.feed_forward.w2.weight": torch.ones(96, 256, dtype=torch.int8)},
        "I8 without a weight_scale",
    ),
    "a scale of another shape": (
        lambda w: {**int8(w)[0], "layers.0.feed_forward.w2.weight_scale": torch.ones(7)},
        "expected one number, or one for each of its 96 rows",
    ),
    "a NaN scale": (
        lambda w: {
            **int8(w)[0],
            "layers.0.feed_forward.w2.weight_scale": torch.full((96, 1), torch.nan),
        },
        "weight_scale holds NaN",
    ),
    "an unknown quantization": (
        lambda w: {
            **int8(w)[0],
            "layers.0.feed_forward.w2.comfy_quant": torch.tensor(
                list(b'{"format": "nvfp4"}'), dtype=torch.uint8
            ),
        },
        "quantized as nvfp4",
    ),
    "a decoder is missing": (lambda w: without(w, "local_decoder."), "it is a trained part"),
    "a gap in the refiners": (
        lambda w: {**without(w, "noise_refiner.1."), "noise_refiner.300.x": torch.zeros(0)},
        "it has noise_refiner.300, but not every",
    ),
    "two names for one tensor": (
        lambda w: {**w, "layers.0.attention.qkv.weight": torch.ones(288, 96)},
        "under two names",
    ),
    "a lopsided qkv": (
        lambda w: {**comfyui_naming(w), "layers.0.attention.qkv.weight": torch.ones(289, 96)},
        "expected q, k and v packed",
    ),
    "two models": (
        lambda w: {
            prefix + name: tensor.clone() for prefix in ("a.", "b.") for name, tensor in w.items()
        },
        "there are 2 models in it, under 'a.' and 'b.'",
    ),
    "an embedder's bias alone": (
        lambda w: without(comfyui_naming(w), "x_embedder.weight"),
        "lacks all_x_embedder|lacks",
    ),
    "a convrot of 8": (
        lambda w: (
            int8(w, marked="tensors", convrot=16)[0]
            | {
                "layers.0.feed_forward.w2.comfy_quant": torch.tensor(
                    list(b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 8}'),
                    dtype=torch.uint8,
                )
            }
        ),
        "can't be rotated in groups of 8",
    ),
    "a broken marker": (
        lambda w: {
            **int8(w)[0],
            "layers.0.feed_forward.w2.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8),
        },
        "is not the JSON that ComfyUI writes",
    ),
}


def test_int8_is_multiplied_otherwise_where_the_kernel_does_not_run(monkeypatch):
    """Tried here on a CPU, then on shapes of another device."""
    kernel_runs.cache_clear()
    assert kernel_runs(torch.device("cpu"))

    def refuse(*_, **__):
        raise NotImplementedError("there is no INT8 product on this device")

    monkeypatch.setattr(quantization, "kernel", lambda name: refuse)
    kernel_runs.cache_clear()
    assert not kernel_runs(torch.device("cpu"))
    with torch.device("meta"):
        x, scale = torch.ones(2, 3, 64, dtype=torch.float16), torch.ones(32, 1)
        weight = torch.ones(32, 64, dtype=torch.int8)
        out = int8_linear(x, weight, scale, torch.ones(32), 16)
    kernel_runs.cache_clear()
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 32), torch.float16, "meta")


@pytest.mark.parametrize("groupsize", [0, 16])
def test_int8_layers_with_the_same_input_quantize_it_once(tiny_model, monkeypatch, groupsize):
    """On a CPU: once for q, k and v, once for w1 and w3. The same numbers as one by one."""
    block = deepcopy(tiny_model.layers[0])
    for name, layer in list(block.named_modules()):
        if isinstance(layer, torch.nn.Linear) and "adaLN" not in name:
            numbers = (100 * layer.weight / layer.weight.abs().max()).to(torch.int8)
            block.set_submodule(name, Int8Linear(numbers, torch.ones(1) / 500, None, groupsize))
    rope = rope_of_prompt(32, tiny_model.config.axes_dims, torch.device("cpu"))[None]
    x, calls = torch.randn(1, 32, tiny_model.config.dim), []
    quantize = quantization.quantize_rows
    monkeypatch.setattr(
        quantization, "quantize_rows", lambda *given: calls.append(given) or quantize(*given)
    )

    class OneByOne(Hooks):
        def project(self, x, layers):
            return [layer(x) for layer in layers]

    with torch.no_grad():
        found, count = block(x, rope, None, None), len(calls)
        alone = block(x, rope, None, None, OneByOne())
    assert (count, len(calls) - count) == (4, 7)
    assert torch.equal(found, alone)


def test_threads_that_read_keep_the_order_and_are_given_back(tiny_weights, write):
    """Several threads cast; the first fault of the file is the one that is named."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model = load_model(write(tiny_weights), dtype=torch.bfloat16)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, tiny_weights[name].bfloat16())
        names = [name for name in tiny_weights if name.endswith("w1.weight")]
        spoilt = {**tiny_weights, **{name: tiny_weights[name] * torch.nan for name in names}}
        file = write(spoilt, "spoilt.safetensors")
        first = next(name for name in read_layout(file).tensors if name in names)
        for _ in range(5):
            with pytest.raises(CheckpointError, match=re.escape(f"{first} holds NaN")):
                load_model(file)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_no_whole_model_is_named(tiny_weights, write, case):
    make, said = REJECTED[case]
    path = write(make(tiny_weights))
    with pytest.raises(CheckpointError, match=said):
        load_model(path)
    if (
        "NaN" not in case
        and "infinity" not in case
        and "marker" not in case
        and "scale" not in case
        and "quant" not in case
        and case
        not in (
            "two names for one tensor",
            "a lopsided qkv",
            "two models",
            "a convrot of 8",
        )
    ):
        assert describe(path)["usable"] is False


def test_text_encoder_inside_the_file_is_left_alone(tiny_weights, write):
    path = write(
        {
            **prefixed(tiny_weights, "model.diffusion_model."),
            "text_encoders.qwen3_4b.norm.weight": torch.ones(3),
        }
    )
    assert_loads_exactly(path, tiny_weights)
    assert describe(path)["other_tensors"] == 1


@pytest.fixture
def raw(tmp_path):
    """raw(header, data=b"") → a file with exactly that header, JSON or bytes."""

    def writer(header, data=b"", length=None):
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "raw.safetensors"
        path.write_bytes(
            struct.pack("<Q", len(header) if length is None else length) + header + data
        )
        return path

    return writer


F4 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header, data, length, said",
    [
        ({"a": F4}, b"\0" * 3, None, "end at byte .*: the download was cut short"),
        ({"a": F4}, b"\0" * 5, None, "tensors end at byte"),
        ({"a": F4}, b"\0" * 4, 1 << 62, "its header should take 4611686018427387904 bytes"),
        (b"{", b"", None, "is not JSON"),
        (b"\xff\xfe", b"", None, "is not JSON"),
        (b"[]", b"", None, "not a table"),
        (b'{"a": 1}', b"", None, "'a' is malformed"),
        (b'{"a": ' + b"1" * 5000 + b"}", b"", None, "is not JSON"),
        (
            {"a": {**F4, "dtype": "F4"}},
            b"\0" * 4,
            None,
            "a is F4, which this program does not read",
        ),
        (
            {"a": F4, "b": {**F4, "data_offsets": [0, 4]}},
            b"\0" * 4,
            None,
            "b starts at byte .*, expected",
        ),
        ({"a": {**F4, "shape": [-1]}}, b"\0" * 4, None, "malformed"),
        ({"a": {**F4, "shape": [1 << 40, 1 << 40]}}, b"\0" * 4, None, "has 4 bytes"),
        ({"a": {**F4, "shape": [1 << 60]}}, b"\0" * 4, None, "malformed"),
        ({"a": {**F4, "shape": [1] * 9}}, b"\0" * 4, None, "malformed"),
        (
            (
                b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype":'
                b' "F32", "shape": [1], "data_offsets": [0, 4]}}'
            ),
            b"\0" * 4,
            None,
            "names 'a' twice",
        ),
        ({"__metadata__": {"a": 1}}, b"", None, "metadata is not a table of strings"),
    ],
)
def test_broken_headers_are_rejected(raw, header, data, length, said):
    path = raw(header, data, length)
    with pytest.raises(CheckpointError, match=said):
        read_layout(path)


def test_other_files_are_rejected(tmp_path):
    for content, said in (
        (b"", "it has 0 bytes"),
        (b"PK\x03\x04" + b"\0" * 100, "is a PyTorch pickle"),
        (b"<html>" * 9, "is a web page"),
        (b"\1\2\3" * 99, "not a whole"),
    ):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            load_model(path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nowhere.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="is no shard index"):
        load_model(index)
    with pytest.raises(CheckpointError, match="holds 0 .safetensors files"):
        load_model(tmp_path / "..")


@pytest.mark.slow
def test_damaged_headers_never_raise_anything_else(tiny_weights, write, tmp_path):
    whole = write(tiny_weights).read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    path = tmp_path / "damaged.safetensors"
    rejected, whole_numbers = 0, sum(weight.numel() for weight in tiny_weights.values())
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(
            damaged[: rng.choice([len(damaged), len(damaged), rng.randrange(len(damaged))])]
        )
        try:
            described = describe(path)
            loaded = load_model(path)
        except CheckpointError:
            rejected += 1
        else:  # the damage is in what does not matter, such as the metadata
            numbers = sum(weight.numel() for weight in loaded.state_dict().values())
            assert numbers == described["parameters"] == whole_numbers
    assert rejected > 90


# --- inspect
# --------------------------------------------------------------------------------------------------


def test_published_keys_are_one_whole_model(tmp_path):
    keys = json.loads((GOLDEN / "l2p_keys.json").read_text())
    header, offset = {}, 0
    for name, (shape, dtype) in keys["keys"].items():
        size = {"F32": 4, "BF16": 2}[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    path = tmp_path / "model-1k-merge.safetensors"
    encoded = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + offset)  # sparse: its 19.57 GB take no room
    facts = describe(path)
    assert facts["usable"] and facts["parameters"] == 6_166_464_515 and facts["tensors"] == 545
    assert facts["dtypes"] == {"F32": 3618206720, "BF16": 2548257795}
    assert (
        "19.57 GB in 1 file, 545 tensors, 6,166,464,515 parameters (F32 59%, BF16 41%)"
        in report(facts)
    )
    assert "patch 16: trained for about 1024 x 1024 pixels" in report(facts)


def test_inspect_tells_quantization(tiny_weights, write):
    tensors, metadata = int8(
        comfyui_naming(tiny_weights), "model.diffusion_model.", marked="tensors", convrot=16
    )
    facts = describe(write(tensors, metadata=metadata))
    assert facts["quantization"] == "int8_tensorwise, 62 tensors, convrot 16"
    assert facts["parameters"] == sum(
        torch.Size(shape).numel() for shape in recipe.shapes(recipe.TINY).values()
    )
    assert "prefix model.diffusion_model., quantized: int8_tensorwise" in report(facts)


def test_header_reader_agrees_with_safetensors(write):
    path = write(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)},
        metadata={"made": "here"},
    )
    entries, metadata = read_header(path)
    data = path.read_bytes()
    assert metadata == {"made": "here"} and entries["b"].shape == (3,)
    assert torch.frombuffer(
        bytearray(data[entries["a"].begin : entries["a"].end]), dtype=torch.float32
    ).tolist() == list(range(6))
