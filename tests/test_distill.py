"""Distillation: its targets by hand, a student that beats its teacher in few steps, the defaults
that its files carry, and runs that resume."""

import json
from dataclasses import replace

import pytest
import torch
from comfyui_l2p.l2p_core import L2PConfig, L2PPipeline, L2PTransformer, cli, read_layout
from comfyui_l2p.l2p_core.config import Level
from comfyui_l2p.l2p_core.flow import euler, guided_velocity, schedule
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.train.config import read_config_of
from comfyui_l2p.l2p_core.train.distill import DistillRun, distill, shift_of
from comfyui_l2p.l2p_core.train.distill_config import DistillConfig
from comfyui_l2p.quant.merge import merge
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("accelerate")

ENCODER = BUNDLED_MODEL / "text_encoder"
PROMPTS = [
    "a large red circle on a blue background, left",
    "a small yellow square on a black background, top",
    "a large green diamond on a white background, center",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with random weights, of prompts as the bundled text encoder encodes them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        levels = tuple(Level(str(number), 8, 8, 8) for number in range(1, 5))
        model = L2PTransformer(L2PConfig(16, 96, 3, 2, 1, 64, 96, 64, levels, 16))
        for weight in model.parameters():
            weight.data *= 2 if weight.dim() > 1 else 1  # so that prompts matter
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_file(model.state_dict(), path, {"modelspec.resolution": "32x32"})
    return path


@pytest.fixture
def config(tmp_path, checkpoint):
    """config(**changes) → settings of a run of four short steps on three prompts."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def make(**changes):
        settings = {
            "checkpoint": str(checkpoint),
            "text_encoder": str(ENCODER),
            "prompts": str(prompts),
            "output": str(tmp_path / "run"),
            "student_steps": 2,
            "teacher_substeps": 2,
            "steps": 4,
            "batch": 2,
            "accumulate": 1,
            "freeze": "",
            "checkpointing": False,
            "mixed_precision": "no",
            "device": "cpu",
            "save_every": 2,
            "sample_every": 0,
            "learning_rate": 1e-3,
        }
        return DistillConfig(**{**settings, **changes})

    return make


def shifted(even):
    """The published schedule, shift 3."""
    return 3 * even / (1 + 2 * even)


@pytest.mark.slow
@pytest.mark.parametrize("student_steps", [0, 2])
def test_the_target_is_the_teachers_at_a_state_that_the_student_comes_to(
    config, checkpoint, student_steps
):
    run = DistillRun(config(student_steps=student_steps, teacher_guidance=3.0), progress=False)
    pipe = L2PPipeline.from_pretrained(checkpoint, ENCODER, device="cpu", torch_dtype=torch.float32)
    teacher, student = pipe.transformer, run.pipe.transformer
    with torch.no_grad():
        for weight in run.trained.values():
            weight.mul_(1.01)  # so that the two differ
    none = [pipe.encode_prompt("")] * 2

    def passed(model, x, sigma, prompts):
        return -model(x, torch.full((2,), 1 - sigma), prompts)

    def guided(x, sigma):
        negative = passed(teacher, x, sigma, none)
        return negative + 3 * (passed(teacher, x, sigma, batch.captions) - negative)

    count, seen = student_steps or 8, set()
    levels = [shifted(1 - k / count) for k in range(count)]
    for number in range(count):
        batch = run.batch(number)
        sigma = batch.sigma[0].item()
        seen.add(round(sigma, 4))
        x, target, length = run.example(batch)
        with torch.no_grad():
            by_hand = batch.noise
            before = [level for level in levels if level > sigma + 1e-5]
            for level, after in zip(before, [*before, sigma][1:], strict=True):
                v = passed(student, by_hand, level, batch.captions)
                by_hand = by_hand + (after - level) * v
            assert torch.allclose(x, by_hand, atol=1e-4)
            if not student_steps:
                assert torch.allclose(target, guided(x, sigma), atol=1e-4) and length == 1
                continue
            start = 1 - len(before) / 2
            middle, end = shifted(start - 1 / 4), shifted(start - 1 / 2)
            at_middle = x + (middle - sigma) * guided(x, sigma)
            at_end = at_middle + (end - middle) * guided(at_middle, middle)
            assert torch.allclose(target, (x - at_end) / (sigma - end), atol=1e-4)
            assert length == pytest.approx((sigma - end) / (1 / 2))
    assert len(seen) == count and (not student_steps or seen == {1.0, 0.75})


@pytest.mark.slow
def test_a_student_comes_nearer_to_the_teachers_images_than_the_teacher_in_its_steps(config):
    settings = config(steps=30, batch=4, accumulate=2, teacher_guidance=4.0, learning_rate=2e-4)
    file = distill(settings, progress=False)
    teacher, student = (
        L2PPipeline.from_pretrained(each, ENCODER, torch_dtype=torch.float32, device="cpu")
        for each in (settings.checkpoint, file)
    )
    prompt = [teacher.encode_prompt(PROMPTS[0])] * 16
    none = [teacher.encode_prompt("")] * 16
    noise = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def image(pipe, scale, steps):
        velocity = guided_velocity(pipe.transformer, prompt, none, scale)
        return euler(velocity, noise, schedule(steps))

    wanted = image(teacher, 4.0, 4)
    before, after = ((image(pipe, 1.0, 2) - wanted).square().mean() for pipe in (teacher, student))
    assert after < 0.6 * before


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_only_as_it_was(config, tmp_path):
    whole = load_file(distill(config(output=str(tmp_path / "whole"), ema=0.9), progress=False))
    distill(config(steps=2, schedule="constant", ema=0.9), progress=False)
    with pytest.raises(ValueError, match="schedule 'constant', now 'linear'"):
        distill(config(ema=0.9), progress=False)
    with pytest.raises(ValueError, match="student_steps 2, now 4"):
        distill(config(schedule="constant", ema=0.9, student_steps=4), progress=False)
    parts = load_file(distill(config(schedule="constant", ema=0.9), progress=False))
    other = config(output=str(tmp_path / "constant"), schedule="constant", ema=0.9)
    straight = load_file(distill(other, progress=False))
    assert all(torch.equal(parts[name], straight[name]) for name in straight)
    assert not all(torch.equal(whole[name], straight[name]) for name in straight)
    report = (tmp_path / "constant" / "report.html").read_text()
    assert "32 x 32: 3 prompts" in report and "3 prompts of" in report
    assert "images," not in report and "captions" not in report


@pytest.mark.slow
def test_every_loader_takes_the_defaults_of_a_distilled_file(config, checkpoint, tmp_path, capsys):
    lora = distill(config(steps=1, lora_rank=2, student_steps=3), progress=False)
    merged = tmp_path / "merged.safetensors"
    merge(lora, checkpoint, merged)
    assert json.loads(read_layout(merged).metadata["l2p.default_settings"]) == {
        "cfg_scale": 1.0,
        "shift": 3.0,
        "num_inference_steps": 3,
        "sampler": "euler",
    }
    pipe = L2PPipeline.from_pretrained(merged, ENCODER, device="cpu")
    assert pipe.defaults[:2] == (3, 1.0)
    assert pipe.complete({"num_inference_steps": 5}).num_inference_steps == 5

    pipe = L2PPipeline.from_pretrained(checkpoint, ENCODER, device="cpu")
    pipe.load_lora(lora)
    assert pipe.complete({}).num_inference_steps == 3 and pipe.complete({}).cfg_scale == 1
    pipe.unload_loras()
    assert pipe.defaults[:2] == (30, 2.0)

    out = tmp_path / "out.png"
    model = ["--checkpoint", str(checkpoint), "--text-encoder", str(ENCODER)]
    command = ["generate", PROMPTS[0], "-o", str(out), *model, "--lora", str(lora)]
    assert cli.main([*command, "--cfg-scale", "1.5"]) == 0
    record = json.loads(Image.open(out).info["l2p"])
    assert record["num_inference_steps"] == 3 and record["cfg_scale"] == 1.5
    capsys.readouterr()
    assert cli.main(["inspect", str(merged)]) == 0
    assert "default settings: num_inference_steps 3, cfg_scale 1.0" in capsys.readouterr().out


def test_the_students_shift_is_the_checkpoints_own_unless_it_is_set(config, checkpoint, tmp_path):
    own = tmp_path / "own.safetensors"
    save_file(load_file(checkpoint), own, {"l2p.default_settings": '{"shift": 1.5}'})
    assert shift_of(config()) == 3.0  # the published one
    assert shift_of(config(checkpoint=str(own))) == 1.5
    assert shift_of(config(checkpoint=str(own), shift=2.0)) == 2.0


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"num_inference_steps": "many", "cfg_scale": -1}', '{"seed": 1}', "{" * 99]
)
def test_defaults_that_make_no_sense_are_left_out(text):
    layout = read_layout(BUNDLED_MODEL / "transformer.safetensors")
    assert replace(layout, metadata={"l2p.default_settings": text}).default_settings == {}


def test_bad_input_ends_in_a_sentence(config, tmp_path):
    with pytest.raises(ValueError, match="prompts is not given"):
        config(prompts="")
    with pytest.raises(ValueError, match="noise is 'paired', and distillation has no use for it"):
        config(noise="paired")
    with pytest.raises(ValueError, match="teacher_substeps is 0; expected 1 or more"):
        config(teacher_substeps=0)
    with pytest.raises(ValueError, match="held_out is 3, and prompts.txt holds 3 prompts"):
        distill(config(held_out=3, sample_every=1), progress=False)
    odd = tmp_path / "odd.csv"
    odd.write_text("prompt,height\na star,40\n")
    with pytest.raises(ValueError, match="odd.csv, prompt 1: .*16"):
        distill(config(prompts=str(odd)), progress=False)
    toml = tmp_path / "run.toml"
    toml.write_text("student_step = 1\n")
    with pytest.raises(ValueError, match="no setting student_step; did you mean student_steps"):
        read_config_of(DistillConfig, toml, {})
