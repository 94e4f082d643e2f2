"""The candidate denoiser agrees with the exact one in the mean, and draws as the world does."""

import random
from collections import Counter

import pytest
import torch
from comfyui_l2p.l2p_core.images import to_pixels
from comfyui_l2p.l2p_core.shapes.candidates import (
    CandidateDenoiser,
    attribute_of,
    attribute_values,
)
from comfyui_l2p.l2p_core.shapes.exact import ExactDenoiser
from comfyui_l2p.l2p_core.shapes.world import (
    FREE_WORLD,
    Background,
    Object,
    Prompt,
    Scene,
    Stated,
    World,
    prompt_for,
)

SMALL = World(
    side=32,
    shapes=("circle", "square"),
    colours=("red", "green", "blue"),
    sizes={"small": 4, "large": 8},
    step=4,
)
OPEN = Prompt("a red shape", (Stated(colour="red"),))


@pytest.mark.slow
def test_its_mean_over_true_scenes_and_noise_is_the_exact_one():
    """Its error to x0 lies between those of the exact mean and of the true image's own noise, and
    target less exact is uncorrelated with what the exact one knows."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    exact, few = ExactDenoiser(SMALL), CandidateDenoiser(SMALL, 8)
    count = 1500
    scenes = [few.draw(OPEN, rng) for _ in range(count)]
    x0 = torch.cat([to_pixels(SMALL.image(scene)) for scene in scenes])
    sigma = torch.full((count,), 1 / 1.1)
    noisy = (1 - sigma[0]) * x0 + sigma[0] * torch.randn(x0.shape, generator=generator)
    target = few(noisy, sigma, [OPEN] * count, scenes, rng).image()
    best = torch.cat([exact(part, sigma[:100], [OPEN] * 100).image() for part in noisy.split(100)])
    off = target - best
    assert off.mean(0).abs().max() < 0.1, "unbiased at every pixel"
    known = best - best.mean(0)
    assert abs(float((off * known).sum() / known.square().sum())) < 0.06
    assert off.square().mean() < (x0 - best).square().mean() * 0.6, "and of less variance than x0"


@pytest.mark.slow
def test_it_draws_as_the_world_does():
    rng = random.Random(0)
    few = CandidateDenoiser(SMALL)
    prompt = Prompt("", (Stated(place="left"),))
    drawn = Counter(few.draw(prompt, rng) for _ in range(6000))
    wanted: Counter = Counter()
    while sum(wanted.values()) < 6000:
        scene = SMALL.scene(rng)
        if SMALL.place(0, scene.objects[0].x, scene.objects[0].y) == "left":
            wanted[scene] += 1
    assert drawn.keys() == wanted.keys()
    for name in ("size", "shape", "colour"):
        one, other = (Counter() for _ in range(2))
        for counts, source in ((one, drawn), (other, wanted)):
            for scene, number in source.items():
                counts[getattr(scene.objects[0], name)] += number
        assert all(abs(one[value] - other[value]) < 250 for value in other)


@pytest.mark.parametrize("world", (SMALL, FREE_WORLD))
def test_marginals_are_of_the_true_scene_where_there_is_little_noise(world):
    rng = random.Random(1)
    few = CandidateDenoiser(world, 4)
    scenes = [world.scene(rng) for _ in range(4)]
    prompts = [prompt_for(world, scene, rng) for scene in scenes]
    images = torch.cat([to_pixels(world.image(scene)) for scene in scenes])
    found = few(images, torch.full((4,), 0.01), prompts, scenes, rng)
    assert torch.allclose(found.image(), images, atol=1e-3)
    for name, table in found.marginals().items():
        values = attribute_values(world)[name]
        assert torch.allclose(table.sum(1), torch.ones(4))
        assert [values[index] for index in table.argmax(1).tolist()] == [
            attribute_of(world, scene, name) for scene in scenes
        ]
    assert few.blind(prompts, rng).image().shape == images.shape


def test_a_prompt_that_no_scene_agrees_with_is_named():
    prompt = Prompt("a red circle on red", (Stated(colour="red"),), Background("plain", ("red",)))
    with pytest.raises(ValueError, match="'a red circle on red'"):
        CandidateDenoiser(SMALL).draw(prompt, random.Random(0))
    assert Scene((Object("circle", "red", "small", 8, 8),), Background("plain", ("blue",)))
