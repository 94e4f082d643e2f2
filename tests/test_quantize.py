"""Quantized files against the helper that rounds by hand: the same integers, scales and markers,
and honest figures."""

import json
import re

import pytest
import torch
from comfyui_l2p.l2p_core import CheckpointError, load_model, read_layout
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.files.quantization import Int8Linear
from comfyui_l2p.quant import quantize as quantize_module
from comfyui_l2p.quant import stream
from comfyui_l2p.quant.quantize import Options, quantize, table
from helpers import comfyui_naming, int8, regular_hadamard, rms
from safetensors.torch import load_file

PREFIX = "model.diffusion_model."
KEPT = ("layers.0.", "noise_refiner.", "context_refiner.")  # by the preset card


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


def by_hand(weights, granularity, preset):
    """The expected file: the helper's INT8 for the chosen layers, BF16 for the rest."""
    packed = comfyui_naming(weights)
    blocks = {
        name
        for name in packed
        if "adaLN" not in name
        and packed[name].dim() == 2
        and name.startswith(("layers.", "noise_refiner.", "context_refiner."))
    }
    chosen = {name for name in blocks if preset == "small" or not name.startswith(KEPT)}
    tensors, _ = int8(
        {name: packed[name] for name in sorted(chosen)}, PREFIX, granularity, "tensors"
    )
    return {
        **tensors,
        **{PREFIX + name: packed[name].bfloat16() for name in packed if name not in chosen},
    }


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["card", "small"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_int8_is_what_rounding_by_hand_gives(
    tiny_weights, tiny_model, write, out, granularity, preset, monkeypatch
):
    monkeypatch.setattr(stream, "BLOCK", 5000)  # many blocks to a tensor
    facts = quantize(
        write(tiny_weights), out, Options(granularity=granularity, preset=preset), verify=True
    )
    expected, found = by_hand(tiny_weights, granularity, preset), load_file(out)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tensor.shape, key
        if (
            tensor.dtype == torch.int8
        ):  # x / scale lies on a half now and then, and scales differ in their last bit
            assert (found[key].int() - tensor.int()).abs().max() <= 1 and (
                found[key] != tensor
            ).float().mean() < 1e-3
        else:
            torch.testing.assert_close(
                found[key], tensor, rtol=3e-7 if key.endswith("_scale") else 0, atol=0
            )
    assert facts["verified"] and facts["quantized"] == sum(
        key.endswith("comfy_quant") for key in found
    )
    arguments = (
        torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.4]),
        [torch.ones(9, 64)],
    )
    with torch.no_grad():
        model, reference = load_model(out, dtype=torch.float32), tiny_model(*arguments)
        assert rms(model(*arguments) - reference, reference) < 0.03
    assert (
        sum(isinstance(module, Int8Linear) for module in model.modules())
        == (3 if preset == "card" else 8) * 7
    )


def test_convrot_rotates_before_rounding(tiny_weights, write, out):
    facts = quantize(write(tiny_weights), out, Options(granularity="convrot"), verify=True)
    found, key = load_file(out), f"{PREFIX}layers.1.feed_forward.w1"
    assert json.loads(bytes(found[f"{key}.comfy_quant"].tolist())) == {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": 16,
    }  # of 256, 64 and 16 what divides 96
    rotated = (
        tiny_weights["layers.1.feed_forward.w1.weight"].unflatten(1, (-1, 16))
        @ regular_hadamard(16).T
    ).flatten(1)
    assert rms(found[f"{key}.weight"] * found[f"{key}.weight_scale"] - rotated, rotated) < 0.01
    assert {tensor["convrot_groupsize"] for tensor in facts["tensors"]} == {
        16,
        256,
    }  # w2 has 256 inputs
    assert read_layout(out).tensors["layers.1.feed_forward.w1.weight"].convrot_groupsize == 16


@pytest.mark.parametrize(
    "kind, largest", [("float8_e4m3fn", 448), ("float8_e5m2", 57344)]
)  # OCP 8-bit Floating Point 1.0
def test_float8_is_comfyuis(tiny_weights, tiny_model, write, out, kind, largest):
    assert (
        main(["quantize", str(write(tiny_weights)), "-o", str(out), "--format", kind, "--verify"])
        == 0
    )
    found, key = load_file(out), f"{PREFIX}layers.2.attention.out.weight"
    weight = tiny_weights["layers.2.attention.to_out.0.weight"]
    scale = weight.abs().max() / largest
    assert json.loads(bytes(found[key.replace(".weight", ".comfy_quant")].tolist())) == {
        "format": kind
    }
    assert found[key].dtype == getattr(torch, kind) and found[key].float().abs().max() == largest
    assert found[f"{key}_scale"].shape == () and found[f"{key}_scale"] == pytest.approx(
        float(scale), rel=1e-6
    )
    assert (
        found[key].float() == (weight / scale).to(getattr(torch, kind)).float()
    ).float().mean() > 0.999
    assert load_model(out).dtype == torch.bfloat16


FOUR_BITS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # what E2M1 can say, without its sign


def by_hand_in_blocks(kind, weight):
    """A weight as mxfp8 or nvfp4 says it (OCP Microscaling Formats 1.0; NVIDIA, "Introducing
    NVFP4"), dequantized."""
    block = 32 if kind == "mxfp8" else 16
    groups = weight.unflatten(1, (-1, block))
    largest = groups.abs().amax(-1, keepdim=True)
    if kind == "mxfp8":
        scale = 2.0 ** (largest / 448).log2().ceil()
        return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(1)
    whole = weight.abs().max() / (448 * 6)
    scale = (largest / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    nearest = ((groups / scale).abs()[..., None] - FOUR_BITS).abs().argmin(-1)
    return (FOUR_BITS[nearest] * groups.sign() * scale).flatten(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4", "convrot_w4a4"])
def test_block_formats_are_what_rounding_by_hand_gives(
    tiny_weights, write, out, kind, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        stream, "BLOCK", 128 * 256
    )  # several blocks to a tensor, the last of them smaller
    facts = quantize(write(tiny_weights), out, Options(format=kind, preset="small"), verify=True)
    w2 = [tensor for tensor in facts["tensors"] if tensor["name"].endswith("w2.weight")]
    assert len(w2) == 8 and (kind == "convrot_w4a4" or len(facts["tensors"]) == 8 * 5)
    model = load_model(out, dtype=torch.float32)
    back = tmp_path / "back.safetensors"
    assert (
        main(["export", str(out), "-o", str(back), "--dtype", "fp32", "--naming", "published"]) == 0
    )
    exported = load_file(back)
    for name, weight in tiny_weights.items():
        if (
            name.startswith("layers.")
            and weight.dim() == 2
            and "adaLN" not in name
            and (kind != "convrot_w4a4" or ".w2." in name)
        ):
            found = model.get_parameter(name)
            assert torch.equal(found, exported[name]), name
            if kind == "convrot_w4a4":
                rotated = (weight.unflatten(1, (-1, 256)) @ regular_hadamard(256).T).flatten(1)
                scale = rotated.abs().amax(1, keepdim=True) / 7
                expected = (
                    ((rotated / scale).round() * scale).unflatten(1, (-1, 256))
                    @ regular_hadamard(256)
                ).flatten(1)
            elif (
                ".to_q." in name or ".to_k." in name or ".to_v." in name
            ):  # packed, they share nvfp4's outer scale
                packed = torch.cat(
                    [
                        tiny_weights[re.sub("to_[qkv]", part, name)]
                        for part in ("to_q", "to_k", "to_v")
                    ]
                )
                expected = by_hand_in_blocks(kind, packed).chunk(3)[
                    "qkv".index(name.split(".to_")[1][0])
                ]
            else:
                expected = by_hand_in_blocks(kind, weight)
            differing = (found - expected).abs() > 1e-6 * expected.abs()
            assert differing.float().mean() < 0.01, f"{name}: ties go one way or the other, no more"
    again = tmp_path / "again.safetensors"
    assert main(["export", str(out), "-o", str(again)]) == 0
    first, second = load_file(out), load_file(again)
    assert first.keys() == second.keys() and all(
        torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8))
        for key in first
        if first[key].dim()
    )


@pytest.mark.slow
def test_every_input_gives_the_same_file(tiny_weights, write, out):
    mixed = {name: tensor.bfloat16() for name, tensor in tiny_weights.items()}
    mixed |= {
        name: tensor.float() for name, tensor in mixed.items() if name.startswith("layers.2.")
    }
    quantize(write(mixed), out)
    first = load_file(out)
    for i in range(3):
        shard = write(dict(list(mixed.items())[i::3]), f"in/model-{i + 1:05d}-of-00003.safetensors")
    for source in (
        write(
            {PREFIX + name: tensor for name, tensor in comfyui_naming(mixed).items()},
            "comfyui.safetensors",
        ),
        shard.parent,
    ):
        quantize(source, out)
        again = load_file(out)
        assert again.keys() == first.keys() and all(
            torch.equal(again[key], first[key]) for key in first
        )


def test_report_tells_the_truth(tiny_weights, write, out, tmp_path, capsys):
    weights = {
        **tiny_weights,
        "layers.3.feed_forward.w2.weight": tiny_weights["layers.3.feed_forward.w2.weight"].clone(),
    }
    weights["layers.3.feed_forward.w2.weight"][:, 0] *= 60  # outliers in every row
    source = write(weights)
    assert (
        main(
            [
                "quantize",
                str(source),
                "-o",
                str(out),
                "--report",
                str(tmp_path / "r.json"),
                "--verify",
            ]
        )
        == 0
    )
    said, facts = capsys.readouterr().out, json.loads((tmp_path / "r.json").read_text())
    assert (
        facts["bytes_before"] == source.stat().st_size
        and facts["bytes_after"] == out.stat().st_size
    )
    found = load_file(out)
    for tensor in facts["tensors"]:
        after = found[tensor["name"]] * found[f"{tensor['name']}_scale"]
        before = comfyui_naming(weights)[tensor["name"].removeprefix(PREFIX)]
        assert tensor["snr_db"] == pytest.approx(
            float(-20 * torch.log10((after - before).norm() / before.norm())), abs=0.01
        )
        assert tensor["bytes_before"] == 4 * before.numel() and tensor[
            "bytes_after"
        ] == before.numel() + 4 * len(before), "a scale for each row"
    assert said.splitlines()[0].endswith("int8_tensorwise, row, preset card, verified")
    assert said.splitlines()[3].split()[0] == f"{PREFIX}layers.3.feed_forward.w2.weight", (
        "the worst comes first"
    )
    assert table(facts) in said


def test_patterns_add_and_remove(tiny_weights, write, out):
    options = Options(
        include=["layers.0.*.w1.weight", "cap_embedder.1.weight"],
        exclude=["*.qkv.weight", "layers.3.*"],
    )
    quantize(write(tiny_weights), out, options, verify=True)
    codes = {
        key.removeprefix(PREFIX)
        for key, tensor in load_file(out).items()
        if tensor.dtype == torch.int8
    }
    assert codes == {
        "layers.0.feed_forward.w1.weight",
        "cap_embedder.1.weight",
        *(
            f"layers.{layer}.{part}.weight"
            for layer in (1, 2)
            for part in ("attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
        ),
    }


@pytest.mark.parametrize(
    "options, said",
    [
        ({"include": ["nothing.*"]}, "the pattern nothing.* matches no tensor"),
        ({"include": ["local_decoder.*"]}, "only the weights of linear layers"),
        ({"exclude": ["*"]}, "nothing is left to quantize"),
        (
            {"format": "float8_e4m3fn", "granularity": "row"},
            "granularity row: float8_e4m3fn has tensor. Leave it out",
        ),
        (
            {"format": "convrot_w4a4", "exclude": ["*.w2.weight"]},
            "no tensor's sides divide into the blocks of convrot_w4a4",
        ),
        (
            {"preset": "tiny"},
            "preset tiny: expected int8_tensorwise, .*convrot_w4a4; card or small",
        ),
    ],
)
def test_options_that_mean_nothing_are_rejected(tiny_weights, write, out, options, said):
    with pytest.raises(CheckpointError, match=said if ".*c" in said else re.escape(said)):
        quantize(write(tiny_weights), out, Options(**options))
    assert not out.exists()


def test_what_cannot_be_quantized_is_named(tiny_weights, write, out):
    with pytest.raises(CheckpointError, match="is quantized already .int8_tensorwise"):
        quantize(write(int8(tiny_weights)[0]), out)
    nan = {**tiny_weights, "layers.1.feed_forward.w1.weight": torch.full((256, 96), torch.nan)}
    with pytest.raises(CheckpointError, match="layers.1.feed_forward.w1.weight holds NaN"):
        quantize(write(nan), out)
    assert not out.exists()


def test_verify_finds_a_changed_number(tiny_weights, write, out, monkeypatch):
    def damaging(path, *arguments):
        stream.write(path, *arguments)
        content = bytearray(path.read_bytes())
        content[read_layout(path).tensors["x_pad_token"].entry.begin + 1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(quantize_module, "write", damaging)
    with pytest.raises(
        CheckpointError, match="does not hold what was written: model.diffusion_model.x_pad_token"
    ):
        quantize(write(tiny_weights), out, verify=True)
