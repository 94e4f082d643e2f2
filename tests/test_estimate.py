"""What `l2p generate --estimate` says against what drawing really holds."""

from dataclasses import replace

import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.estimate import estimate
from comfyui_l2p.l2p_core.flow import euler, guided_velocity, schedule
from comfyui_l2p.l2p_core.meter import Meter, bytes_of
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.settings import Settings
from comfyui_l2p.quant.quantize import quantize


def picture(side: int, cfg_scale: float) -> Settings:
    return Settings(
        height=side, width=side, num_inference_steps=30, cfg_scale=cfg_scale, stage_strength=0.3
    )


@pytest.mark.parametrize("batch, side, cfg_scale", [(1, 96, 1.0), (2, 192, 2.0)])
def test_the_estimate_is_what_drawing_holds(batch, side, cfg_scale):
    pipe = L2PPipeline.from_pretrained()
    parts, passes = estimate(pipe, picture(side, cfg_scale), batch, free_text_encoder=False)
    model = pipe.transformer
    assert parts["model"] == bytes_of(model.state_dict().values())
    assert parts["text encoder"] == pytest.approx(
        bytes_of(pipe.text_encoder.model.state_dict().values()), rel=0.01
    )
    assert parts["in all"] == sum(size for name, size in parts.items() if name != "in all")
    assert passes == [(30 if cfg_scale == 1 else 60, side, side)]
    with Meter() as meter:
        captions = [torch.randn(512, 96, dtype=torch.bfloat16) for _ in range(batch)]
        euler(
            guided_velocity(model, captions, captions, cfg_scale),
            torch.randn(batch, 3, side, side),
            schedule(2),
        )
    assert parts["pictures and what passes"] == pytest.approx(meter.peak(), rel=0.02)


def test_windows_hold_little_and_ask_often():
    pipe = L2PPipeline.from_pretrained()
    whole, windows = (
        replace(picture(384, 2.0), stages=3, redraw=redraw) for redraw in ("squeezed", "windows")
    )
    (whole, whole_passes), (windows, windows_passes) = (
        estimate(pipe, each, 1, free_text_encoder=False) for each in (whole, windows)
    )
    assert whole_passes == [(60, 96, 96), (18, 192, 192), (18, 384, 384)]
    assert windows_passes == [(60, 96, 96), (18 * 9, 96, 96), (18 * 25, 96, 96)]
    assert windows["pictures and what passes"] < whole["pictures and what passes"] / 2


def test_streamed_blocks_wait_in_the_cpus_memory():
    (whole, _), (streamed, _) = (
        estimate(
            L2PPipeline.from_pretrained(offload=offload),
            picture(96, 2.0),
            1,
            free_text_encoder=True,
        )
        for offload in (False, True)
    )
    model = L2PPipeline.from_pretrained().transformer
    blocks = sorted(
        bytes_of(block.state_dict().values())
        for part in (model.layers, model.noise_refiner, model.context_refiner)
        for block in part
    )
    assert streamed["in the CPU's memory"] == whole["model"]
    assert streamed["model"] == whole["model"] - sum(blocks[:-2])


@pytest.mark.parametrize(
    "device, free, streamed", [("cuda", 1.2, True), ("cuda", 1.3, False), ("cpu", 1.2, False)]
)
def test_weights_that_would_fill_a_gpu_are_streamed(monkeypatch, device, free, streamed):
    """free: times the weights."""
    pipe = L2PPipeline.from_pretrained()
    weights = estimate(pipe, picture(96, 2.0), 1, free_text_encoder=True)[0]["model"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * weights),) * 2)
    pipe.device = torch.device(device)
    parts, _ = estimate(pipe, picture(96, 2.0), 1, free_text_encoder=True)
    assert parts.get("in the CPU's memory") == (weights if streamed else None)


def test_int8_counts_as_it_is_kept(tmp_path):
    quantize(BUNDLED_MODEL / "transformer.safetensors", tmp_path / "int8.safetensors")
    pipe = L2PPipeline.from_pretrained(
        tmp_path / "int8.safetensors", text_encoder=BUNDLED_MODEL / "text_encoder"
    )
    parts, _ = estimate(pipe, picture(96, 2.0), 1, free_text_encoder=True)
    assert parts["model"] == pytest.approx(
        bytes_of(pipe.transformer.state_dict().values()), rel=0.01
    )
    assert "text encoder" not in parts


def test_the_estimate_takes_the_checkpoint_alone(tmp_path, capsys):
    quantize(BUNDLED_MODEL / "transformer.safetensors", tmp_path / "int8.safetensors")
    assert main(["generate", "--estimate", "--checkpoint", str(tmp_path / "int8.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "in all" in told and "the text encoder is not counted" in told


def test_the_command_estimates_and_draws_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--estimate", "--height", "960", "--width", "96", "--steps", "7"]) == 0
    told = capsys.readouterr().out
    assert "in all" in told and "passes through the model: 14 of 1 x 96 x 960 pixels" in told
    assert not list(tmp_path.iterdir())
