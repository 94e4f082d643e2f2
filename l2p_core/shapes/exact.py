"""The exact denoiser of a world with one object on a plain background.

Such a world is finite, so the best x0 prediction there is, E[x0 | x_t, prompt], is a softmax over
its images. It is the target that the small model's transformer learns, and the measure of what it
has learned: R = (blind - model) / (blind - exact), the share of the readable signal, in mean
squared error, where blind is the mean image given the prompt alone.

An image is background + mask * (colour - background), so all inner products with x_t follow from
those with the masks. Letters: B batch, M masks (shape, size and position), C colours.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import to_pixels
from .world import (
    ATTRIBUTES,
    COLOURS,
    Background,
    Choice,
    Object,
    Prompt,
    Scene,
    World,
    object_mask,
    prompt_for,
)


@dataclass
class Posterior:
    """What is known of the scene. weights: (B, M, C, C) over mask, object's colour, background."""

    exact: "ExactDenoiser"
    weights: Tensor

    def image(self) -> Tensor:
        """Return the mean image, (B, 3, H, W) in [-1, 1]."""
        rgb, side = self.exact.rgb, self.exact.world.side
        by_mask = self.weights.sum(3) @ rgb - self.weights.sum(2) @ rgb  # (B, M, 3)
        flat = self.weights.sum((1, 2)) @ rgb  # (B, 3)
        shaped = by_mask.transpose(1, 2) @ self.exact.masks  # (B, 3, H * W)
        return flat[:, :, None, None] + shaped.unflatten(2, (side, side))

    def marginals(self) -> dict[str, Tensor]:
        """Return each attribute's probabilities, (B, number of its values)."""
        by_mask = self.weights.sum((2, 3))
        result = {"colour": self.weights.sum((1, 3)), "background": self.weights.sum((1, 2))}
        for name, index in self.exact.index.items():
            count = len(self.exact.values[name])
            result[name] = by_mask.new_zeros(len(by_mask), count).index_add_(1, index, by_mask)
        return result

    def draw(self, rng: random.Random) -> list[Scene]:
        """Draw a scene for each member of the batch."""
        scenes = []
        count = len(self.exact.world.colours)
        for weights in self.weights.flatten(1).double().numpy():
            cumulative = np.cumsum(weights)
            pick = int(np.searchsorted(cumulative, rng.random() * cumulative[-1]))
            mask, colours = divmod(pick, count * count)
            scenes.append(self.exact.scene(mask, *divmod(colours, count)))
        return scenes


class ExactDenoiser:
    """The posterior over a world's training scenes, given a noisy image and a prompt.

    held_out: over all scenes, those that are held out of training included."""

    def __init__(self, world: World, held_out: bool = False):
        if world.objects != (1, 1) or set(world.backgrounds) != {"plain"} or world.outlines:
            raise ValueError(
                "the exact denoiser takes a world of one filled object on a plain "
                f"background; this one has {world.objects[0]} to {world.objects[1]} "
                f"objects, backgrounds {', '.join(dict.fromkeys(world.backgrounds))}"
            )
        self.world = world
        self.keys = [
            (shape, size, position)
            for shape, size in product(world.shapes, world.sizes)
            for position in world.positions(size)
        ]
        self.masks = torch.stack([self._mask(*key) for key in self.keys])  # (M, H * W)
        self.area, self.square = self.masks.sum(1), self.masks.square().sum(1)
        self.rgb = torch.tensor([COLOURS[name] for name in world.colours]) / 127.5 - 1  # (C, 3)
        groups = range(len(world.places))
        self.values = {"shape": world.shapes, "size": tuple(world.sizes)}
        self.values |= {f"place {group}": tuple(world.places[group]) for group in groups}
        named = {"shape": [key[0] for key in self.keys], "size": [key[1] for key in self.keys]}
        named |= {
            f"place {group}": [world.place(group, *key[2]) for key in self.keys] for group in groups
        }
        self.index = {
            name: torch.tensor([self.values[name].index(value) for value in values])
            for name, values in named.items()
        }
        self.log_prior = self._log_prior(held_out)  # (M, C, C)
        self.norms = self._norms_of(world.side**2, self.area, self.square)

    def _mask(self, shape: str, size: str, position: tuple[int, int]) -> Tensor:
        side, half = self.world.side, self.world.sizes[size]
        mask = np.zeros((side, side), dtype=np.float32)
        left, top = position[0] - half, position[1] - half
        mask[top : top + 2 * half, left : left + 2 * half] = object_mask(shape, half)
        return torch.from_numpy(mask / 255).flatten()

    def _log_prior(self, held_out: bool) -> Tensor:
        """A size first, then a position it may have, the rest even; without what is held out."""
        colours = self.world.colours
        positions = {size: len(self.world.positions(size)) for size in self.world.sizes}
        weights = torch.tensor([1 / positions[size] for _, size, _ in self.keys])
        known = torch.zeros(len(self.world.shapes), len(colours), len(colours))
        for (i, shape), (j, one), (k, two) in product(
            *map(enumerate, (self.world.shapes, colours, colours))
        ):
            scene = Scene((Object(shape, one, "", 0, 0),), Background("plain", (two,)))
            known[i, j, k] = one != two and (held_out or not scene.held_out)
        return (weights[:, None, None] * known[self.index["shape"]]).log()

    def _norms_of(self, pixels: int, area: Tensor, square: Tensor) -> Tensor:
        """The squared length of each image of so many pixels, (..., C, C). area, square: sums of
        its mask and of the mask's square."""
        rgb = self.rgb
        step = rgb[:, None] - rgb[None]  # (C, C, 3), colour less background
        plain = pixels * rgb.square().sum(1)  # (C,)
        cross = (rgb[None] * step).sum(-1)
        return (
            plain
            + 2 * area[..., None, None] * cross
            + square[..., None, None] * step.square().sum(-1)
        )

    def scene(self, mask: int, colour: int, background: int) -> Scene:
        """The scene of these places in the tables."""
        shape, size, (x, y) = self.keys[mask]
        names = self.world.colours
        return Scene(
            (Object(shape, names[colour], size, x, y),), Background("plain", (names[background],))
        )

    def given(self, prompts: list[Prompt]) -> Tensor:
        """Return the log prior given each prompt, (B, M, C, C), not normalized."""
        result = self.log_prior.repeat(len(prompts), 1, 1, 1)
        names = self.world.colours
        for row, prompt in zip(result, prompts, strict=True):
            (stated,) = prompt.objects
            for name, index in self.index.items():
                value = stated.place if name.startswith("place") else getattr(stated, name)
                if value in self.values[name]:
                    row[index != self.values[name].index(value)] = -math.inf
            if stated.colour:
                row[:, [name != stated.colour for name in names]] = -math.inf
            if prompt.background:
                row[:, :, [name != prompt.background.colours[0] for name in names]] = -math.inf
        return result

    def blind(self, prompts: list[Prompt]) -> Posterior:
        """What the prompt alone tells."""
        return Posterior(
            self,
            self.given(prompts).flatten(1).softmax(1).view(len(prompts), *self.log_prior.shape),
        )

    def __call__(self, noisy: Tensor, sigma: Tensor, prompts: list[Prompt]) -> Posterior:
        """What prompt and noisy image tell together.

        noisy: (B, 3, H, W), (1 - sigma) * image + sigma * noise. sigma: (B,) in (0, 1]."""
        rgb = self.rgb
        flat = noisy.flatten(2)  # (B, 3, H * W)
        on_mask = torch.einsum("bcp,mp->bmc", flat, self.masks) @ rgb.T  # (B, M, C)
        on_all = flat.sum(2) @ rgb.T  # (B, C)
        inner = on_mask[:, :, :, None] - on_mask[:, :, None] + on_all[:, None, None]
        signal = (1 - sigma)[:, None, None, None] / sigma[:, None, None, None] ** 2
        logits = signal * (inner - (1 - sigma)[:, None, None, None] / 2 * self.norms)
        logits = (self.given(prompts) + logits).flatten(1)
        return Posterior(self, logits.softmax(1).view(len(prompts), *self.log_prior.shape))

    def patchwise(
        self, noisy: Tensor, sigma: Tensor, prompts: list[Prompt], patch: int
    ) -> Posterior:
        """What prompt and each patch of the noisy image by itself tell.

        noisy, sigma: as above; patch: pixels. Returns a posterior for B * h * w patches, row by
        row."""
        rgb, side = self.rgb, self.world.side
        flat = F.unfold(noisy, patch, stride=patch)  # (B, 3 * p * p, h * w)
        flat = flat.unflatten(1, (3, -1)).permute(0, 3, 1, 2)  # (B, h * w, 3, p * p)
        masks = F.unfold(self.masks.view(-1, 1, side, side), patch, stride=patch)
        masks = masks.transpose(1, 2)  # (M, h * w, p * p)
        on_mask = torch.einsum("bncp,mnp->bnmc", flat, masks) @ rgb.T  # (B, h * w, M, C)
        on_all = flat.sum(3) @ rgb.T  # (B, h * w, C)
        inner = on_mask[..., None] - on_mask[..., None, :] + on_all[:, :, None, None]
        norms = self._norms_of(patch**2, masks.sum(2).T, masks.square().sum(2).T)
        blend = sigma[:, None, None, None, None]
        logits = (1 - blend) / blend**2 * (inner - (1 - blend) / 2 * norms)
        logits = (self.given(prompts)[:, None] + logits).flatten(0, 1)  # (B * h * w, M, C, C)
        return Posterior(self, logits.flatten(1).softmax(1).view_as(logits))


def readable_share(model: Tensor, exact: Tensor, blind: Tensor) -> float:
    """Return R, the share of the readable signal that a model reads, of x0 predictions.

    (blind - model) / (blind - exact) in mean squared error to x0. Since exact is the mean of x0,
    that is 1 - |model - exact|^2 / |blind - exact|^2 in the mean, which needs fewer samples."""
    return 1 - float((model - exact).square().sum() / (blind - exact).square().sum())


# What a prompt leaves out, for `readable_table`; attributes that are not named here are mentioned.
OPEN = {
    "no place": {"place"},
    "no size": {"size"},
    "neither": {"size", "place"},
    "no shape": {"shape"},
    "shape alone": {"size", "place", "colour", "background"},
}
Predict = Callable[[Tensor, Tensor, list[Prompt]], Tensor]  # (x_t, sigma, prompts) → x0


@torch.no_grad()
def readable_table(
    predict: Predict,
    exact: ExactDenoiser,
    levels: Sequence[float],
    count: int = 64,
    kinds: Mapping[str, set[str]] = OPEN,
    seed: int = 0,
    batch: int = 32,
) -> dict[str, list[float]]:
    """Return R at each level for each kind of prompt, on `count` scenes at the same noise each
    time.

    predict: the x0 prediction of a model. levels: a / sigma, with a = 1 - sigma."""
    world = exact.world
    table: dict[str, list[float]] = {}
    for kind, left_open in kinds.items():
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        named = frozenset(ATTRIBUTES) - left_open
        choice = Choice((named,), "background" not in left_open)
        scenes = [world.scene(rng) for _ in range(count)]
        prompts = [prompt_for(world, scene, rng, choice) for scene in scenes]
        x0 = torch.cat([to_pixels(world.image(scene)) for scene in scenes])
        noise = torch.randn(x0.shape, generator=generator)
        table[kind] = []
        for level in levels:
            sigma = torch.full((count,), 1 / (1 + level))
            noisy = (1 - sigma[0]) * x0 + sigma[0] * noise
            rows = [slice(start, start + batch) for start in range(0, count, batch)]
            predicted, best, blind = (
                torch.cat(each)
                for each in zip(
                    *(
                        (
                            predict(noisy[row], sigma[row], prompts[row]),
                            exact(noisy[row], sigma[row], prompts[row]).image(),
                            exact.blind(prompts[row]).image(),
                        )
                        for row in rows
                    )
                )
            )
            table[kind].append(round(readable_share(predicted, best, blind), 3))
    return table
