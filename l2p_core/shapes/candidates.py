"""A denoiser for worlds that are too large to sum over: the posterior over a few candidate scenes.

The candidates of a noisy image are its true scene and `count` others, drawn from the world's scenes
that agree with the prompt. Given the candidates alone, every one of them was as likely the true
one, so E[x0 | x_t, candidates] is again a softmax; and its mean over the draws of candidates is the
exact E[x0 | x_t, prompt]. As a target of training it is right for any count, and the more
candidates, the smaller its variance; the true image is the case of none.

For worlds with one object on a plain background.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..images import to_pixels
from .world import Background, Object, Prompt, Scene, World


@dataclass
class Candidates:
    """A few scenes for each member of the batch, and how likely each is. weights: (B,
    candidates)."""

    world: World
    scenes: list[list[Scene]]
    images: list[Tensor]  # each (candidates, 3 * H * W)
    weights: Tensor

    def image(self) -> Tensor:
        """Return the mean image, (B, 3, H, W) in [-1, 1]."""
        means = torch.stack([row @ images for row, images in zip(self.weights, self.images)])
        return means.unflatten(1, (3, self.world.side, self.world.side))

    def marginals(self) -> dict[str, Tensor]:
        """Return each attribute's probabilities, (B, number of its values)."""
        world, result = self.world, {}
        names = attribute_values(world)
        for name, values in names.items():
            number = {value: index for index, value in enumerate(values)}
            table = self.weights.new_zeros(len(self.scenes), len(values))
            for row, scenes, weights in zip(table, self.scenes, self.weights):
                index = torch.tensor([number[attribute_of(world, each, name)] for each in scenes])
                row.index_add_(0, index, weights)
            result[name] = table
        return result


def attribute_values(world: World) -> dict[str, tuple[str, ...]]:
    """What `marginals` speaks of: each attribute with its values."""
    places = {f"place {group}": tuple(names) for group, names in enumerate(world.places)}
    return {
        "colour": world.colours,
        "background": world.colours,
        "shape": world.shapes,
        "size": tuple(world.sizes),
    } | places


def attribute_of(world: World, scene: Scene, name: str) -> str:
    """The value of a scene's attribute."""
    (only,) = scene.objects
    if name == "background":
        return scene.background.colours[0]
    if name.startswith("place "):
        return world.place(int(name.removeprefix("place ")), only.x, only.y)
    return getattr(only, name)


class CandidateDenoiser:
    """The posterior over a few scenes that agree with the prompt, the true one among them."""

    def __init__(self, world: World, count: int = 16):
        """count: candidates beside the true scene."""
        self.world, self.count = world, count
        self.allowed = lru_cache(maxsize=256)(self._allowed)

    def _allowed(self, size: str, place: str | None) -> list[tuple[int, int]]:
        return [
            each
            for each in self.world.positions(size)
            if place is None or self.world.is_at(place, *each)
        ]

    def draw(self, prompt: Prompt, rng: random.Random) -> Scene:
        """Draw a training scene that agrees with the prompt, as `World.scene` would.

        Raises ValueError where none does."""
        world = self.world
        (stated,) = prompt.objects
        for _ in range(10_000):
            size = rng.choice(tuple(world.sizes))
            places = self.allowed(size, stated.place)
            share = len(places) / len(world.positions(size))
            if stated.size not in (None, size) or rng.random() >= share:
                continue
            x, y = rng.choice(places)
            two = prompt.background.colours[0] if prompt.background else rng.choice(world.colours)
            one = stated.colour or rng.choice(world.colours)
            scene = Scene(
                (Object(stated.shape or rng.choice(world.shapes), one, size, x, y),),
                Background("plain", (two,)),
            )
            if one != two and not scene.held_out:
                return scene
        raise ValueError(f"no training scene agrees with {prompt.text!r}")

    def __call__(
        self,
        noisy: Tensor,
        sigma: Tensor,
        prompts: Sequence[Prompt],
        scenes: Sequence[Scene],
        rng: random.Random,
    ) -> Candidates:
        """What prompt and noisy image tell of the candidates.

        noisy: (B, 3, H, W), (1 - sigma) * image + sigma * noise. sigma: (B,) in (0, 1]. scenes: the
        true ones, of training."""
        rows, images, weights = [], [], []
        for one, level, prompt, scene in zip(noisy, sigma.tolist(), prompts, scenes, strict=True):
            row = [scene, *(self.draw(prompt, rng) for _ in range(self.count))]
            flat = torch.cat([to_pixels(self.world.image(each)) for each in row]).flatten(1)
            off = (one.flatten() - (1 - level) * flat).square().sum(1)
            rows.append(row)
            images.append(flat)
            weights.append((-off.double() / (2 * level**2)).softmax(0).float())
        return Candidates(self.world, rows, images, torch.stack(weights))

    def blind(self, prompts: Sequence[Prompt], rng: random.Random) -> Candidates:
        """What the prompt alone tells, of `count` scenes that agree with it."""
        rows = [[self.draw(prompt, rng) for _ in range(self.count)] for prompt in prompts]
        images = [
            torch.cat([to_pixels(self.world.image(each)) for each in row]).flatten(1)
            for row in rows
        ]
        even = torch.full((len(rows), self.count), 1 / self.count)
        return Candidates(self.world, rows, images, even)
