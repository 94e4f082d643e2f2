"""FLUX.2-klein with the local decoder inside ComfyUI, against the library, which runs diffusers."""

import math
from dataclasses import dataclass
from pathlib import Path

import backbones
import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline, load_model
from comfyui_l2p.l2p_core.backbones import FLUX2_KLEIN
from comfyui_l2p.l2p_core.model import Hooks
from comfyui_l2p.l2p_core.text import TextEncoder
from comfyui_l2p.quant.quantize import Options, quantize
from helpers import rms
from real_comfyui import Rejected
from safetensors.torch import load_file, save_file
from test_comfyui_model import INT8_SINCE, LOADERS, NAMINGS

pytest.importorskip("diffusers", minversion="0.42")
TITLE = FLUX2_KLEIN.title


@dataclass
class Klein:
    """A tiny pixel model on FLUX.2-klein."""

    folder: Path  # with its text encoder and tokenizer
    file: Path
    weights: dict[str, torch.Tensor]
    model: torch.nn.Module


@pytest.fixture(scope="module")
def klein(tmp_path_factory) -> Klein:
    folder = backbones.save_klein(tmp_path_factory.mktemp("klein"))
    file = backbones.save_pixel_model(folder / "pixel.safetensors")
    weights = load_file(file)
    for name, tensor in weights.items():  # else the decoder lets little of the features through
        if name.startswith("local_decoder.") and tensor.dim() == 4:
            weights[name] = 2 * tensor
    save_file(weights, file)
    return Klein(folder, file, weights, load_model(file, dtype=torch.float32))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("prefix, dit", [("", ""), ("model.diffusion_model.", ""), ("", "dit.")])
def test_a_pass_is_the_library_s(compare, write, klein, loader, prefix, dit):
    named = {
        prefix + ("" if name.startswith("local_decoder.") else dit) + name: tensor
        for name, tensor in klein.weights.items()
    }
    error, loaded = compare(write(named), loader, klein.model)
    assert error < 1e-5
    assert loaded["class"] == "L2PModel" and loaded["shift"] == pytest.approx(math.exp(2.02))


@pytest.mark.parametrize(
    "layer", ["norm_out.linear", "double_stream_modulation_txt.linear", "x_embedder"]
)
def test_the_order_of_rows_and_columns_matters(compare, write, klein, layer):
    """A negative control: halves in another order give another image."""
    name = f"{layer}.weight"
    halves = klein.weights[name].chunk(2, dim=1 if layer == "x_embedder" else 0)
    swapped = torch.cat(halves[::-1], dim=1 if layer == "x_embedder" else 0)
    path = write({**klein.weights, name: swapped})
    assert compare(path, "diffusion", klein.model)[0] > 2e-2
    assert compare(path, "diffusion", load_model(path, dtype=torch.float32))[0] < 1e-5


def test_the_epsilon_of_query_and_key_norms_is_diffusers_own(compare, write, klein):
    """With queries and keys this small the epsilon decides the output; core leaves it to torch."""
    weights = {
        name: tensor * 1e-3 if name.endswith((".to_q.weight", ".to_k.weight")) else tensor
        for name, tensor in klein.weights.items()
    }
    path = write(weights)
    assert compare(path, "diffusion", load_model(path, dtype=torch.float32))[0] < 1e-5


@pytest.mark.parametrize(
    "rope", [{"scale_x": 0.5, "scale_y": 0.25}, {"shift_x": 3.0, "shift_y": 7.0, "scale_x": 2.0}]
)
def test_rope_options(comfyui, tmp_path, klein, rope):
    generator = torch.Generator().manual_seed(1)
    image, sigma = torch.randn(1, 3, 64, 96, generator=generator), torch.tensor([0.4])
    caption = torch.randn(1, 7, 24, generator=generator)
    inputs, output = tmp_path / "inputs.safetensors", tmp_path / "output.safetensors"
    save_file({"image": image, "sigma": sigma, "caption": caption}, inputs)
    comfyui.call("forward_with", path=klein.file, inputs=inputs, output=output, rope=rope)
    hooks = Hooks(
        rope_scale=(rope.get("scale_y", 1.0), rope.get("scale_x", 1.0)),
        rope_shift=(rope.get("shift_y", 0.0), rope.get("shift_x", 0.0)),
    )
    with torch.no_grad():
        expected, plain = (
            -klein.model(image, 1 - sigma, list(caption), *given) for given in ((hooks,), ())
        )
    found = load_file(output)["output"]
    assert rms(found - expected, expected) < 1e-5 < rms(plain - expected, expected)


def test_wrappers_and_attention_overrides_are_used(comfyui, tmp_path, klein):
    """As EasyCache wraps the network, which adds to its input in place, and as Sage overrides
    attention: here with one that returns v."""
    generator = torch.Generator().manual_seed(1)
    image, sigma = torch.randn(1, 3, 32, 48, generator=generator), torch.tensor([0.4])
    caption = torch.randn(1, 7, 24, generator=generator)
    inputs, output = tmp_path / "inputs.safetensors", tmp_path / "output.safetensors"
    save_file({"image": image, "sigma": sigma, "caption": caption}, inputs)
    arguments = {"path": klein.file, "inputs": inputs, "output": output}
    wrapped = comfyui.call("forward_with", wrapper=True, **arguments)
    with torch.no_grad():
        expected = -klein.model(image, 1 - sigma, list(caption))
    assert not wrapped["input_changed"]
    assert rms(load_file(output)["output"] - expected, expected) < 1e-5
    seen = comfyui.call("forward_with", override=True, **arguments)["seen"]
    assert seen == [[1, 2, 6 + 7, 16]] * (2 + 3)
    assert rms(load_file(output)["output"] - expected, expected) > 1e-3


def test_prompts_of_two_lengths_in_a_batch(comfyui, tmp_path, klein):
    generator = torch.Generator().manual_seed(1)
    image, sigma = torch.randn(2, 3, 32, 48, generator=generator), torch.tensor([0.9, 0.3])
    caption, mask = torch.randn(2, 40, 24, generator=generator), torch.ones(2, 40)
    mask[0, 5:] = 0
    inputs, output = tmp_path / "inputs.safetensors", tmp_path / "output.safetensors"
    save_file({"image": image, "sigma": sigma, "caption": caption, "mask": mask}, inputs)
    comfyui.call("forward", path=klein.file, loader="diffusion", inputs=inputs, output=output)
    with torch.no_grad():
        expected = -klein.model(image, 1 - sigma, [caption[0, :5], caption[1]])
    found = load_file(output)["output"]
    assert rms(found - expected, expected) < 1e-5


@pytest.mark.parametrize("prompt", ["a red circle", "({[unbalanced:1.3", "naïve 日本語 🙂\nline"])
def test_prompts_give_the_same_embeddings(comfyui, tmp_path, klein, prompt):
    """Three hidden states, padded to 512 tokens."""
    output, encoder = tmp_path / "out.safetensors", klein.folder / "text_encoder"
    comfyui.call("encode", prompt=prompt, output=output, text_encoder=encoder, latent_model=TITLE)
    found = load_file(output)
    own = TextEncoder.load(klein.folder, dtype=torch.float32, prompts=FLUX2_KLEIN.prompts)
    for name, text in (("positive", prompt), ("negative", "")):
        expected = own.encode(text)
        assert found[name].shape == (1, 512, 24)
        assert rms(found[name][0] - expected, expected) < 1e-5


@pytest.fixture
def draw(comfyui, tmp_path, klein):
    """draw(**options) → (the image, the last preview, what the worker answers)."""

    def run(text_encoder=None, latent_model=TITLE, **options):
        answer = comfyui.call(
            "draw_backbone",
            path=klein.file,
            text_encoder=text_encoder or klein.folder / "text_encoder",
            latent_model=latent_model,
            prompt="a red circle",
            output=tmp_path / "drawn.safetensors",
            **options,
        )
        drawn = {
            name: tensor.numpy().astype(int)
            for name, tensor in load_file(tmp_path / "drawn.safetensors").items()
        }
        return drawn["image"], drawn.get("preview"), answer

    return run


@pytest.fixture(scope="module")
def generate(klein):
    """generate(**settings) → what the library generates with the settings of `draw_backbone`."""
    pipe = L2PPipeline.from_pretrained(
        klein.file, klein.folder, device="cpu", torch_dtype=torch.float32
    )

    def run(**settings) -> np.ndarray:
        found = pipe("a red circle", seed=3, height=32, width=48, num_inference_steps=4, **settings)
        return np.asarray(found).astype(int)

    return run


@pytest.fixture(scope="module")
def image(generate) -> np.ndarray:
    return generate()


def test_our_nodes_generate_the_library_s_image(draw, image):
    """Noise, schedule, guidance scale 4, padded prompts. The last preview is the image."""
    found, preview, answer = draw()
    assert image.std() > 10, "the image shows nothing that could differ"
    assert np.abs(found - image).max() <= 1
    assert preview.shape == image.shape and np.abs(preview - image).max() <= 1
    assert answer["previews"] == 4
    note = "This checkpoint is made for steps 50, cfg 4.0, shift 7.54. Set them in the sampler"
    assert note in answer["said"]


def test_core_s_sampler_generates_with_the_model_s_shift(draw, image):
    """`simple` has the sigmas of the schedule where steps divide 1000."""
    assert np.abs(draw(node="KSampler")[0] - image).max() <= 1


def test_a_second_stage_is_the_library_s(draw, generate, image):
    expected = generate(stages=2, stage_strength=0.5, redraw="interpolated")
    assert np.abs(draw(stage_attention="whole")[0] - expected).max() <= 1
    assert np.abs(expected - image).max() > 10


LORA_TARGETS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.1.attn.to_k",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.0.attn.to_add_out",
    "transformer_blocks.1.ff.linear_in",
    "transformer_blocks.0.ff_context.linear_out",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_transformer_blocks.2.attn.to_out",
    "x_embedder",
    "context_embedder",
    "time_guidance_embed.timestep_embedder.linear_1",
    "single_stream_modulation.linear",
    "norm_out.linear",
    "local_decoder.dec2.0",
)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("naming", ["ai-toolkit", "diffusers", "DiffSynth", "peft", "kohya"])
def test_loras_change_the_image_as_merged_weights_do(
    compare, write, tmp_path, klein, naming, quantized
):
    """The names of ai-toolkit are those of `l2p train`."""
    name_of, (down, up) = NAMINGS[naming]
    generator = torch.Generator().manual_seed(2)
    lora, merged = {}, dict(klein.weights)
    for target in LORA_TARGETS:
        weight = klein.weights[f"{target}.weight"]
        a = torch.randn(4, *weight.shape[1:], generator=generator)
        b = torch.randn(weight.shape[0], 4, *[1] * (weight.dim() - 2), generator=generator)
        b *= 0.5 * weight.norm() / (b.flatten(1) @ a.flatten(1)).norm()
        lora |= {f"{name_of(target)}.{down}": a, f"{name_of(target)}.{up}": b}
        change = (b.flatten(1) @ a.flatten(1)).view_as(weight)
        merged[f"{target}.weight"] = weight + 0.5 * change
    changed = load_model(write(merged, "merged.safetensors"), dtype=torch.float32)
    path, file = klein.file, write(lora, "lora.safetensors")
    if quantized:
        path = tmp_path / "int8.safetensors"
        quantize(klein.file, path, Options("int8_tensorwise", preset="small"))
    error, loaded = compare(path, "diffusion", changed, lora=file, strength=0.5)
    assert loaded["patches"] == len(LORA_TARGETS) - 1  # two are in one packed layer
    assert error < (5e-2 if quantized else 1e-5)
    assert compare(path, "diffusion", klein.model, lora=file, strength=0.5)[0] > 0.1


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["int8_tensorwise", "float8_e4m3fn", "mxfp8", "nvfp4"])
def test_quantized_files(comfyui, compare, tmp_path, klein, loader, kind):
    """Of other formats than INT8, q, k and v of double blocks are dequantized to bfloat16. A
    ComfyUI without the format gets them all so, or is told that its comfy-kitchen is too old."""
    path = tmp_path / "quantized.safetensors"
    quantize(klein.file, path, Options(kind, preset="small"))
    reference = load_model(path, dtype=torch.float32)
    if comfyui.version >= INT8_SINCE:
        error, loaded = compare(path, loader, reference)
        assert error < 2e-2
        assert any("Layout" in name for name in loaded["formats"]), loaded
        return
    try:
        assert compare(path, loader, reference)[0] < 2e-2
    except Rejected as rejected:
        assert "installed comfy-kitchen is too old for this checkpoint" in str(rejected)


def test_q_k_and_v_may_be_quantized_each_in_its_own_way(compare, write, tmp_path, klein):
    path = tmp_path / "quantized.safetensors"
    quantize(klein.file, path, Options("int8_tensorwise", preset="small"))
    weights = load_file(path)
    layer = "transformer_blocks.0.attn.to_v"
    for suffix in ("weight_scale", "comfy_quant"):
        del weights[f"model.diffusion_model.{layer}.{suffix}"]
    weights[f"model.diffusion_model.{layer}.weight"] = klein.weights[f"{layer}.weight"]
    path = write(weights)
    assert compare(path, "node", load_model(path, dtype=torch.float32))[0] < 2e-2


@pytest.mark.parametrize("quantized", [False, True])
def test_save_checkpoint_and_load_again(comfyui, compare, tmp_path, klein, quantized):
    """Bit for bit, but that a ComfyUI without INT8 saves such weights in bfloat16."""
    path, saved = klein.file, tmp_path / "saved.safetensors"
    if quantized:
        path = tmp_path / "int8.safetensors"
        quantize(klein.file, path, Options("int8_tensorwise", preset="small"))
    names = comfyui.call("saved_names", path=path, output=saved)
    assert {f"model.diffusion_model.{name}" for name in klein.weights} == {
        name for name in names if not name.endswith(("_scale", "comfy_quant", "pixel_space_vae"))
    }
    reference = load_model(path, dtype=torch.float32)
    assert compare(saved, "checkpoint", reference)[0] < (2e-2 if quantized else 1e-5)
    again, before = (load_model(file, dtype=torch.float32) for file in (saved, path))
    inputs = torch.randn(1, 3, 32, 48), torch.tensor([0.4]), [torch.randn(7, 24)]
    with torch.no_grad():
        found, expected = (model(*inputs) for model in (again, before))
    rounded = quantized and comfyui.version < INT8_SINCE
    assert rms(found - expected, expected) < (5e-3 if rounded else 1e-6)


@pytest.mark.parametrize("loader", LOADERS)
def test_what_cannot_be_drawn_with_is_named(comfyui, write, klein, loader):
    def refusal(tensors):
        with pytest.raises(Rejected) as rejected:
            comfyui.call("forward", path=write(tensors), loader=loader, inputs="", output="")
        return str(rejected.value)

    part = {
        name: tensor
        for name, tensor in klein.weights.items()
        if not name.startswith("transformer_blocks.0.")
    }
    assert "trained part" in refusal(part) and "l2p merge" in refusal(part)
    lacking = {
        name: tensor
        for name, tensor in klein.weights.items()
        if name != "transformer_blocks.1.attn.norm_q.weight"
    }
    assert "lacks 1 of the model's" in refusal(lacking)
    assert "norm_out.new" in refusal({**klein.weights, "norm_out.new": torch.zeros(1)})
    narrow = "time_guidance_embed.timestep_embedder.linear_1.weight"
    assert f"{narrow} is (32, 32), expected (32, 256)" in refusal(
        {**klein.weights, narrow: torch.zeros(32, 32)}
    )


def test_the_latent_model_is_named(comfyui, klein):
    path = klein.folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(Rejected, match="is a latent FLUX.2-klein, which needs a VAE"):
        comfyui.call("forward", path=path, loader="node", inputs="", output="")


def test_wrong_inputs_are_named(draw):
    with pytest.raises(Rejected, match="8 wide, this model reads 24.*latent_model to FLUX.2-klein"):
        draw(latent_model="Z-Image")
    with pytest.raises(Rejected, match="has 3 layers; this checkpoint takes the hidden state 27"):
        draw(text_encoder="L2P shapes (bundled small model)")
    with pytest.raises(Rejected, match="stage_attention is local, which FLUX.2-klein does not"):
        draw(stage_attention="local")


def test_a_comfyui_that_cannot_run_the_network_says_so(comfyui, klein):
    said, *logged = comfyui.call("broken_flux", path=klein.file)
    assert said.endswith(logged[0]) and len(logged) == 1
    assert logged[0].startswith("ComfyUI-L2P does not work with ComfyUI v")


@pytest.mark.parametrize("size", [1024, 2048])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_comfyui_is_told_the_memory_that_a_pass_takes(comfyui, klein, size, dtype):
    """Counted at the published widths, with one block of each kind."""
    in_flight = comfyui.call("images_in_flight", path=klein.file, size=480)
    arguments = {
        "num_attention_heads": 24,
        "axes_dims_rope": [32] * 4,
        "mlp_ratio": 3.0,
        "num_layers": 1,
        "num_single_layers": 1,
    }
    config = {
        "patch_size": 16,
        "dim": 3072,
        "n_layers": 2,
        "cap_feat_dim": 7680,
        "arguments": arguments,
    }
    told, counted = comfyui.call(
        "memory", config=config, size=size, dtype=dtype, backbone=FLUX2_KLEIN.name
    )
    counted += in_flight * 3 * size**2 * 4
    assert counted <= told < 1.5 * counted
