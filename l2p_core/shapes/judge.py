"""Measure what an image of a `World` shows, and compare it with what a prompt says.

The judge knows the world's ideal images and nothing of the model. It finds the background from the
border, the objects as connected regions that differ from it, and names each by measurement: the
shape by its overlap with every ideal shape, colours by the nearest known one, size and place by the
bounding box.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np
from PIL import Image

from .world import (
    COLOURS,
    RELATIONS,
    Background,
    Object,
    Prompt,
    Scene,
    Stated,
    World,
    background_image,
    object_mask,
)

COLOUR_RADIUS = 40  # levels over the three channels: a colour farther from all others is unclear
CLEAR_OVERLAP = 0.8  # intersection over union with the ideal shape
CLEAN_STD = 3.0  # of 255: standard deviation of the background's error, largest channel
SIZE_TOLERANCE = 0.2  # share of the half side by which a size may be off
CENTRE_TOLERANCE = 4.0  # pixels at a side of 128
SMALLEST = 24  # pixels: smaller regions are specks, which count against a clean background
CHECKS = (
    "count",
    "shape",
    "colour",
    "size",
    "place",
    "outlined",
    "relation",
    "background",
    "clear",
    "clean",
)


@dataclass(frozen=True)
class FoundObject:
    """A measured object. Names are "unclear" where nothing known is near.

    x, y: centre of the bounding box, pixels; half: half of its longer side, pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    half: float
    outlined: bool
    overlap: float


@dataclass(frozen=True)
class Found:
    """What an image was measured to show. error_std: of the background, 0 to 255."""

    world: World
    objects: tuple[FoundObject, ...]
    background: Background | None
    error_std: float

    def check(self, prompt: Prompt) -> dict[str, bool]:
        """Return each of CHECKS that applies: whether what the prompt says is so.

        clear: every object is one of the world's shapes, colours, sizes and positions, whether the
        prompt names them or not. clean: the background has no error. Objects are matched with the
        prompt's in the order that makes most right."""
        best: dict[str, bool] = {}
        for order in permutations(self.objects, min(len(prompt.objects), len(self.objects))):
            checks = self._check_in_order(prompt, order)
            if not best or sum(checks.values()) > sum(best.values()):
                best = checks
        return best

    def _check_in_order(self, prompt: Prompt, objects: Sequence[FoundObject]) -> dict[str, bool]:
        checks = {"count": len(self.objects) == len(prompt.objects)}
        for name in ("shape", "colour", "size", "place", "outlined"):
            pairs = [
                (stated, found)
                for stated, found in zip(prompt.objects, objects)
                if getattr(stated, name) is not None
            ]
            if pairs:
                checks[name] = all(self._agrees(name, *pair) for pair in pairs)
        if prompt.relation:
            checks["relation"] = len(objects) > 1 and holds(prompt.relation, *objects[:2])
        if prompt.background:
            checks["background"] = self.background == prompt.background
        checks["clear"] = self.background is not None and all(map(self._is_clear, self.objects))
        checks["clean"] = self.error_std < CLEAN_STD
        return checks

    def _agrees(self, name: str, stated: Stated, found: FoundObject) -> bool:
        if name == "place" and stated.place:
            return self.world.is_at(stated.place, found.x, found.y, slack=self._slack)
        return getattr(stated, name) == getattr(found, name)

    @property
    def _slack(self) -> float:
        return CENTRE_TOLERANCE * self.world.side / 128

    def _is_clear(self, found: FoundObject) -> bool:
        if "unclear" in (found.shape, found.colour, found.size):
            return False
        centres = self.world.centres
        return (
            not centres
            or min(math.dist((found.x, found.y), each) for each in centres) <= self._slack
        )


def holds(relation: str, one: FoundObject | Object, other: FoundObject | Object) -> bool:
    """Whether the first object lies to the second as the relation says, judged by centres."""
    assert relation in RELATIONS
    across, down = one.x - other.x, one.y - other.y
    return {"left of": across < 0, "right of": across > 0, "above": down < 0, "below": down > 0}[
        relation
    ]


def examine(image: Image.Image, world: World) -> Found:
    """Measure an image. Any RGB image is measured; its size is brought to the world's."""
    if image.size != (world.side, world.side):
        image = image.resize((world.side, world.side), Image.Resampling.BILINEAR)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)  # (side, side, 3)
    background, ideal = _find_background(pixels, world)
    difference = np.linalg.norm(pixels - ideal, axis=-1)
    rest = np.ones(difference.shape, dtype=bool)
    objects = []
    for region in _regions(difference > COLOUR_RADIUS):
        if region.sum() >= SMALLEST:
            objects.append(_measure(pixels, ideal, region, world))
            rest &= ~_grown(region, 2)
    if background and background.kind in ("striped", "checked"):
        rest &= ~_edges(background, world.side)
    error = (pixels - ideal)[rest]
    spread = (
        float(
            np.sqrt(
                (error**2).mean(0) if background and background.kind != "plain" else error.var(0)
            ).max()
        )
        if len(error)
        else math.inf
    )
    return Found(world, tuple(objects), background, spread)


def _find_background(pixels: np.ndarray, world: World) -> tuple[Background | None, np.ndarray]:
    """The background whose ideal is nearest at the border, and the image to compare with.

    For a plain one that image is the measured colour, so that a slight tint does not look like an
    object. Where no known background is near, it is the border's median colour."""
    border = _border(world.side)
    seen = pixels[border]
    measured = np.median(seen, axis=0)
    best, distance = None, float(COLOUR_RADIUS)
    for background, ideal in _ideal_borders(world):
        now = float(np.median(np.linalg.norm(seen - ideal, axis=-1)))
        if now < distance:
            best, distance = background, now
    if best is None or best.kind == "plain":
        return best, np.broadcast_to(measured, pixels.shape)
    return best, np.asarray(background_image(best, world.side), dtype=np.float32)


@cache
def _border(side: int) -> np.ndarray:
    border = np.ones((side, side), dtype=bool)
    border[2:-2, 2:-2] = False
    return border


_IDEAL_BORDERS: dict[tuple, list[tuple[Background, np.ndarray]]] = {}


def _ideal_borders(world: World) -> list[tuple[Background, np.ndarray]]:
    """Every background of the world with the pixels of its border."""
    key = world.side, world.colours, world.backgrounds
    if key not in _IDEAL_BORDERS:
        kinds = dict.fromkeys(world.backgrounds)
        backgrounds = [Background("plain", (colour,)) for colour in world.colours]
        backgrounds += [
            Background(kind, pair)
            for kind in kinds
            if kind != "plain"
            for pair in permutations(world.colours, 2)
        ]
        _IDEAL_BORDERS[key] = [
            (each, np.asarray(background_image(each, world.side), np.float32)[_border(world.side)])
            for each in backgrounds
        ]
    return _IDEAL_BORDERS[key]


@cache
def _edges(background: Background, side: int) -> np.ndarray:
    """Where a pattern changes colour, two pixels to each side."""
    ideal = np.asarray(background_image(background, side), dtype=np.float32)
    across = np.abs(np.diff(ideal, axis=1, prepend=ideal[:, :1])).max(-1) > 0
    down = np.abs(np.diff(ideal, axis=0, prepend=ideal[:1])).max(-1) > 0
    return _grown(across | down, 2)


def _grown(region: np.ndarray, by: int) -> np.ndarray:
    """The region and all pixels up to `by` away from it, in a square."""
    padded = np.pad(region, by)
    height, width = region.shape
    grown = np.zeros_like(region)
    for down, across in product(range(2 * by + 1), repeat=2):
        grown |= padded[down : down + height, across : across + width]
    return grown


def _regions(inside: np.ndarray) -> Iterable[np.ndarray]:
    """The connected regions of a mask, corners touching included, as masks."""
    left = {tuple(point) for point in np.argwhere(inside).tolist()}
    while left:
        start = left.pop()
        region, front = np.zeros_like(inside), [start]
        while front:
            row, column = front.pop()
            region[row, column] = True
            for near in product((row - 1, row, row + 1), (column - 1, column, column + 1)):
                if near in left:
                    left.remove(near)
                    front.append(near)
        yield region


def _measure(
    pixels: np.ndarray, ideal: np.ndarray, region: np.ndarray, world: World
) -> FoundObject:
    """Name a region's shape, colour and size, and say where it is."""
    difference = np.linalg.norm(pixels - ideal, axis=-1)
    core = region & (difference > np.percentile(difference[region], 60) * 0.8)
    colour = np.median(pixels[core], axis=0)
    near = _grown(region, 1)
    towards = colour - ideal
    share = ((pixels - ideal) * towards).sum(-1) / np.maximum((towards**2).sum(-1), 1)
    inside = near & (share > 0.5)
    if not inside.any():
        inside = region
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    half = max(bottom - top, right - left) / 2
    found = inside[top:bottom, left:right]
    overlaps = {
        (shape, outlined): _overlap(found, shape, half, outlined)
        for shape in world.shapes
        for outlined in {False, world.outlines}
    }
    (shape, outlined), overlap = max(overlaps.items(), key=lambda pair: pair[1])
    size = min(world.sizes, key=lambda name: abs(math.log(world.sizes[name] / half)))
    if abs(half / world.sizes[size] - 1) > SIZE_TOLERANCE:
        size = "unclear"
    return FoundObject(
        shape if overlap >= CLEAR_OVERLAP else "unclear",
        nearest_colour(colour),
        size,
        (left + right) / 2,
        (top + bottom) / 2,
        half,
        outlined,
        overlap,
    )


def _overlap(found: np.ndarray, shape: str, half: float, outlined: bool) -> float:
    """Intersection over union with the ideal of the same longer side, bounding boxes centred."""
    ideal = _ideal(shape, max(round(half), 2), outlined)
    height, width = (max(a, b) for a, b in zip(found.shape, ideal.shape))
    one, other = (_padded(each, height, width) for each in (found, ideal))
    return float((one & other).sum() / (one | other).sum())


@cache
def _ideal(shape: str, half: int, outlined: bool) -> np.ndarray:
    """The ideal shape as a mask, cut to its bounding box."""
    mask = np.asarray(object_mask(shape, half, outlined)) > 127
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _padded(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (height - mask.shape[0]) // 2, (width - mask.shape[1]) // 2
    result = np.zeros((height, width), dtype=bool)
    result[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    return result


def nearest_colour(pixel: np.ndarray) -> str:
    """The known colour nearest to an RGB value, or "unclear"."""
    name = min(COLOURS, key=lambda name: math.dist(pixel, COLOURS[name]))
    return name if math.dist(pixel, COLOURS[name]) < COLOUR_RADIUS else "unclear"


def score(
    images: Sequence[Image.Image], prompts: Sequence[Prompt], world: World
) -> dict[str, float]:
    """Return the percent of images in which each check passes, and all of them at once ("right").

    A check is counted over the prompts that it applies to."""
    passed: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for image, prompt in zip(images, prompts, strict=True):
        checks = examine(image, world).check(prompt)
        checks["right"] = all(checks.values())
        passed.update(name for name, good in checks.items() if good)
        asked.update(checks.keys())
    return {
        name: round(100 * passed[name] / asked[name], 1)
        for name in ("right", *CHECKS)
        if asked[name]
    }


def scene_of(found: Found) -> Scene | None:
    """The scene with the names that were found, or None where one is unclear."""
    if found.background is None or not all(map(found._is_clear, found.objects)):
        return None
    return Scene(
        tuple(
            Object(each.shape, each.colour, each.size, round(each.x), round(each.y), each.outlined)
            for each in found.objects
        ),
        found.background,
    )
