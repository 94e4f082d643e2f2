"""The small model's world: scenes of simple shapes, their images and their prompts.

A `World` is a setting: which shapes, colours, sizes, positions, backgrounds and how many objects
there are. `PLACES_WORLD`, `FREE_WORLD` and `FULL_WORLD` are the three steps of difficulty. A scene,
its image and its prompts follow from a `random.Random` alone, so a seed repeats them.

What a prompt leaves out is left open: a prompt is drawn without looking at the values it does not
mention, so that all scenes that agree with a prompt are equally likely, given the prompt. Training
needs this, and so does the exact denoiser in `exact.py`.
"""

import json
import math
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .scenes import COLOURS as EIGHT_COLOURS
from .scenes import OFFSET, OVERSAMPLING

Point = tuple[float, float]
Region = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the side

COLOURS = EIGHT_COLOURS | {"pink": (250, 150, 190), "gray": (130, 130, 130)}
ATTRIBUTES = ("size", "colour", "shape", "place")  # of an object; `outlined` beside them
LINE = 4  # width of an outline and of a stripe's edge, pixels at a side of 128
RELATIONS = ("left of", "right of", "above", "below")


def _regular(corners: int, inner: float, turn: float = 0.0) -> list[Point]:
    """A star: `corners` tips on the unit circle with notches at the radius `inner` between them."""
    points = []
    for index in range(2 * corners):
        angle = math.pi * index / corners - math.pi / 2 + turn
        radius = inner if index % 2 else 1.0
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def _arc(centre: Point, radius: float, start: float, stop: float, count: int = 48) -> list[Point]:
    """Points on a circle. Angles in degrees, clockwise from the right, since y points down."""
    angles = (math.radians(start + (stop - start) * index / count) for index in range(count + 1))
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]


def _heart() -> list[Point]:
    """Two half circles over a tip, widest at the top."""
    return [
        *_arc((-0.5, -0.4), 0.5, 180, 360, 24),
        *_arc((0.5, -0.4), 0.5, 180, 360, 24),
        (0.93, 0.02),
        (0.0, 0.95),
        (-0.93, 0.02),
    ]


def _moon() -> list[Point]:
    """A crescent that opens to the right."""
    outer = _arc((0.0, 0.0), 1.0, 60, 300)
    tip = (math.cos(math.radians(60)), math.sin(math.radians(60)))
    middle, radius = 0.62, math.dist((0.62, 0.0), tip)
    angle = math.degrees(math.atan2(tip[1], tip[0] - middle))
    return outer + _arc((middle, 0.0), radius, -angle, -360 + angle)


# Corners with x and y in about -1..1, y down. `outline_of` stretches each to a width or height of
# 2.
OUTLINES: dict[str, list[Point]] = {
    "circle": _arc((0, 0), 1, 0, 360, 96),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "star": _regular(5, 0.42),
    "heart": _heart(),
    "cross": [
        (-0.36, -1),
        (0.36, -1),
        (0.36, -0.36),
        (1, -0.36),
        (1, 0.36),
        (0.36, 0.36),
        (0.36, 1),
        (-0.36, 1),
        (-0.36, 0.36),
        (-1, 0.36),
        (-1, -0.36),
        (-0.36, -0.36),
    ],
    "arrow": [(0, -1), (0.9, 0), (0.36, 0), (0.36, 1), (-0.36, 1), (-0.36, 0), (-0.9, 0)],
    "moon": _moon(),
    "semicircle": _arc((0, 0.5), 1, 180, 360),
}


@cache
def outline_of(shape: str) -> tuple[Point, ...]:
    """The shape's corners, its bounding box centred on 0 and the longer side of it 2."""
    xs, ys = zip(*OUTLINES[shape])
    half = max(max(xs) - min(xs), max(ys) - min(ys)) / 2
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return tuple(((x - middle_x) / half, (y - middle_y) / half) for x, y in OUTLINES[shape])


@dataclass(frozen=True)
class Object:
    """One shape. x, y: the centre of its bounding box, pixels. size: a name of the world's
    sizes."""

    shape: str
    colour: str
    size: str
    x: int
    y: int
    outlined: bool = False


@dataclass(frozen=True)
class Background:
    """plain has one colour; gradient, striped and checked have two."""

    kind: str
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """What an image shows. Objects do not overlap."""

    objects: tuple[Object, ...]
    background: Background

    @property
    def held_out(self) -> bool:
        """One in six triples of shape, colour and background is never trained on."""
        backgrounds = " ".join(self.background.colours)
        texts = (f"{each.shape} {each.colour} {backgrounds}" for each in self.objects)
        return any(zlib.crc32(text.encode()) % 6 == 0 for text in texts)


@dataclass(frozen=True)
class Stated:
    """What a prompt says of one object. None is left open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    outlined: bool | None = None


@dataclass(frozen=True)
class Prompt:
    """A text and what it says. relation: of the first object to the second."""

    text: str
    objects: tuple[Stated, ...]
    background: Background | None = None
    relation: str | None = None


FIVE_PLACES: dict[str, Region] = {
    "left": (0, 0.4, 0.4, 0.6),
    "right": (0.6, 0.4, 1, 0.6),
    "top": (0.4, 0, 0.6, 0.4),
    "bottom": (0.4, 0.6, 0.6, 1),
    "center": (0.4, 0.4, 0.6, 0.6),
}
_LOW, _MIDDLE, _HIGH = (0, 0.43), (0.43, 0.57), (0.57, 1)
_COLUMNS = {"left": _LOW, "horizontally centered": _MIDDLE, "right": _HIGH}
_ROWS = {"top": _LOW, "vertically centered": _MIDDLE, "bottom": _HIGH}
_CELLS = {
    "top left": (_LOW, _LOW),
    "top center": (_MIDDLE, _LOW),
    "top right": (_HIGH, _LOW),
    "center left": (_LOW, _MIDDLE),
    "center": (_MIDDLE, _MIDDLE),
    "center right": (_HIGH, _MIDDLE),
    "bottom left": (_LOW, _HIGH),
    "bottom center": (_MIDDLE, _HIGH),
    "bottom right": (_HIGH, _HIGH),
}


def _region(columns: tuple[float, float], rows: tuple[float, float]) -> Region:
    return columns[0], rows[0], columns[1], rows[1]


# Each group names every position once. Which group a prompt uses does not depend on the scene.
ONE_GROUP = (FIVE_PLACES,)
THREE_GROUPS = (
    {name: _region(columns, (0, 1)) for name, columns in _COLUMNS.items()},
    {name: _region((0, 1), rows) for name, rows in _ROWS.items()},
    {name: _region(*cell) for name, cell in _CELLS.items()},
)


@dataclass(frozen=True)
class World:
    """Everything a scene can be.

    side: pixels. sizes: name → half of the longer side, pixels. centres: where objects may be;
    empty for anywhere inside with MARGIN pixels to the border. step: of free positions, pixels.
    places: groups of named regions. objects: fewest and most."""

    side: int
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: dict[str, int]
    places: tuple[dict[str, Region], ...] = THREE_GROUPS
    centres: tuple[tuple[int, int], ...] = ()
    step: int = 1
    objects: tuple[int, int] = (1, 1)
    backgrounds: tuple[str, ...] = ("plain",)
    outlines: bool = False
    forms: tuple[str, ...] = field(default=("sentence", "tags"))

    MARGIN = 2
    GAP = 4  # pixels between the bounding boxes of two objects

    def positions(self, size: str) -> list[tuple[int, int]]:
        """Every centre that an object of this size may have."""
        if self.centres:
            return list(self.centres)
        first = self.sizes[size] + self.MARGIN
        line = range(first, self.side - first + 1, self.step)
        return [(x, y) for x in line for y in line]

    def place(self, group: int, x: float, y: float) -> str:
        """The name of a centre in one of the groups of places."""
        x, y = x / self.side, y / self.side
        for name, (left, top, right, bottom) in self.places[group].items():
            if left <= x < right and top <= y < bottom:
                return name
        raise ValueError(f"no place is named for ({x:.2f}, {y:.2f}) of the side")

    def is_at(self, place: str, x: float, y: float, slack: float = 0.0) -> bool:
        """Whether a centre lies in the named region, which is widened by `slack` pixels."""
        regions = next(group for group in self.places if place in group)
        left, top, right, bottom = (self.side * share for share in regions[place])
        return left - slack <= x <= right + slack and top - slack <= y <= bottom + slack

    def scene(self, rng: random.Random, held_out: bool = False) -> Scene:
        """Draw a scene: one of training, or of those that are held out."""
        while True:
            scene = self._scene(rng)
            if scene is not None and scene.held_out == held_out:
                return scene

    def _scene(self, rng: random.Random) -> Scene | None:
        """None where the objects drawn do not fit beside each other."""
        kind = rng.choice(self.backgrounds)
        background = Background(kind, tuple(rng.sample(self.colours, 1 if kind == "plain" else 2)))
        others = [colour for colour in self.colours if colour not in background.colours]
        objects: list[Object] = []
        for _ in range(rng.randint(*self.objects)):
            size = rng.choice(list(self.sizes))
            x, y = rng.choice(self.positions(size))
            drawn = Object(
                rng.choice(self.shapes),
                rng.choice(others),
                size,
                x,
                y,
                self.outlines and rng.random() < 0.25,
            )
            if any(self._collide(drawn, other) for other in objects):
                return None
            objects.append(drawn)
        return Scene(tuple(objects), background)

    def _collide(self, one: Object, other: Object) -> bool:
        reach = self.sizes[one.size] + self.sizes[other.size] + self.GAP
        return max(abs(one.x - other.x), abs(one.y - other.y)) < reach

    def image(self, scene: Scene) -> Image.Image:
        """Return the scene as a side x side RGB image with smooth edges."""
        image = background_image(scene.background, self.side)
        for each in scene.objects:
            mask = object_mask(each.shape, self.sizes[each.size], each.outlined)
            corner = each.x - mask.width // 2, each.y - mask.height // 2
            image.paste(COLOURS[each.colour], corner, mask)
        return image


SHAPES = tuple(OUTLINES)
PLACES_WORLD = World(
    side=96,
    shapes=SHAPES[:4],
    colours=tuple(EIGHT_COLOURS),
    sizes={"small": 16, "large": 32},
    places=ONE_GROUP,
    centres=tuple(
        (48 + OFFSET * x, 48 + OFFSET * y) for x, y in ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
    ),
)
FREE_WORLD = World(
    side=128,
    shapes=SHAPES,
    colours=tuple(COLOURS),
    sizes={"small": 12, "medium": 20, "large": 32},
    step=2,
)
FULL_WORLD = replace(
    FREE_WORLD,
    objects=(0, 3),
    backgrounds=("plain", "plain", "gradient", "striped", "checked"),
    outlines=True,
)
WORLDS = {"places": PLACES_WORLD, "free": FREE_WORLD, "full": FULL_WORLD}


@cache
def object_mask(shape: str, half: int, outlined: bool = False) -> Image.Image:
    """The shape's coverage, 0 to 255, in an image of 2 half x 2 half pixels."""
    side = 2 * half * OVERSAMPLING
    mask = Image.new("L", (side, side))
    points = [((x + 1) / 2 * (side - 1), (y + 1) / 2 * (side - 1)) for x, y in outline_of(shape)]
    pen = ImageDraw.Draw(mask)
    if shape == "circle":
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    else:
        pen.polygon(points, fill=255)
    if outlined:
        inner = _shrunk(np.asarray(mask) > 0, LINE * OVERSAMPLING)
        mask = Image.fromarray(np.where(inner, 0, np.asarray(mask)).astype(np.uint8))
    return mask.reduce(OVERSAMPLING)


def _shrunk(inside: np.ndarray, distance: int) -> np.ndarray:
    """The pixels whose neighbours up to `distance` away, in a disc, are all inside."""
    padded = np.pad(inside, distance)
    result = inside.copy()
    height, width = inside.shape
    for turn in range(64):
        angle = 2 * math.pi * turn / 64
        dx = distance + round(distance * math.cos(angle))
        dy = distance + round(distance * math.sin(angle))
        result &= padded[dy : dy + height, dx : dx + width]
    return result


@cache
def _background_pixels(background: Background, side: int) -> np.ndarray:
    """(side, side, 3) uint8."""
    first, second = (
        np.array(COLOURS[each], dtype=np.float32)
        for each in (background.colours[0], background.colours[-1])
    )
    row, column = np.mgrid[:side, :side]
    width = side // 8
    match background.kind:
        case "plain":
            share = np.zeros((side, side))
        case "gradient":  # from top to bottom
            share = row / (side - 1)
        case "striped":  # vertical
            share = column // width % 2
        case "checked":
            share = (column // width + row // width) % 2
        case _:
            raise ValueError(
                f"background kind is {background.kind!r}; expected plain, gradient, "
                "striped or checked"
            )
    return np.round(first + share[..., None] * (second - first)).astype(np.uint8)


def background_image(background: Background, side: int) -> Image.Image:
    """An image of the background alone."""
    return Image.fromarray(_background_pixels(background, side))


# Prompts. Every phrase of a name is as likely as the others, whatever the scene.

SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc", "dot"),
    "square": ("square",),
    "triangle": ("triangle",),
    "diamond": ("diamond", "diamond", "rhombus"),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus sign"),
    "arrow": ("arrow",),
    "moon": ("moon", "crescent", "crescent moon"),
    "semicircle": ("semicircle", "half circle"),
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "large", "big", "huge"),
    "gray": ("gray", "grey"),
    "purple": ("purple", "purple", "violet"),
}
ANYTHING = ("shape", "shape", "object", "figure")  # a shape that is left open
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left", "at the left", "left", "on the left side"),
    "right": ("on the right", "on the right", "at the right", "right", "on the right side"),
    "top": ("at the top", "at the top", "on top", "top"),
    "bottom": ("at the bottom", "at the bottom", "bottom"),
    "center": ("in the center", "in the middle", "center", "centered", "in the centre"),
    "horizontally centered": ("horizontally centered",),
    "vertically centered": ("vertically centered",),
}
PLACE_PHRASES |= {
    name: (f"at the {name}", f"in the {name}", name) for name in _CELLS if name != "center"
}
PLACE_PHRASES |= {
    name: (*PLACE_PHRASES[name], f"in the {name} corner")
    for name in ("top left", "top right", "bottom left", "bottom right")
}
NUMBERS = {2: ("two", "2"), 3: ("three", "3")}
PREFIXES = ("a picture of ", "an image of ", "draw ", "there is ")


@dataclass(frozen=True)
class Choice:
    """Which attributes a prompt mentions, drawn independently of the scene."""

    attributes: tuple[frozenset[str], ...]  # for each object
    background: bool
    relation: bool = False


def choose(world: World, rng: random.Random, objects: int = 1, full: float = 0.3) -> Choice:
    """Draw what to mention: all with probability `full`, else any subset, each as likely."""
    said = []
    everything = rng.random() < full
    background = everything or rng.random() < 0.5
    for _ in range(objects):
        names = (*ATTRIBUTES, "outlined") if world.outlines else ATTRIBUTES
        said.append(frozenset(name for name in names if everything or rng.random() < 0.5))
    return Choice(tuple(said), background, objects == 2 and rng.random() < 0.5)


def prompt_for(
    world: World, scene: Scene, rng: random.Random, choice: Choice | None = None
) -> Prompt:
    """Describe the scene in words.

    choice: what is mentioned; drawn by `choose` where it is None. An empty text says nothing and
    stands for an empty choice in one time of two."""
    choice = choice or choose(world, rng, len(scene.objects))
    relation = _relation(scene.objects) if choice.relation else None
    group = rng.randrange(len(world.places))
    objects = tuple(
        Stated(
            shape=each.shape if "shape" in names else None,
            colour=each.colour if "colour" in names else None,
            size=each.size if "size" in names else None,
            place=world.place(group, each.x, each.y) if "place" in names else None,
            outlined=each.outlined if "outlined" in names else None,
        )
        for each, names in zip(scene.objects, choice.attributes, strict=True)
    )
    if relation:  # instead of the places
        objects = tuple(replace(each, place=None) for each in objects)
    background = scene.background if choice.background else None
    said = any(each != Stated() for each in objects) or background or relation
    if not said and len(objects) < 2 and rng.random() < 0.5:
        return Prompt("", objects)
    return Prompt(
        write(objects, background, relation, rng, world.forms), objects, background, relation
    )


def _relation(objects: Sequence[Object]) -> str | None:
    """How the first object lies to the second: by the larger of the two distances."""
    one, other = objects[:2]
    across, down = one.x - other.x, one.y - other.y
    if abs(across) >= abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def write(
    objects: Sequence[Stated],
    background: Background | None,
    relation: str | None,
    rng: random.Random,
    forms: Sequence[str] = ("sentence",),
) -> str:
    """Put what is said into a phrase of the given forms: a sentence, or tags between commas."""
    if len(objects) == 1 and rng.choice(forms) == "tags" and rng.random() < 0.4:
        text = _tags(objects[0], background, rng)
    else:
        text = _sentence(objects, background, relation, rng)
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.05:
        text += "."
    return text


def _word(name: str, rng: random.Random) -> str:
    return rng.choice(SYNONYMS.get(name, (name,)))


def _tags(each: Stated, background: Background | None, rng: random.Random) -> str:
    """ "circle, red, left, blue background", in any order."""
    tags = [_word(name, rng) for name in (each.size, each.colour, each.shape) if name]
    if each.outlined is not None:
        tags.append("outline" if each.outlined else "filled")
    if each.place:
        tags.append(rng.choice(PLACE_PHRASES[each.place]))
    if each.shape is None:
        tags.append(rng.choice(ANYTHING))
    if background:
        tags.append(f"{_background_words(background, rng)} background")
    rng.shuffle(tags)
    return ", ".join(tags)


def _noun(each: Stated, rng: random.Random, plural: bool = False) -> str:
    """ "large red circle", without an article."""
    words = [_word(name, rng) for name in (each.size, each.colour) if name]
    if each.outlined is not None:
        words.append(rng.choice(("outlined", "hollow") if each.outlined else ("filled", "solid")))
    noun = _word(each.shape, rng) if each.shape else rng.choice(ANYTHING)
    return " ".join([*words, _plural(noun) if plural else noun])


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def with_article(noun: str) -> str:
    """The noun behind a or an."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _background_words(background: Background, rng: random.Random) -> str:
    """What comes before "background"."""
    words = [_word(colour, rng) for colour in background.colours]
    match background.kind:
        case "plain":
            return words[0]
        case "gradient":
            return f"{words[0]} to {words[1]} gradient"
        case "striped":
            return f"{words[0]} and {words[1]} striped"
    return f"{words[0]} and {words[1]} {rng.choice(('checked', 'checkered'))}"


def _sentence(
    objects: Sequence[Stated],
    background: Background | None,
    relation: str | None,
    rng: random.Random,
) -> str:
    """ "a large red circle on the left of a blue background" and the like."""
    behind = _background_words(background, rng) if background else ""
    if not objects:
        return f"{with_article(behind)} background" if behind else "an empty image"
    places = {each.place for each in objects}
    same = len(set(objects)) == 1 and len(objects) > 1 and not relation
    if same:
        subject = f"{rng.choice(NUMBERS[len(objects)])} {_noun(objects[0], rng, plural=True)}"
    else:
        nouns = [_noun(each, rng) for each in objects]
        if len(objects) > 1 or rng.random() < 0.75:
            nouns = [with_article(noun) for noun in nouns]
        if relation:
            between = f"to the {relation}" if rng.random() < 0.3 and "of" in relation else relation
            subject = f"{nouns[0]} {between} {nouns[1]}"
        else:
            if len(objects) > 1:
                nouns = [
                    f"{noun} {rng.choice(PLACE_PHRASES[each.place])}" if each.place else noun
                    for noun, each in zip(nouns, objects)
                ]
            subject = f"{', '.join(nouns[:-1])} and {nouns[-1]}" if nouns[1:] else nouns[0]
    place = next(iter(places)) if same or len(objects) == 1 else None
    where = rng.choice(PLACE_PHRASES[place]) if place else ""
    return _arranged(subject, where, behind, rng)


def _arranged(subject: str, where: str, behind: str, rng: random.Random) -> str:
    """Put subject, place and background into one of the usual orders."""
    if not where and not behind and rng.random() < 0.2:
        return rng.choice(PREFIXES) + subject
    backing = ""
    if behind:
        backing = rng.choice(
            (
                f"on {with_article(behind)} background",
                f"on {with_article(behind)} background",
                f"on {behind}",
                f"on {behind} background",
                f"with {with_article(behind)} background",
                f"against {with_article(behind)} background",
            )
        )
    if where and rng.random() < 0.15:
        return f"{where}, {' '.join(filter(None, (subject, backing)))}"
    if behind and rng.random() < 0.1:
        return " ".join(filter(None, (f"{with_article(behind)} background with", subject, where)))
    comma = rng.choice((" ", ", "))
    if rng.random() < 0.5:
        return comma.join(filter(None, (f"{subject} {backing}".strip(), where)))
    return " ".join(filter(None, (f"{subject}{comma}{where}" if where else subject, backing)))


def read_prompts(file: Path) -> list[Prompt]:
    """Read prompts of one object on a plain background: a JSON object in each line, with `text` and
    what it says. Raises ValueError for a line that is not one."""
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            text, background = row.pop("text"), row.pop("background", None)
            plain = Background("plain", (background,)) if background else None
            prompts.append(Prompt(text, (Stated(**row),), plain))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file}, line {number} is no prompt ({error}); expected a JSON object "
                "with text and any of shape, colour, size, place, background"
            ) from None
    return prompts


FILLERS = (
    "a an and the of to on in at with against is there it image picture empty plain background"
)
PATTERNS = "gradient striped checked checkered"
FORMS = "outline outlined hollow filled solid"


def vocabulary(world: World = FULL_WORLD) -> frozenset[str]:
    """Every word that a prompt of the world can hold, in lower case."""
    names = {*world.shapes, *world.colours, *world.sizes, *ANYTHING}
    places = [place for group in world.places for place in group]
    texts: list[str] = [FILLERS, *names, *PREFIXES]
    for name in names:
        texts += SYNONYMS.get(name, ())
    for place in places:
        texts += PLACE_PHRASES[place]
    if max(world.objects) > 1:
        nouns = [phrase for name in (*world.shapes, *ANYTHING) for phrase in nouns_of(name)]
        texts += [*RELATIONS, *map(_plural, nouns)]
        texts += [phrase for phrases in NUMBERS.values() for phrase in phrases]
    if set(world.backgrounds) - {"plain"}:
        texts.append(PATTERNS)
    if world.outlines:
        texts.append(FORMS)
    return frozenset(word for text in texts for word in words_of(text))


def nouns_of(name: str) -> tuple[str, ...]:
    """A shape's name and its synonyms."""
    return (name, *SYNONYMS.get(name, ()))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:-[^\W_]+)*", text.lower())


def unknown_words(text: str, world: World = FULL_WORLD) -> list[str]:
    """The words of a prompt that no prompt of the world holds, each once, in their order."""
    known = vocabulary(world)
    return list(dict.fromkeys(word for word in words_of(text) if word not in known))


def unknown_words_message(text: str, world: World = FULL_WORLD) -> str:
    """ "The bundled model does not know: cat", or "" where it knows every word."""
    unknown = unknown_words(text, world)
    return f"The bundled model does not know: {', '.join(unknown)}" if unknown else ""
