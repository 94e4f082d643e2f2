"""The test of fit passes draws from the training scenes and fails samples that collapse or lean."""

import random
from dataclasses import replace

import pytest
from comfyui_l2p.l2p_core.shapes.exact import ExactDenoiser
from comfyui_l2p.l2p_core.shapes.variety import chi2_quantile, fit
from comfyui_l2p.l2p_core.shapes.world import FREE_WORLD, PLACES_WORLD, Choice, prompt_for

COARSE = replace(FREE_WORLD, shapes=("circle", "square"), colours=("red", "green", "blue"), step=8)
OPEN = Choice((frozenset(("colour", "shape")),), background=True)  # size and place are left open


def drawn(world, seeds=4, count=200):
    rng, exact = random.Random(0), ExactDenoiser(world)
    prompts = [prompt_for(world, world.scene(rng), rng, OPEN) for _ in range(count)]
    return [exact.blind([prompt] * seeds).draw(rng) for prompt in prompts], prompts, exact


@pytest.mark.slow
@pytest.mark.parametrize("world", (PLACES_WORLD, COARSE))
def test_draws_from_training_pass(world):
    assert fit(*drawn(world)).failures() == []


@pytest.mark.slow
@pytest.mark.parametrize("world", (PLACES_WORLD, COARSE))
def test_collapse_to_one_image_for_each_prompt_fails(world):
    scenes, prompts, exact = drawn(world)
    result = fit([each[:1] * 4 for each in scenes], prompts, exact)
    assert result.repeats == 1 and "repeats" in result.failures()
    assert world is PLACES_WORLD or "distance" in result.failures()


@pytest.mark.slow
def test_a_leaning_size_or_place_fails():
    scenes, prompts, exact = drawn(PLACES_WORLD)
    size = [
        [
            (
                replace(scene, objects=(replace(scene.objects[0], size="large"),))
                if number % 3 == 0
                else scene
            )
            for number, scene in enumerate(each)
        ]
        for each in scenes
    ]
    assert "chi2" in fit(size, prompts, exact).failures()
    scenes, prompts, exact = drawn(COARSE)
    left = [[scene for scene in each if scene.objects[0].x < 66] for each in scenes]
    assert "uneven" in fit(left, prompts, exact).failures()


def test_images_that_are_not_as_the_prompt_says_fail():
    scenes, prompts, exact = drawn(PLACES_WORLD)
    result = fit(
        [[None, *each[1:]] if number % 2 else each for number, each in enumerate(scenes)],
        prompts,
        exact,
    )
    assert result.valid == 0.875 and result.failures() == ["valid"]


@pytest.mark.parametrize("freedom, quantile", [(4, 18.47), (9, 27.88), (26, 54.05)])  # of tables
def test_the_chi2_quantile(freedom, quantile):
    assert chi2_quantile(freedom) == pytest.approx(quantile, rel=0.03)
