"""Further latent models against diffusers and transformers themselves, on tiny random models."""

import inspect
import json
import math
import re
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import backbones
import pytest
import torch
import transformers
from comfyui_l2p.l2p_core.backbones import BACKBONES, FLUX2_KLEIN, QWEN_IMAGE
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS
from comfyui_l2p.l2p_core.decoder import LocalDecoder
from comfyui_l2p.l2p_core.estimate import needs, passing
from comfyui_l2p.l2p_core.files.header import CheckpointError
from comfyui_l2p.l2p_core.files.layout import read_layout
from comfyui_l2p.l2p_core.files.load import load_model
from comfyui_l2p.l2p_core.flow import SOLVERS, flow_matching_loss, guided_velocity, schedule
from comfyui_l2p.l2p_core.meter import Meter, bytes_of, peak_bytes
from comfyui_l2p.l2p_core.model import PUBLISHED, Hooks
from comfyui_l2p.l2p_core.pipeline import L2PPipeline
from comfyui_l2p.l2p_core.text import TextEncoder
from comfyui_l2p.l2p_core.train.config import TrainConfig
from comfyui_l2p.l2p_core.train.estimate import estimate
from comfyui_l2p.l2p_core.train.prepare import compute_dtype, make_optimizer, prepare
from comfyui_l2p.l2p_core.transformers_encoder import load_encoder
from helpers import apart, rms
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

diffusers = pytest.importorskip("diffusers", minversion="0.42")
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture(scope="module")
def klein(tmp_path_factory) -> Path:
    """The folder of a tiny FLUX.2-klein, with its pixel initialisation in pixel.safetensors, and
    one with a small decoder in small.safetensors."""
    folder = backbones.save_klein(tmp_path_factory.mktemp("klein"))
    backbones.save_pixel_model(folder / "small.safetensors")
    assert (
        main(["convert", str(folder / "transformer"), "-o", str(folder / "pixel.safetensors")]) == 0
    )
    return folder


@pytest.fixture(scope="module")
def qwen_image(tmp_path_factory) -> Path:
    """The folder of a tiny Qwen-Image, with its pixel initialisation in pixel.safetensors, and one
    with a small decoder in small.safetensors."""
    folder = backbones.save_qwen_image(tmp_path_factory.mktemp("qwen-image"))
    small = folder / "small.safetensors"
    backbones.save_with_decoder(small, QWEN_IMAGE, backbones.qwen_image(768), 8)
    assert (
        main(["convert", str(folder / "transformer"), "-o", str(folder / "pixel.safetensors")]) == 0
    )
    return folder


def reference(weights, image, sigma, prompt, row=FLUX2_KLEIN):
    """Features, by diffusers' own forward up to the input of its output projection, and noise -
    image."""
    transformer = backbones.flux2(768) if row is FLUX2_KLEIN else backbones.qwen_image(768)
    own = {name: tensor for name, tensor in weights.items() if "local_decoder" not in name}
    lacking, unknown = transformer.load_state_dict(own, strict=False)
    assert {name.partition(".")[0] for name in lacking} == {"proj_out"} and not unknown
    pipeline, height, width = diffusers.Flux2KleinPipeline, *image.shape[2:]
    grid = torch.zeros(1, 768, height // 16, width // 16)
    for y in range(height // 16):
        for x in range(width // 16):
            patch = image[0, :, y * 16 : y * 16 + 16, x * 16 : x * 16 + 16]
            grid[0, :, y, x] = patch.flatten()
    if row is FLUX2_KLEIN:
        positions = {
            "img_ids": pipeline._prepare_latent_ids(grid),
            "txt_ids": pipeline._prepare_text_ids(prompt[None]),
        }
    else:
        positions = {"img_shapes": [[(1, *grid.shape[2:])]]}
    taken = []
    transformer.proj_out.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    transformer(
        hidden_states=pipeline._pack_latents(grid),
        encoder_hidden_states=prompt[None],
        timestep=torch.tensor([sigma]),
        guidance=None,
        **positions,
    )
    features = taken[0].transpose(1, 2).unflatten(2, grid.shape[2:])
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    decoder = LocalDecoder(row.config(shapes))
    decoder.load_state_dict(
        {
            name.removeprefix("local_decoder."): tensor
            for name, tensor in weights.items()
            if name.startswith("local_decoder.")
        }
    )
    return features, decoder(image, features)


@pytest.mark.parametrize("row", BACKBONES.values(), ids=BACKBONES)
@torch.no_grad()
def test_a_pass_is_diffusers_own_and_the_decoder(klein, qwen_image, row):
    file = {"flux2-klein": klein, "qwen-image": qwen_image}[row.name] / "pixel.safetensors"
    model, weights = load_model(file, dtype=torch.float32), load_file(file)
    width = model.config.cap_feat_dim
    torch.manual_seed(1)
    images, sigmas = torch.randn(2, 3, 48, 80), (0.75, 0.25)
    prompts = [torch.randn(5, width), torch.randn(9, width)]  # of two lengths in one batch
    t = 1 - torch.tensor(sigmas)
    found, features = model(images, t, prompts), model.features(images, t, prompts)
    for number, sigma in enumerate(sigmas):
        its = slice(number, number + 1)
        expected, velocity = reference(weights, images[its], sigma, prompts[number], row)
        assert rms(features[its] - expected, expected) < 1e-5
        assert rms(found[its] + velocity, velocity) < 1e-5
    for others in ((images, 1 - t, prompts), (images, t, prompts[::-1]), (-images, t, prompts)):
        assert rms(model.features(*others) - features, features) > 1e-2


def test_converting_copies_bit_for_bit_and_draws_the_rest(klein):
    latent = load_file(klein / "transformer" / "diffusion_pytorch_model.safetensors")
    pixel = load_file(klein / "pixel.safetensors")
    new = {name for name in pixel if not torch.equal(pixel[name], latent.get(name, torch.empty(0)))}
    assert set(latent) - set(pixel) == {"proj_out.weight"}
    assert {name for name in new if not name.startswith("local_decoder.")} == {"x_embedder.weight"}
    assert pixel["x_embedder.weight"].shape == (32, 768)
    layout = read_layout(klein / "pixel.safetensors")
    assert layout.config.decoder == PUBLISHED_DECODERS[16]
    assert layout.metadata["l2p.backbone"] == "flux2-klein"


def test_what_its_config_says_otherwise_is_rejected(klein, tmp_path, capsys):
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((klein / "transformer" / name).read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "rope_theta": 500}))
    assert main(["convert", str(tmp_path), "-o", str(tmp_path / "out.safetensors")]) != 0
    assert "rope_theta is 500; expected 2000" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@torch.no_grad()
def test_names_behind_dit_are_read(klein, tmp_path):
    weights = load_file(klein / "pixel.safetensors")
    named = {
        name if name.startswith("local_decoder.") else f"dit.{name}": tensor
        for name, tensor in weights.items()
    }
    save_file(named, tmp_path / "dit.safetensors")
    for name, tensor in load_model(tmp_path / "dit.safetensors", dtype=None).state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_inspect_says_what_it_is(klein, capsys):
    assert main(["inspect", str(klein / "pixel.safetensors")]) == 0
    assert (
        "FLUX.2-klein: width 32, 2 + 3 layers, prompt embeddings of width 24"
        in capsys.readouterr().out
    )
    assert main(["inspect", str(klein / "transformer")]) == 0
    assert "latent FLUX.2-klein" in capsys.readouterr().out


@torch.no_grad()
def test_prompts_are_encoded_as_diffusers_pipeline_encodes_them(klein):
    own = TextEncoder.load(klein, dtype=torch.float32, prompts=FLUX2_KLEIN.prompts)
    prompt = "a red circle"
    expected = diffusers.Flux2KleinPipeline._get_qwen3_prompt_embeds(
        transformers.Qwen3ForCausalLM.from_pretrained(klein / "text_encoder").eval(),
        transformers.AutoTokenizer.from_pretrained(klein / "tokenizer"),
        prompt,
    )[0]
    found = own.encode(prompt)
    assert found.shape == (512, 24)
    assert rms(found - expected, expected) < 1e-5


@torch.no_grad()
def test_prompts_of_qwen_image_are_encoded_as_its_pipeline_encodes_them(qwen_image, tmp_path):
    own = TextEncoder.load(qwen_image, dtype=torch.float32, prompts=QWEN_IMAGE.prompts)
    pipeline = diffusers.QwenImagePipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            qwen_image / "text_encoder"
        ).eval(),
        tokenizer=transformers.AutoTokenizer.from_pretrained(qwen_image / "tokenizer"),
    )
    (expected,), _ = pipeline._get_qwen_prompt_embeds("a red circle", "cpu")
    assert rms(own.encode("a red circle") - expected, expected) < 1e-5
    assert rms(own.encode("a blue circle")[: len(expected)] - expected, expected) > 1e-2

    shutil.copytree(qwen_image / "text_encoder", tmp_path / "lacking")
    weights = load_file(file := tmp_path / "lacking" / "model.safetensors")
    lacks = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    del weights[lacks]
    save_file(weights, file, {"format": "pt"})
    for folder, message in ((tmp_path / "lacking", "lacks 1 tensors"), (tmp_path, "of type no")):
        with pytest.raises(CheckpointError, match=message):
            load_encoder(folder, QWEN_IMAGE.prompts.model_type, torch.float32)


@pytest.mark.parametrize("row", BACKBONES.values(), ids=BACKBONES)
def test_diffusers_is_what_the_table_was_written_for(row):
    """Fails where a release moves what a row relies on, or lies outside of the extra's bounds."""
    model = getattr(diffusers, row.diffusers_class)
    found = inspect.signature(model.forward).parameters
    taken = row.inputs(
        torch.zeros(1, 2, 768), torch.ones(1), torch.zeros(1, 3, 24), 1, 2, PUBLISHED
    )
    assert {*taken, "return_dict"} <= set(found)
    required = [name for name, each in found.items() if each.default is each.empty]
    assert set(required) <= {"self", *taken}
    settings = inspect.signature(model.__init__).parameters
    for name, value in row.settings.items():
        assert settings[name].default == value
    bounds = re.search(
        r'^backbones = \["diffusers>=([\d.]+),<([\d.]+)"', PYPROJECT.read_text(), re.M
    )
    low, high = (tuple(map(int, bound.split("."))) for bound in bounds.groups())
    assert low <= tuple(map(int, version("diffusers").split(".")[:2])) < high


@torch.no_grad()
def test_generating_is_the_formula_longhand(klein):
    """Schedule, guidance, time and sign, with diffusers' own forward in each step."""
    pipe = L2PPipeline.from_pretrained(
        klein / "small.safetensors", klein, device="cpu", torch_dtype=torch.float32
    )
    image = pipe("a red circle", seed=3, height=32, width=48, num_inference_steps=3)
    weights = load_file(klein / "small.safetensors")
    embeds = [pipe.encode_prompt(prompt) for prompt in ("a red circle", "")]
    x = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    shift = math.exp(2.02)
    sigmas = [shift / (shift + 1 / even - 1) for even in (1, 2 / 3, 1 / 3)] + [0.0]
    for sigma, after in zip(sigmas, sigmas[1:]):
        positive, negative = (reference(weights, x, sigma, each)[1] for each in embeds)
        x = x + (after - sigma) * (negative + 4 * (positive - negative))
    expected = ((x[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).numpy()
    assert apart(image, expected.round()) <= 1
    assert pipe.defaults[:2] == (50, 4.0)
    for unsupported in ({"cache_threshold": 0.1}, {"stage_attention": "local"}):
        with pytest.raises(ValueError, match="which FLUX.2-klein does not support"):
            pipe.complete(unsupported)
    pipe = L2PPipeline.from_pretrained(
        klein / "small.safetensors", klein, device="cpu", attention="flash"
    )
    with pytest.raises(ValueError, match="attention is flash, which FLUX.2-klein does not support"):
        assert pipe.transformer


def train(klein, data, output, **settings):
    """Two steps of training through the command line."""
    flags = {
        "checkpoint": klein / "small.safetensors",
        "text-encoder": klein,
        "data": data,
        "cache": klein / "prompts",
        "output": output,
        "steps": 2,
        "batch": 2,
        "mixed-precision": "no",
        "device": "cpu",
        "sample-every": 0,
        "height": 32,
        "width": 32,
        "learning-rate": 0.01,
        **settings,
    }
    command = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert main(["train", *command]) == 0
    return output / "step-2.safetensors"


@pytest.fixture
def data(tmp_path):
    """Two images with one caption."""
    for number in range(2):
        name = tmp_path / "data" / f"{number}"
        name.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), ("red", "blue")[number]).save(name.with_suffix(".png"))
        name.with_suffix(".txt").write_text("a red circle")
    return tmp_path / "data"


@pytest.mark.slow
def test_training_moves_what_the_table_says_and_merges(klein, data, tmp_path):
    step = train(klein, data, tmp_path / "run", freeze="1:-1")
    before, part = load_file(klein / "small.safetensors"), load_file(step)
    shared = ("time_guidance_embed", "double_stream_mod", "single_stream_mod")
    frozen = "transformer_blocks.1.", *(f"single_transformer_blocks.{number}." for number in (0, 1))
    assert set(part) == {name for name in before if not name.startswith((*shared, *frozen))}
    still = [name for name in part if torch.equal(part[name], before[name])]
    assert not still, "gradients reach all that trains"
    assert read_layout(step).kind == "part"

    command = ["--trained", str(step), "--base", str(klein / "small.safetensors")]
    assert main(["merge", *command, "-o", str(tmp_path / "merged.safetensors")]) == 0
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[name], part.get(name, before[name])) for name in before)
    assert read_layout(tmp_path / "merged.safetensors").metadata["l2p.backbone"] == "flux2-klein"


@pytest.mark.slow
def test_a_lora_trains_beside_frozen_blocks_and_merges(klein, data, tmp_path):
    step = train(klein, data, tmp_path / "run", **{"lora-rank": 2})
    layers = {name.rpartition(".lora_")[0] for name in load_file(step)}
    blocks = {name.split(".")[1] for name in layers}
    assert blocks == {"transformer_blocks", "single_transformer_blocks"}
    assert len(layers) == 2 * (8 + 4) + 3 * 2
    small = klein / "small.safetensors"
    command = ["--trained", str(step), "--base", str(small)]
    assert main(["merge", *command, "-o", str(tmp_path / "merged.safetensors")]) == 0
    inputs = torch.randn(1, 3, 32, 32), torch.tensor([0.5]), [torch.randn(5, 24)]
    features = []
    for file, lora in ((tmp_path / "merged.safetensors", None), (small, step), (small, None)):
        pipe = L2PPipeline.from_pretrained(file, klein, device="cpu", torch_dtype=torch.float32)
        if lora:
            pipe.load_lora(lora)
        with torch.no_grad():
            features.append(pipe.transformer.features(*inputs))
    assert rms(features[1] - features[0], features[0]) < 1e-5
    assert rms(features[2] - features[0], features[0]) > 1e-4


@torch.no_grad()
def test_int8_blocks_generate_as_the_whole_model(klein, tmp_path):
    pytest.importorskip("comfy_kitchen")
    small, out = klein / "small.safetensors", tmp_path / "int8.safetensors"
    assert main(["quantize", str(small), "-o", str(out), "--preset", "small", "--verify"]) == 0
    layout = read_layout(out)
    eight_bits = {name for name, source in layout.tensors.items() if source.format}
    linears = {
        name
        for name, tensor in load_file(small).items()
        if "transformer_blocks." in name and tensor.dim() == 2
    }
    assert eight_bits == linears and len(linears) == 2 * 12 + 3 * 2
    inputs = torch.randn(1, 3, 32, 48), torch.tensor([0.4]), [torch.randn(7, 24)]
    whole, quantized = (load_model(file, dtype=torch.float32) for file in (small, out))
    expected = whole.features(*inputs)
    assert rms(quantized.features(*inputs) - expected, expected) < 0.05
    assert main(["quantize", str(small), "-o", str(out)]) == 0
    kept = {name for name, source in read_layout(out).tensors.items() if not source.format}
    assert {name for name in linears if name.startswith("transformer_blocks.0.")} == kept & linears


@pytest.mark.parametrize("row", BACKBONES)
@torch.no_grad()
def test_the_estimate_of_a_pass_is_what_it_holds(klein, qwen_image, row):
    file = {"flux2-klein": klein, "qwen-image": qwen_image}[row] / "small.safetensors"
    pipe = L2PPipeline.from_pretrained(file, file.parent, device="cpu", torch_dtype=torch.float32)
    settings = pipe.complete(
        {"height": 256, "width": 256, "cfg_scale": 1, "num_inference_steps": 2}
    )
    model = pipe.transformer
    prompt = torch.randn(512, model.config.cap_feat_dim)

    def generate():
        noise = torch.randn(1, 3, 256, 256)
        velocity = guided_velocity(model, [prompt], [prompt], 1)
        return SOLVERS[settings.sampler](velocity, noise, schedule(2))

    peak, images = peak_bytes(generate)
    assert passing(pipe, settings, 1, None) == pytest.approx(peak + images.nbytes, rel=0.1)
    assert needs(pipe, settings, 1).model == sum(each.nbytes for each in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("row", BACKBONES)
@pytest.mark.parametrize(
    "changes",
    [
        {"freeze": "1:-1", "mixed_precision": "no"},
        {"freeze": "1:-1", "mixed_precision": "bf16"},
        {"freeze": "", "checkpointing": False, "mixed_precision": "no"},
        {"lora_rank": 2, "mixed_precision": "bf16"},
    ],
    ids=["float32", "bf16", "everything", "LoRA"],
)
def test_the_estimate_of_training_is_what_a_step_holds(klein, qwen_image, row, changes):
    """Weights, gradients, state and activations, by the same counter over real tensors."""
    file = {"flux2-klein": klein, "qwen-image": qwen_image}[row] / "small.safetensors"
    settings = TrainConfig(
        checkpoint=str(file),
        data="none",
        output="none",
        device="cpu",
        batch=2,
        height=96,
        width=96,
        **changes,
    )
    dtype = compute_dtype(settings)
    model = load_model(file, dtype=dtype)
    width = model.config.cap_feat_dim
    optimizer = make_optimizer(prepare(model, settings), settings)
    inputs = (
        torch.randn(2, 3, 96, 96),
        [torch.randn(512, width).to(dtype) for _ in range(2)],
        torch.randn(2, 3, 96, 96),
        torch.rand(2),
    )

    def step():
        bfloat16 = dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, bfloat16, cache_enabled=False):
            loss = flow_matching_loss(model, *inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    with Meter() as meter:
        step()
    state = bytes_of(tree_leaves(optimizer.state_dict()))
    held = bytes_of(model.state_dict().values()) + state + meter.peak()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that bfloat16 and float32 meet in a norm
        found = estimate(settings)
    assert found["total"] == pytest.approx(held, rel=0.1)
    # The peak of a step is what this test is about; weights and state are small beside it.
    assert found["gradients"] + found["activations and buffers"] == pytest.approx(
        meter.peak(), rel=0.1
    )


@pytest.mark.slow
@pytest.mark.parametrize("row", BACKBONES)
def test_norms_in_training_give_the_dtype_they_are_given(klein, qwen_image, row, monkeypatch):
    """CUDA's autocast would give float32, for which more is kept for the backward pass."""
    file = {"flux2-klein": klein, "qwen-image": qwen_image}[row] / "small.safetensors"
    settings = TrainConfig(checkpoint=str(file), data="none", output="none", freeze="1:-1")
    model = load_model(file, dtype=torch.bfloat16)
    prepare(model, settings)
    norm, casts = torch.nn.functional.layer_norm, []

    def looks(*args, **kwargs):
        casts.append(torch.is_autocast_enabled("cpu"))
        return norm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", looks)
    with torch.autocast("cpu", torch.bfloat16):
        model(
            torch.zeros(1, 3, 32, 32),
            torch.zeros(1),
            [torch.zeros(5, model.config.cap_feat_dim)],
        )
    assert casts and not any(casts)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("aten::layer_norm", "AutocastCUDA")


def test_what_qwen_image_cannot_redraw_is_rejected_before_anything_is_loaded(klein, qwen_image):
    pipe, other = (
        L2PPipeline.from_pretrained(folder / "small.safetensors", folder, device="cpu")
        for folder in (qwen_image, klein)
    )
    given = {"height": 2048, "width": 2048, "stages": 2, "redraw": "interpolated"}
    with pytest.raises(ValueError, match="redraw is interpolated, and Qwen-Image can't scale"):
        pipe("a red circle", **given)
    assert not {"transformer", "text_encoder"} & set(vars(pipe))
    pipe.plan_stages(pipe.complete({**given, "redraw": "tiled"}))
    pipe.plan_stages(pipe.complete({**given, "stages": 1}))  # nothing is redrawn
    other.plan_stages(other.complete(given))
    model = load_model(qwen_image / "small.safetensors", dtype=torch.float32)
    prompt = [torch.zeros(3, model.config.cap_feat_dim)]
    with pytest.raises(ValueError, match="Qwen-Image can't scale"):
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1), prompt, Hooks(rope_scale=(0.5, 0.5)))
