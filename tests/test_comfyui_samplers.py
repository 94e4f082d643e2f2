"""L2P KSampler against ComfyUI's own KSampler, and what other nodes do to its inputs."""

import pytest
from real_comfyui import Rejected

SIDE = 32  # pixels: a ninth of the model's own number
PROMPT = "a large red circle on a blue background, left"


@pytest.fixture(scope="module")
def choices(comfyui):
    return comfyui.call("choices")


def test_every_sampler_draws_what_comfyuis_ksampler_draws(comfyui, choices):
    """uni_pc, dpm_2 and others run without the last sigma above 0. To the bit, at 2 steps."""
    samplers, _ = choices
    differences = {
        name: comfyui.call("draw_by", sampler_name=name, scheduler="simple", steps=2, side=SIDE)
        for name in samplers
    }
    assert len(samplers) > 30
    assert {name: each for name, each in differences.items() if each not in (0, None)} == {}


@pytest.mark.parametrize("sampler, denoise", [("euler", 0.6), ("uni_pc", 1.0)])
def test_every_scheduler_draws_what_comfyuis_ksampler_draws(comfyui, choices, sampler, denoise):
    _, schedulers = choices
    differences = {
        name: comfyui.call(
            "draw_by", sampler_name=sampler, scheduler=name, steps=2, denoise=denoise, side=SIDE
        )
        for name in schedulers
    }
    assert len(schedulers) > 8
    assert {name: each for name, each in differences.items() if each not in (0, None)} == {}


@pytest.mark.parametrize(
    "sampler, word",
    [("euler", None), ("dpmpp_2m_cfg_pp", "distorts"), ("dpm_fast", "leaves noise")],
)
def test_samplers_that_do_not_suit_carry_a_note(comfyui, sampler, word):
    said = comfyui.call("notes_of_sampler", sampler_name=sampler)
    assert any(f"{sampler} {word}" in each for each in said) == (word is not None)


@pytest.mark.parametrize("name", ["cfg", "shift", "denoise"])
def test_nan_is_rejected_by_name(comfyui, name):
    with pytest.raises(Rejected, match=f"{name} is NaN; expected a number"):
        comfyui.call("notes_of_sampler", sampler_name="euler", **{name: "nan"})


@pytest.mark.parametrize("node, stages", [("KSampler", 1), ("L2PKSampler", 1), ("L2PKSampler", 2)])
def test_an_area_in_pixels_is_of_pixels(comfyui, node, stages):
    """ComfyUI divides areas by 8, which a latent of pixels is not."""
    assert comfyui.call("areas", node=node, stages=stages) < 0.01


def test_a_shift_of_another_node_is_reported(comfyui):
    (said,) = comfyui.call("shift_by_another_node", node="ModelSamplingAuraFlow", shift=5.0)
    assert "set shift 5; L2P KSampler uses its own shift, 3" in said
    assert comfyui.call("shift_by_another_node", node="ModelSamplingAuraFlow", shift=3.0) == []


def test_a_node_that_counts_time_otherwise_is_rejected(comfyui):
    with pytest.raises(Rejected, match="ModelSamplingSD3 changed the model's timestep scale"):
        comfyui.call("shift_by_another_node", node="ModelSamplingSD3", shift=3.0)


def test_a_checkpoint_saved_with_the_bundled_text_encoder_loads_again(comfyui, tmp_path):
    """Its short prompts are completed as before."""
    for prompt in (PROMPT, "a red circle"):
        assert comfyui.call("reloaded_encoder", folder=tmp_path, prompt=prompt) == 0
