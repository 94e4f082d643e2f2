"""The recipe of the small model's worlds runs, resumes bit for bit, and its parts do what they
say."""

import json
import random
from pathlib import Path

import pytest
import torch
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.model import L2PTransformer
from comfyui_l2p.l2p_core.shapes import recipe
from comfyui_l2p.l2p_core.shapes.recipe import WINDOW, Guide, encode, window_levels
from comfyui_l2p.l2p_core.shapes.world import PLACES_WORLD, prompt_for
from comfyui_l2p.l2p_core.text import TextEncoder
from PIL import Image
from safetensors.torch import load_file

LAYOUT, WHOLE = (Path(recipe.__file__).with_name(name) for name in ("layout.toml", "world.toml"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setenv("L2P_COMPILE", "0")  # compiling takes a minute
    monkeypatch.setattr(recipe, "VOCABULARY_PROMPTS", 200)
    monkeypatch.setattr(recipe.WholeRun, "SCORED", 2)
    monkeypatch.setattr(recipe, "GATE_LEVELS", (0.04,))


def run(folder, monkeypatch, file, *flags):
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    assert (
        main(
            [
                "train",
                str(file),
                "--batch",
                "2",
                "--save-every",
                "2",
                "--device",
                "cpu",
                "--schedule",
                "constant",
                "--mixed-precision",
                "no",  # bfloat16 is slow where a CPU has no arithmetic for it
                *flags,
            ]
        )
        == 0
    )


@pytest.mark.slow
def test_both_runs_train_and_a_stopped_one_resumes_bit_for_bit(tmp_path, monkeypatch):
    run(tmp_path / "whole", monkeypatch, LAYOUT, "--steps", "4", "--sample-every", "4")
    run(tmp_path / "halves", monkeypatch, LAYOUT, "--steps", "2", "--sample-every", "0")
    run(tmp_path / "halves", monkeypatch, LAYOUT, "--steps", "4", "--sample-every", "0")
    one, other = (
        load_file(tmp_path / name / "world/layout/step-4.safetensors")
        for name in ("whole", "halves")
    )
    before = load_file(tmp_path / "whole/world/init/transformer.safetensors")
    assert one.keys() == other.keys() == before.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], before[name].to(one[name].dtype))}
    assert changed and not any(name.startswith("local_decoder.") for name in changed)
    table = json.loads((tmp_path / "whole/world/layout/samples/step-0000004.json").read_text())
    assert "no place" in table["R"]

    run(
        tmp_path / "whole",
        monkeypatch,
        WHOLE,
        "--steps",
        "2",
        "--sample-every",
        "2",
        "--sample-steps",
        "2",
        "--checkpoint",
        "world/layout/step-4.safetensors",
    )
    two = load_file(tmp_path / "whole/world/run/step-2.safetensors")
    assert not torch.equal(
        two["local_decoder.out_conv.weight"], one["local_decoder.out_conv.weight"]
    )
    table = json.loads((tmp_path / "whole/world/run/samples/step-0000002.json").read_text())
    assert "right" in table["score"]


@pytest.mark.slow
def test_the_free_world_trains_too(tmp_path, monkeypatch):
    run(
        tmp_path,
        monkeypatch,
        LAYOUT,
        "--steps",
        "1",
        "--sample-every",
        "1",
        "--recipe",
        "comfyui_l2p.l2p_core.shapes.recipe:FreeLayoutRun",
    )
    run(
        tmp_path,
        monkeypatch,
        WHOLE,
        "--steps",
        "1",
        "--sample-every",
        "1",
        "--sample-steps",
        "2",
        "--checkpoint",
        "world/layout/step-1.safetensors",
        "--recipe",
        "comfyui_l2p.l2p_core.shapes.recipe:FreeWholeRun",
    )
    table = json.loads((tmp_path / "world/run/samples/step-0000001.json").read_text())
    assert table["R"] is None and "right" in table["score"]
    assert Image.open(tmp_path / "world/data/images/0000.png").size == (128, 128)


def test_the_second_run_names_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(WHOLE)]) == 1
    assert "Run l2p_core/shapes/layout.toml first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_levels_are_in_the_window_and_log_uniform():
    sigma = window_levels(20_000, torch.Generator().manual_seed(0))
    level = (1 - sigma) / sigma
    assert WINDOW[0] * 0.999 <= level.min() and level.max() <= WINDOW[1] * 1.001
    middle = float(torch.tensor(WINDOW).log().mean())
    assert float(level.log().mean()) == pytest.approx(middle, abs=0.02)


def test_prompts_encoded_together_are_those_encoded_alone(tmp_path):
    rng = random.Random(0)
    texts = ["", *(prompt_for(PLACES_WORLD, PLACES_WORLD.scene(rng), rng).text for _ in range(6))]
    encoder = recipe.make_text_encoder(tmp_path, texts)
    assert isinstance(encoder, TextEncoder)
    for text, together in zip(texts, encode(encoder, texts)):
        assert torch.allclose(together, encoder.encode(text), atol=1e-5)


def test_the_guide_reads_patches_positions_and_attributes():
    model = L2PTransformer(recipe.CONFIG)
    guide = Guide(model, side=64, values={"size": 2, "place": 5})
    model.features(torch.randn(2, 3, 64, 64), torch.rand(2), [torch.randn(5, 96)] * 2)
    assert guide.image().shape == (2, 3, 64, 64)
    marginals = {"size": torch.tensor([[1.0, 0], [0.5, 0.5]]), "place": torch.full((2, 5), 0.2)}
    local = {name: part[:, None].expand(2, 16, -1) for name, part in marginals.items()}
    guide.loss(torch.zeros(2, 3, 64, 64), marginals, torch.randn(2, 16), local).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in guide.parameters())
    known = torch.cat(
        [torch.eye(4).repeat_interleave(4, 0), torch.eye(4).repeat(4, 1)], 1
    )  # (16, 8)
    with torch.no_grad():
        guide.position.weight.zero_()
        guide.position.weight[:, :8] = 20 * torch.eye(8)
    guide.heard["first"] = torch.cat([known, torch.zeros(16, 152)], 1).expand(2, -1, -1)
    assert guide.position_loss() < 0.01
    guide.heard["first"] = guide.heard["first"].flip(1)
    assert guide.position_loss() > 1
