"""What `l2p generate --estimate` says against what generating really holds."""

from dataclasses import replace

import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.devices import memory_counter
from comfyui_l2p.l2p_core.estimate import estimate
from comfyui_l2p.l2p_core.files.load import bytes_in_memory
from comfyui_l2p.l2p_core.files.quantization import hadamard
from comfyui_l2p.l2p_core.fit import RESERVE, SHARE, Needs, place
from comfyui_l2p.l2p_core.flow import euler, guided_velocity, schedule
from comfyui_l2p.l2p_core.meter import Meter, bytes_of, peak_on, shapes_only
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.settings import Settings
from comfyui_l2p.quant.quantize import quantize
from helpers import apart
from PIL import Image


def image(side: int, cfg_scale: float) -> Settings:
    return Settings(
        height=side, width=side, num_inference_steps=30, cfg_scale=cfg_scale, stage_strength=0.3
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch, side, cfg_scale", [(1, 96, 1.0), (2, 192, 2.0)])
def test_the_estimate_is_what_drawing_holds(batch, side, cfg_scale):
    pipe = L2PPipeline.from_pretrained()
    parts, passes = estimate(pipe, image(side, cfg_scale), batch, free_text_encoder=False)
    model = pipe.transformer
    assert parts["model"] == bytes_of(model.state_dict().values())
    assert parts["text encoder"] == pytest.approx(
        bytes_of(pipe.text_encoder.model.state_dict().values()), rel=0.01
    )
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")
    assert passes == [(30 if cfg_scale == 1 else 60, side, side)]
    with Meter() as meter:
        captions = [torch.randn(512, 96, dtype=torch.bfloat16) for _ in range(batch)]
        euler(
            guided_velocity(model, captions, captions, cfg_scale),
            torch.randn(batch, 3, side, side),
            schedule(2),
        )
    assert parts["images and activations"] == pytest.approx(meter.peak(), rel=0.02)


@pytest.mark.slow
def test_windows_hold_little_and_ask_often():
    pipe = L2PPipeline.from_pretrained()
    staged = replace(image(384, 2.0), stages=3)
    whole, windows = replace(staged, stage_cfg_scale=1.0), replace(staged, redraw="tiled")
    (whole, whole_passes), (windows, windows_passes) = (
        estimate(pipe, each, 1, free_text_encoder=False) for each in (whole, windows)
    )
    assert whole_passes == [(60, 96, 96), (9, 192, 192), (9, 384, 384)]
    assert windows_passes == [(60, 96, 96), (18 * 9, 96, 96), (18 * 25, 96, 96)]
    assert windows["images and activations"] < whole["images and activations"] / 2


@pytest.mark.slow
def test_streamed_blocks_wait_in_the_cpus_memory():
    (whole, _), (streamed, _) = (
        estimate(
            L2PPipeline.from_pretrained(offload=offload),
            image(96, 2.0),
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


# Bytes of an encoder of 8, a model of 12 and images of 1, of 0.4 in small tiles. Streamed, 2 stay.
NEEDS = Needs(8 * 10**9, 12 * 10**9, 2 * 10**9, lambda tile: 4 * 10**8 if tile else 10**9)


@pytest.mark.parametrize(
    "usable, freed, streamed, tile, on_cpu",
    [
        (21.1, False, False, None, False),
        (20.9, True, False, None, False),
        (13.1, True, False, None, False),
        (12.9, True, False, 512, False),
        (12.3, False, True, None, False),  # 8 + 2 + 1
        (10.9, True, True, None, False),
        (7.9, False, True, None, True),
        (2.9, True, True, 512, True),
    ],
)
def test_the_fastest_placement_that_fits_is_chosen(usable, freed, streamed, tile, on_cpu):
    chosen = place(NEEDS, round((usable * 1e9 + RESERVE) / SHARE))
    assert chosen.offload == streamed and chosen.decoder_tile == tile
    assert chosen.encode_on_cpu == on_cpu and (on_cpu or chosen.free_text_encoder == freed)
    assert f"{usable:.1f} GB usable" in chosen.reason and "\n" not in chosen.reason


def test_what_the_user_asks_for_is_kept():
    free = round((30e9 + RESERVE) / SHARE)
    chosen = place(NEEDS, free, free_text_encoder=True, offload=True, decoder_tile=128)
    assert chosen[:3] == (True, True, 128)
    small = place(NEEDS, round((4e9 + RESERVE) / SHARE), offload=False)
    assert not small.offload and "may run out of memory" in small.reason


def test_without_diffusers_nothing_is_streamed():
    chosen = place(NEEDS, round((9e9 + RESERVE) / SHARE), can_stream=False)
    assert not chosen.offload and "comfyui-l2p[offload]" in chosen.reason


@pytest.mark.slow
@pytest.mark.parametrize("free, words", [(10**9, "stays"), (10**6, "offloaded")])
def test_a_full_device_still_draws_the_same(tmp_path, monkeypatch, capsys, free, words):
    """The CPU stands in for an accelerator with so many free bytes."""
    plain, placed = tmp_path / "plain.png", tmp_path / "placed.png"
    command = ["generate", "a red circle", "--steps", "2", "--output"]
    assert main([*command, str(plain)]) == 0
    assert "Memory:" not in capsys.readouterr().out
    for module in ("pipeline", "batch"):
        monkeypatch.setattr(f"comfyui_l2p.l2p_core.{module}.free_memory", lambda _: free)
    assert main([*command, str(placed)]) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "Memory:" in line]
    assert words in said
    assert apart(Image.open(plain), Image.open(placed)) <= 1


@pytest.mark.slow
def test_python_makes_room_before_it_loads_the_model(monkeypatch):
    pipe = L2PPipeline.from_pretrained()
    size = sum(bytes_in_memory(pipe.layout, pipe.dtype).values())
    free = round((size + 2e7 + RESERVE) / SHARE)  # the model and its images, but not the encoder
    monkeypatch.setattr("comfyui_l2p.l2p_core.pipeline.free_memory", lambda _: free)
    monkeypatch.setattr("comfyui_l2p.l2p_core.estimate.encoder_bytes", lambda *_: size + 10**7)
    pipe("a red circle", seed=1, num_inference_steps=1)
    assert not pipe.streamed and "text_encoder" not in vars(pipe)


@pytest.mark.slow
def test_an_estimate_plans_for_a_given_memory(capsys):
    assert main(["generate", "--estimate", "--memory", "0.5"]) == 0
    assert "offloaded" in capsys.readouterr().out
    assert main(["generate", "--estimate", "--memory", "-1"]) == 1


@pytest.mark.slow
def test_int8_counts_as_it_is_kept(tmp_path):
    quantize(BUNDLED_MODEL / "transformer.safetensors", tmp_path / "int8.safetensors")
    pipe = L2PPipeline.from_pretrained(
        tmp_path / "int8.safetensors", text_encoder=BUNDLED_MODEL / "text_encoder"
    )
    parts, _ = estimate(pipe, image(96, 2.0), 1, free_text_encoder=True)
    assert parts["model"] == pytest.approx(
        bytes_of(pipe.transformer.state_dict().values()), rel=0.01
    )
    assert "text encoder" not in parts


@pytest.mark.slow
def test_the_estimate_takes_the_checkpoint_alone(tmp_path, capsys):
    quantize(BUNDLED_MODEL / "transformer.safetensors", tmp_path / "int8.safetensors")
    assert main(["generate", "--estimate", "--checkpoint", str(tmp_path / "int8.safetensors")]) == 0
    told = capsys.readouterr().out
    assert "total" in told and "the text encoder is not counted" in told


@pytest.mark.slow
def test_the_command_estimates_and_draws_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--estimate", "--height", "960", "--width", "96", "--steps", "7"]) == 0
    told = capsys.readouterr().out
    assert "total" in told and "passes through the model: 14 of 1 x 96 x 960 pixels" in told
    assert not list(tmp_path.iterdir())


def test_an_accelerator_counts_its_own_peak(monkeypatch):
    """Where torch keeps a peak for it; elsewhere the tensors that are alive are counted."""
    assert memory_counter(torch.device("cuda", 1)) is torch.cuda
    assert memory_counter(torch.device("xpu")) is torch.xpu
    assert memory_counter(torch.device("mps")) is None
    held = {"now": 1000, "peak": 9000}

    def run():
        held["peak"] = max(held["peak"], 3500)
        torch.empty(250, dtype=torch.float32).clone()

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=held["now"])
    )
    assert peak_on(torch.device("cuda"), run) == 2500
    assert peak_on(torch.device("cpu"), run) == 2000


def test_counting_leaves_no_matrix_without_numbers():
    """Whichever is asked for first, rotated weights are read after a count as before it."""
    hadamard.cache_clear()
    with shapes_only():
        hadamard(16)
    assert torch.equal(hadamard(16) @ hadamard(16).T, torch.eye(16))
