"""Captioned images of one shape on a plain background: what the small model learns, and the
measure of its score."""

import math
import random
import zlib
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

SIZE = 96  # pixels per side
COLOURS = {
    "red": (220, 30, 40),
    "green": (30, 160, 70),
    "blue": (40, 80, 225),
    "yellow": (250, 215, 40),
    "orange": (250, 130, 20),
    "purple": (135, 45, 175),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "diamond")
SIZES = {"small": 16, "large": 32}  # half the shape's width, pixels
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "center": (0, 0)}
OFFSET = 16  # pixels from the middle to a place's centre
OVERSAMPLING = 4
COLOUR_RADIUS = (
    40  # levels, over the three channels: a colour farther from all known ones is none of them
)


@dataclass(frozen=True)
class Scene:
    """What an image shows. A size or place that the caption does not mention is still some size
    and place."""

    shape: str
    colour: str
    background: str
    size: str
    place: str

    @property
    def held_out(self) -> bool:
        """One in six triples of shape, colour and background is never trained on, whatever its size
        and place."""
        return zlib.crc32(f"{self.shape} {self.colour} {self.background}".encode()) % 6 == 0

    def caption(self, with_size: bool = True, with_place: bool = True) -> str:
        """ "a large red circle on a blue background, left" """
        shape = (
            f"{self.size} {self.colour} {self.shape}"
            if with_size
            else f"{self.colour} {self.shape}"
        )
        text = f"{with_article(shape)} on {with_article(self.background)} background"
        return f"{text}, {self.place}" if with_place else text


def with_article(noun: str) -> str:
    """The noun behind a or an."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def scenes() -> list[Scene]:
    """Every scene there is, always in the same order."""
    return [
        Scene(*attributes)
        for attributes in product(SHAPES, COLOURS, COLOURS, SIZES, PLACES)
        if attributes[1] != attributes[2]
    ]


def training_scenes() -> list[Scene]:
    """The scenes that the model is trained on."""
    return [scene for scene in scenes() if not scene.held_out]


def test_scenes(count: int = 300, seed: int = 0) -> list[Scene]:
    """Scenes whose shape, colour and background were never trained on together."""
    return random.Random(seed).sample([scene for scene in scenes() if scene.held_out], count)


def render(scene: Scene) -> Image.Image:
    """The image: SIZE x SIZE RGB, flat colours, smooth edges."""
    column, row = (SIZE // 2 + OFFSET * direction for direction in PLACES[scene.place])
    half = SIZES[scene.size]
    image = Image.new("RGB", (SIZE, SIZE), COLOURS[scene.background])
    image.paste(
        COLOURS[scene.colour], (column - half, row - half), shape_mask(scene.shape, 2 * half)
    )
    return image


@cache
def shape_mask(shape: str, width: int) -> Image.Image:
    """The shape filling a width x width square, as coverage 0..255."""
    big = width * OVERSAMPLING
    mask = Image.new("L", (big, big))
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((0, 0, big - 1, big - 1), fill=255)
    else:
        pen.polygon([(x * (big - 1), y * (big - 1)) for x, y in OUTLINES[shape]], fill=255)
    return mask.reduce(OVERSAMPLING)


OUTLINES: dict[str, list[tuple[float, float]]] = {  # in a unit square, y down
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
}


@dataclass(frozen=True)
class Verdict:
    """What an image was measured to show."""

    scene: Scene
    background_std: float  # of 255, over the pixels clear of the shape; the largest channel
    overlap: (
        float  # intersection over union of the shape found and the ideal shape it was taken for
    )

    CLEAN_STD = 3.0
    CLEAR_OVERLAP = 0.8

    def compare(self, wanted: Scene) -> dict[str, bool]:
        """Each attribute, and the cleanness of the background: right or not."""
        return {
            "shape": self.scene.shape == wanted.shape and self.overlap >= self.CLEAR_OVERLAP,
            "colour": self.scene.colour == wanted.colour,
            "background": self.scene.background == wanted.background,
            "place": self.scene.place == wanted.place,
            "size": self.scene.size == wanted.size,
            "clean": self.background_std < self.CLEAN_STD,
        }


def judge(image: Image.Image) -> Verdict:
    """Measure an image of one shape on a plain background."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    border = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    background = _nearest_colour(np.median(border, axis=0))
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    if distance.max() < 32:
        return Verdict(
            Scene("nothing", background, background, "", ""),
            float(pixels.std(axis=(0, 1)).max()),
            0.0,
        )
    inside = distance > distance.max() / 2
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    found = inside[top:bottom, left:right]
    overlaps = {shape: _overlap(found, shape) for shape in SHAPES}
    shape = max(overlaps, key=lambda shape: overlaps[shape])
    middle = ((left + right) / 2 - image.width / 2, (top + bottom) / 2 - image.height / 2)
    scale = image.width / SIZE
    half = max(bottom - top, right - left) / 2 / scale
    clear = np.ones(inside.shape, dtype=bool)
    margin = round(2 * scale)
    clear[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = False
    around = pixels[clear] if clear.any() else border
    return Verdict(
        Scene(
            shape,
            _nearest_colour(np.median(pixels[inside], axis=0)),
            background,
            min(SIZES, key=lambda size: abs(SIZES[size] - half)),
            min(
                PLACES,
                key=lambda place: math.dist(
                    middle, [OFFSET * scale * way for way in PLACES[place]]
                ),
            ),
        ),
        float(around.std(axis=0).max()),
        overlaps[shape],
    )


def _nearest_colour(pixel: np.ndarray) -> str:
    name = min(COLOURS, key=lambda name: math.dist(pixel, COLOURS[name]))
    return name if math.dist(pixel, COLOURS[name]) < COLOUR_RADIUS else "unclear"


def _overlap(found: np.ndarray, shape: str) -> float:
    ideal = (
        np.asarray(shape_mask(shape, 64).resize(found.shape[::-1], Image.Resampling.BILINEAR)) > 127
    )
    return float((found & ideal).sum() / (found | ideal).sum())
