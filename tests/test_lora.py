"""A LoRA in use generates what the merged model does; 8-bit weights keep their bits."""

import json

import pytest
import torch
from adapters import a_lora, packed_change
from comfyui_l2p.l2p_core import CheckpointError, L2PPipeline
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.files.lora import AddedLinear
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.quant.merge import merge
from comfyui_l2p.quant.quantize import quantize
from helpers import apart
from PIL import Image
from safetensors.torch import load_file

CHECKPOINT = BUNDLED_MODEL / "transformer.safetensors"
PROMPT = "a large red circle on a blue background, left"
FEW = {"seed": 7, "num_inference_steps": 3, "height": 64, "width": 48}
TARGET = "layers.2.attention.to_k"  # of packed q, k and v


@pytest.fixture(scope="module")
def weights():
    return {name: tensor.float() for name, tensor in load_file(CHECKPOINT).items()}


def pipeline(checkpoint=CHECKPOINT, **options):
    return L2PPipeline.from_pretrained(
        checkpoint, BUNDLED_MODEL / "text_encoder", torch_dtype=torch.float32, **options
    )


def weak(lora):
    """The same LoRA with a tenth of its effect, so that images stay images."""
    return {name: t * 0.1 if "lora_A" in name else t for name, t in lora.items()}


def test_several_loras_add_up(weights, write):
    (first, added), (second, more) = a_lora(weights), a_lora(weights, "kohya", alpha=2)
    pipe = pipeline()
    pipe.load_lora(write(first, "first.safetensors"), 0.5)
    pipe.load_lora(write(second, "second.safetensors"), -2)
    changed = pipe.transformer.state_dict()
    for name, weight in weights.items():
        wanted = weight + 0.5 * added.get(name, 0) - 2 * more.get(name, 0)
        torch.testing.assert_close(changed[name], wanted, atol=1e-5, rtol=1e-5, msg=name)

    pipe.unload_loras()
    unchanged = pipe.transformer.state_dict()
    assert all(torch.equal(unchanged[name], weight) for name, weight in weights.items())


@pytest.mark.slow
def test_images_are_those_of_the_merged_model(weights, write, tmp_path):
    lora = write(weak(a_lora(weights)[0]), "lora.safetensors")
    merge(lora, CHECKPOINT, tmp_path / "merged.safetensors", dtype="fp32", strength=0.5)
    wanted = pipeline(tmp_path / "merged.safetensors")(PROMPT, **FEW)
    pipe = pipeline()
    before = pipe(PROMPT, **FEW)
    pipe.load_lora(lora, 0.5)
    assert apart(pipe(PROMPT, **FEW), wanted) <= 1 < apart(before, wanted)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    file = tmp_path_factory.mktemp("quantized") / "int8.safetensors"
    quantize(CHECKPOINT, file)
    return file


@pytest.mark.parametrize("kind", ["lora_A", "loha", "lokr", "diff"])
def test_8_bit_layers_keep_their_bits_and_add_the_change(quantized, write, kind):
    held, change = packed_change(kind, 3 * 192, 192)
    lora = {f"diffusion_model.layers.2.attention.qkv.{part}": t for part, t in held.items()}
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    pipe = pipeline(quantized)
    plain = pipe.transformer.get_submodule(TARGET)
    wanted = plain(x) + 0.5 * x @ change[192:384].T
    pipe.load_lora(write(lora), 0.5)
    changed = pipe.transformer.get_submodule(TARGET)
    assert isinstance(changed, AddedLinear) and torch.equal(changed.layer.weight, plain.weight)
    torch.testing.assert_close(changed(x), wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("lengths", ["rows, packed", "rows, as peft names them", "columns"])
def test_dora_gives_the_sum_other_lengths(quantized, weights, write, tmp_path, lengths):
    """arXiv 2402.09353, longhand; merged into float32 weights, and beside 8-bit ones."""
    held, change = packed_change("lora_A", 3 * 192, 192)
    draw = torch.Generator().manual_seed(5)
    if lengths == "rows, packed":
        lora = {f"diffusion_model.layers.2.attention.qkv.{part}": t for part, t in held.items()}
        scale = 1 + torch.rand(3 * 192, 1, generator=draw)
        lora["diffusion_model.layers.2.attention.qkv.dora_scale"] = scale
        scale, axis = scale[192:384], 1
    else:
        third = {
            "lora_A.weight": held["lora_A.weight"],
            "lora_B.weight": held["lora_B.weight"][192:384],
        }
        lora = {f"{TARGET}.{part}": t for part, t in third.items()} | {
            f"{TARGET}.alpha": held["alpha"]
        }
        axis = 0 if lengths == "columns" else 1
        scale = 1 + torch.rand(192, generator=draw).unsqueeze(axis)
        name = "dora_scale" if axis == 0 else "lora_magnitude_vector.default.weight"
        lora[f"{TARGET}.{name}"] = scale if axis == 0 else scale[:, 0]

    def wanted(before):
        changed = before + change[192:384]
        return before + 0.5 * (scale * changed / changed.norm(dim=axis, keepdim=True) - before)

    file = write(lora, "dora.safetensors")
    merge(file, CHECKPOINT, tmp_path / "merged.safetensors", dtype="fp32", strength=0.5)
    merged = load_file(tmp_path / "merged.safetensors")[f"{TARGET}.weight"]
    torch.testing.assert_close(merged, wanted(weights[f"{TARGET}.weight"]), atol=1e-5, rtol=1e-4)

    x = torch.randn(5, 192, generator=draw)
    pipe = pipeline(quantized)
    plain = pipe.transformer.get_submodule(TARGET)
    before = plain.weight * plain.weight_scale
    pipe.load_lora(file, 0.5)
    changed = pipe.transformer.get_submodule(TARGET)
    assert torch.equal(changed.layer.weight, plain.weight)
    added = x @ (wanted(before) - before).T
    torch.testing.assert_close(changed(x) - plain(x), added, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_streamed_8_bit_weights_take_a_lora(quantized, weights, write):
    lora = write(weak(a_lora(weights)[0]), "lora.safetensors")
    images = []
    for offload in (False, True):
        pipe = pipeline(quantized, offload=offload, device="cpu")
        pipe.load_lora(lora)
        images.append(pipe(PROMPT, **FEW))
    assert apart(*images) <= 1


@pytest.mark.slow
def test_the_command_records_its_loras(weights, write, tmp_path, capsys):
    lora = write(weak(a_lora(weights)[0]), "lora.safetensors")
    out = tmp_path / "out.png"
    command = ["generate", PROMPT, "--steps", "2", "--seed", "1", "-o", str(out)]
    assert main([*command, "--lora", f"{lora}:0.5", "--lora", str(lora)]) == 0
    record = json.loads(Image.open(out).info["l2p"])
    assert record["lora"] == ["lora.safetensors"] * 2 and record["lora_strength"] == [0.5, 1.0]
    assert len(set(record["lora_sha256"])) == 1

    assert main([*command, "--lora", f"{lora}:0.5", "--lora", str(lora)]) == 0
    assert "1 of 1 images exist already" in capsys.readouterr().out
    for others in ([], ["--lora", str(lora)], ["--lora", f"{lora}:0.5", "--lora", f"{lora}:2"]):
        assert main([*command, *others]) == 1
        assert "generated with other settings (lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file, strength, said",
    [
        (CHECKPOINT, 1, "transformer.safetensors is no LoRA"),
        ("lora", float("nan"), "the strength of lora.safetensors is nan"),
        ("other", 1, "belongs to nothing in transformer.safetensors"),
        ("missing.safetensors", 1, "missing.safetensors"),
    ],
)
def test_what_does_not_fit_is_rejected_before_the_model_is_loaded(
    weights, write, file, strength, said
):
    files = {
        "lora": write(a_lora(weights)[0], "lora.safetensors"),
        "other": write({"unet.down.lora_A.weight": torch.ones(4, 4)}, "other.safetensors"),
    }
    pipe = pipeline()
    with pytest.raises((CheckpointError, ValueError, OSError), match=said):
        pipe.load_lora(files.get(file, file), strength)
    assert not pipe.loras and "transformer" not in vars(pipe)
