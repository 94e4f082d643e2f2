"""Read what a short prompt says, and fill in at random what it leaves open.

For one object on a plain background. The grammar is that of `world.write`, and free word order
beside it: sizes, colours, shapes and places are found by name or synonym. A colour is the
background's where "background" follows it, or where it comes after the shape and "on", "over" or
"against"."""

import random
import re
import warnings
from collections.abc import Iterator

from .world import (
    ANYTHING,
    PLACE_PHRASES,
    PLACES_WORLD,
    SYNONYMS,
    Background,
    Object,
    Prompt,
    Scene,
    Stated,
    World,
    unknown_words_message,
    with_article,
)

_BEHIND = r"(?:on|over|against|with|in front of)(?: an?| the)? "


def parse(text: str, world: World) -> Prompt:
    """Return what the text says in the world's terms. What it does not name, or names in words that
    are not known, is left open: see `unknown_words`."""
    rest = " ".join(re.findall(r"[\w-]+|,", text.lower())).replace(" ,", ",")
    background, rest = _take_background(rest, world)
    place, rest = _take_place(rest, world)
    shape, rest = _take(rest, world.shapes)
    size, rest = _take(rest, tuple(world.sizes))
    colour, rest = _take(rest, world.colours)
    behind = Background("plain", (background,)) if background else None
    return Prompt(text, (Stated(shape, colour, size, place),), behind)


def _words(name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*SYNONYMS.get(name, ()), name)))


def _phrases(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(phrase, name), the longest phrase first."""
    pairs = [(phrase, name) for name in names for phrase in _words(name)]
    yield from sorted(pairs, key=lambda pair: -len(pair[0]))


def _take(text: str, names: tuple[str, ...]) -> tuple[str | None, str]:
    """The first of the names that the text holds, and the text without it."""
    for phrase, name in _phrases(names):
        found = re.search(rf"\b{re.escape(phrase)}\b", text)
        if found:
            return name, text[: found.start()] + text[found.end() :]
    return None, text


def _take_background(text: str, world: World) -> tuple[str | None, str]:
    nouns = "|".join({word for shape in world.shapes for word in _words(shape)} | set(ANYTHING))
    for phrase, name in _phrases(world.colours):
        for pattern in (
            rf"(?:{_BEHIND})?(?:\ban? )?\b{phrase} background\b",
            rf"\b(?:on|over|against) {phrase}\b(?! (?:{nouns})\b)",
        ):
            found = re.search(pattern, text)
            if found:
                return name, f"{text[: found.start()]},{text[found.end() :]}"
    return None, text


def _take_place(text: str, world: World) -> tuple[str | None, str]:
    places = tuple(place for group in world.places for place in group)
    pairs = [(phrase, place) for place in places for phrase in PLACE_PHRASES[place]]
    for phrase, place in sorted(pairs, key=lambda pair: -len(pair[0])):
        found = re.search(rf"\b{re.escape(phrase)}\b", text)
        if found:
            return place, text[: found.start()] + text[found.end() :]
    return None, text


def complete(text: str, world: World, seed: int) -> str:
    """Return a full prompt: what the text says, and the rest drawn at random by the seed.

    The same text and seed give the same prompt. Drawn is only what training holds, where the text
    allows it."""
    said, rng = parse(text, world), random.Random(f"{seed} {text}")
    (stated,) = said.objects
    pairs = [
        (one, two)
        for one in world.colours
        for two in world.colours
        if one != two
        and stated.colour in (None, one)
        and said.background in (None, Background("plain", (two,)))
    ]
    if not pairs:
        raise ValueError(
            f"no scene of the small model's world agrees with {text!r}: shape and "
            f"background are both {stated.colour}. Give colours that differ"
        )
    for _ in range(100):
        shape = stated.shape or rng.choice(world.shapes)
        colour, background = rng.choice(pairs)
        behind = Background("plain", (background,))
        if not Scene((Object(shape, colour, "", 0, 0),), behind).held_out:
            break
    size = stated.size or rng.choice(tuple(world.sizes))
    place = stated.place or world.place(-1, *rng.choice(world.positions(size)))
    noun = with_article(f"{size} {colour} {shape}")
    return f"{noun} on {with_article(background)} background, {place}"


def read_prompt(text: str, seed: int) -> str:
    """Return a prompt as the bundled model is to read it: complete, in the words of its training.

    Words that it does not know are named in a warning. An empty prompt stays empty. Raises
    ValueError for a prompt that no image of its world fits."""
    if not text.strip():
        return text
    if message := unknown_words_message(text, PLACES_WORLD):
        warnings.warn(message, stacklevel=2)
    return complete(text, PLACES_WORLD, seed)
