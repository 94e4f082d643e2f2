"""Prompts are read back as they were written, and completed to full ones that agree with them."""

import random
from pathlib import Path

import pytest
from comfyui_l2p.l2p_core.shapes import parse as parse_module
from comfyui_l2p.l2p_core.shapes.parse import complete, parse
from comfyui_l2p.l2p_core.shapes.world import (
    FREE_WORLD,
    PLACES_WORLD,
    prompt_for,
    read_prompts,
)


@pytest.mark.slow
@pytest.mark.parametrize("world", (PLACES_WORLD, FREE_WORLD))
def test_generated_prompts_are_read_back(world):
    rng = random.Random(0)
    for _ in range(3000):
        prompt = prompt_for(world, world.scene(rng), rng)
        assert parse(prompt.text, world) == prompt, prompt.text


def test_the_fixed_prompts_are_read():
    for prompt in read_prompts(Path(parse_module.__file__).with_name("prompts.jsonl")):
        assert parse(prompt.text, PLACES_WORLD) == prompt


def test_completed_prompts_keep_what_is_said_and_vary_in_the_rest():
    full = [complete("a red circle on a blue background", PLACES_WORLD, seed) for seed in range(64)]
    assert full == [
        complete("a red circle on a blue background", PLACES_WORLD, seed) for seed in range(64)
    ]
    assert all("red circle on a blue background, " in text for text in full)
    assert len(set(full)) == 10, "two sizes in five places"
    for prompt in read_prompts(Path(parse_module.__file__).with_name("prompts.jsonl")):
        (said,) = prompt.objects
        for seed in range(4):
            completed = parse(complete(prompt.text, PLACES_WORLD, seed), PLACES_WORLD)
            (only,) = completed.objects
            assert all(value in (None, getattr(only, name)) for name, value in vars(said).items())
            assert prompt.background in (None, completed.background)
            assert None not in (only.shape, only.colour, only.size, only.place)


def test_what_no_scene_agrees_with_is_named():
    with pytest.raises(ValueError, match="no scene .* 'a red circle on red'"):
        complete("a red circle on red", PLACES_WORLD, 0)
