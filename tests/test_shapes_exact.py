"""The exact denoiser of a small world, against the softmax over its images written out."""

import random

import pytest
import torch
from comfyui_l2p.l2p_core.flow import euler, schedule
from comfyui_l2p.l2p_core.images import to_images, to_pixels
from comfyui_l2p.l2p_core.shapes.exact import ExactDenoiser, readable_share
from comfyui_l2p.l2p_core.shapes.judge import score
from comfyui_l2p.l2p_core.shapes.world import (
    FULL_WORLD,
    PLACES_WORLD,
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


def every_scene():
    """All training scenes of SMALL and how likely each is."""
    scenes, weights = [], []
    for shape in SMALL.shapes:
        for size in SMALL.sizes:
            for x, y in SMALL.positions(size):
                for colour in SMALL.colours:
                    for background in SMALL.colours:
                        scene = Scene(
                            (Object(shape, colour, size, x, y),), Background("plain", (background,))
                        )
                        if colour != background and not scene.held_out:
                            scenes.append(scene)
                            weights.append(1 / len(SMALL.positions(size)))
    return scenes, torch.tensor(weights)


def agrees(scene, prompt):
    (only,), (stated,) = scene.objects, prompt.objects
    return (
        stated.shape in (None, only.shape)
        and stated.colour in (None, only.colour)
        and stated.size in (None, only.size)
        and (stated.place is None or SMALL.is_at(stated.place, only.x, only.y))
        and prompt.background in (None, scene.background)
    )


@pytest.mark.parametrize("level", (0.02, 0.1, 0.5))
def test_it_is_the_softmax_over_the_images(level):
    rng, generator = random.Random(2), torch.Generator().manual_seed(2)
    scenes, weights = every_scene()
    images = torch.cat([to_pixels(SMALL.image(scene)) for scene in scenes])  # (N, 3, H, W)
    exact = ExactDenoiser(SMALL)
    drawn = [SMALL.scene(rng) for _ in range(16)]
    prompts = [prompt_for(SMALL, scene, rng) for scene in drawn]
    sigma = torch.full((16,), 1 / (1 + level))
    x0 = torch.cat([to_pixels(SMALL.image(scene)) for scene in drawn])
    noisy = (1 - sigma[0]) * x0 + sigma[0] * torch.randn(x0.shape, generator=generator)
    found = exact(noisy, sigma, prompts)
    blind = exact.blind(prompts).image()
    for index, prompt in enumerate(prompts):
        prior = torch.tensor([agrees(scene, prompt) for scene in scenes]) * weights
        off = (noisy[index] - (1 - sigma[0]) * images).flatten(1).square().sum(1)
        posterior = (prior.log() - off / (2 * sigma[0] ** 2)).softmax(0)
        longhand = torch.einsum("n,nchw->chw", posterior, images)
        assert (found.image()[index] - longhand).abs().max() < 0.01  # masks hold 256 levels
        mean = torch.einsum("n,nchw->chw", prior / prior.sum(), images)
        assert (blind[index] - mean).abs().max() < 0.01
        for name in ("shape", "size"):
            for place, value in enumerate(exact.values[name]):
                has = torch.tensor([getattr(each.objects[0], name) == value for each in scenes])
                difference = found.marginals()[name][index, place] - posterior[has].sum()
                assert difference.abs() < 1e-3


def test_patches_are_independent_given_the_scene():
    """The product of the patches' likelihoods is the image's, and no patch knows of the others."""
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    exact = ExactDenoiser(SMALL)
    prompts = [prompt_for(SMALL, SMALL.scene(rng), rng) for _ in range(6)]
    noisy = torch.randn(6, 3, 32, 32, generator=generator)
    sigma = torch.full((6,), 1 / 1.05)
    prior = exact.blind(prompts).weights.flatten(1)
    local = exact.patchwise(noisy, sigma, prompts, 16).weights.flatten(1).unflatten(0, (6, 4))
    together = exact(noisy, sigma, prompts).weights.flatten(1)
    product = (prior.log() + (local.log() - prior.log()[:, None]).nan_to_num(0).sum(1)).softmax(1)
    assert torch.allclose(product, together, atol=1e-4)
    changed = noisy.clone()
    changed[:, :, 16:] = 0
    other = exact.patchwise(changed, sigma, prompts, 16).weights.flatten(1).unflatten(0, (6, 4))
    assert torch.allclose(other[:, :2], local[:, :2], atol=1e-6)


def test_sampling_with_it_gives_clear_scenes_of_the_prompt_that_vary():
    exact = ExactDenoiser(PLACES_WORLD)
    prompts = [Prompt("a red circle", (Stated("circle", "red"),))] * 24
    noise = torch.randn(24, 3, 96, 96, generator=torch.Generator().manual_seed(0))

    def velocity(x, sigma):
        return (x - exact(x, torch.full((len(x),), sigma), prompts).image()) / sigma

    images = to_images(euler(velocity, noise, schedule(30)))
    assert score(images, prompts, PLACES_WORLD)["right"] == 100
    assert len({image.tobytes() for image in images}) > 12


def test_the_readable_share_is_0_for_the_blind_mean_and_1_for_the_exact_one():
    exact, blind = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert readable_share(exact, exact, blind) == 1
    assert readable_share(blind, exact, blind) == 0
    assert readable_share((exact + blind) / 2, exact, blind) == pytest.approx(0.75)


def test_a_world_that_it_does_not_take_is_named():
    with pytest.raises(ValueError, match="0 to 3 objects, backgrounds plain, gradient"):
        ExactDenoiser(FULL_WORLD)
