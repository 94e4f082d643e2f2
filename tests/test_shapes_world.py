"""The small model's world and its judge: the generator's own images pass, one wrong attribute
fails."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comfyui_l2p.l2p_core.shapes import scenes as bundled
from comfyui_l2p.l2p_core.shapes import world as world_module
from comfyui_l2p.l2p_core.shapes.judge import examine, holds, scene_of, score
from comfyui_l2p.l2p_core.shapes.world import (
    COLOURS,
    FREE_WORLD,
    FULL_WORLD,
    PLACES_WORLD,
    RELATIONS,
    WORLDS,
    Background,
    Choice,
    Object,
    Prompt,
    Scene,
    Stated,
    prompt_for,
    read_prompts,
    unknown_words,
    unknown_words_message,
    vocabulary,
    words_of,
)
from PIL import Image, ImageFilter

ALL = frozenset(("size", "colour", "shape", "place"))


def drawn(world, count, seed=0, held_out=False):
    """Scenes with a prompt each."""
    rng = random.Random(seed)
    scenes = [world.scene(rng, held_out) for _ in range(count)]
    return scenes, [prompt_for(world, scene, rng) for scene in scenes]


def full_prompts(world, scenes, seed=0):
    rng = random.Random(seed)
    return [prompt_for(world, scene, rng, Choice((ALL,), background=True)) for scene in scenes]


@pytest.mark.parametrize("name", WORLDS)
def test_a_seed_repeats_scenes_images_and_prompts(name):
    world = WORLDS[name]
    one, other = drawn(world, 20, seed=5), drawn(world, 20, seed=5)
    assert one == other != drawn(world, 20, seed=6)
    assert all(
        world.image(a).tobytes() == world.image(b).tobytes() for a, b in zip(one[0], other[0])
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_the_generators_own_images_score_100(name):
    scenes, prompts = drawn(WORLDS[name], 120)
    result = score([WORLDS[name].image(scene) for scene in scenes], prompts, WORLDS[name])
    assert set(result.values()) == {100.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ("places", "free"))
def test_the_judge_finds_the_very_scene(name):
    world = WORLDS[name]
    for scene in drawn(world, 60)[0]:
        found = scene_of(examine(world.image(scene), world))
        place = found.objects[0].x - scene.objects[0].x, found.objects[0].y - scene.objects[0].y
        assert max(map(abs, place)) <= 1
        moved = replace(found.objects[0], x=scene.objects[0].x, y=scene.objects[0].y)
        assert replace(found, objects=(moved,)) == scene


def test_the_places_world_has_the_bundled_models_images():
    for old in bundled.scenes()[::37]:
        column, row = (48 + bundled.OFFSET * way for way in bundled.PLACES[old.place])
        scene = Scene(
            (Object(old.shape, old.colour, old.size, column, row),),
            Background("plain", (old.background,)),
        )
        difference = np.subtract(PLACES_WORLD.image(scene), bundled.render(old), dtype=float)
        assert np.abs(difference).mean() < 0.5
        assert scene.held_out == old.held_out


def wrong(scene, attribute, world, rng):
    """The scene with another value of one attribute."""
    (only,) = scene.objects
    used = {only.colour, *scene.background.colours}
    if attribute == "background":
        colour = rng.choice([each for each in world.colours if each not in used])
        return replace(scene, background=Background("plain", (colour,)))
    if attribute == "place":
        right = world.place(-1, only.x, only.y)
        while world.is_at(right, only.x, only.y, slack=5):
            x, y = rng.choice(world.positions(only.size))
            only = replace(only, x=x, y=y)
        return replace(scene, objects=(only,))
    choices = {
        "shape": world.shapes,
        "size": tuple(world.sizes),
        "colour": tuple(each for each in world.colours if each not in used),
    }[attribute]
    value = rng.choice([each for each in choices if each != getattr(only, attribute)])
    if attribute == "size":  # in the middle every size fits
        only = replace(only, x=world.side // 2, y=world.side // 2)
    return replace(scene, objects=(replace(only, **{attribute: value}),))


@pytest.mark.slow
@pytest.mark.parametrize("attribute", ("shape", "colour", "size", "place", "background"))
@pytest.mark.parametrize("name", ("places", "free"))
def test_one_wrong_attribute_fails_alone(name, attribute):
    rng = random.Random(1)
    world = replace(WORLDS[name], places=WORLDS[name].places[-1:])  # a wrong place fails in all
    scenes = drawn(world, 40)[0]
    if attribute == "size":
        scenes = [
            replace(each, objects=(replace(each.objects[0], x=world.side // 2, y=world.side // 2),))
            for each in scenes
        ]
    prompts = full_prompts(world, scenes)
    spoilt = [world.image(wrong(scene, attribute, world, rng)) for scene in scenes]
    result = score(spoilt, prompts, world)
    assert result["right"] == result[attribute] == 0
    others = {key: value for key, value in result.items() if key not in ("right", attribute)}
    assert set(others.values()) == {100.0}


@pytest.mark.parametrize(
    "attribute, value",
    [
        ("shape", "moon"),
        ("colour", "pink"),
        ("size", "large"),
        ("place", "top left"),
        ("outlined", True),
    ],
)
def test_what_is_not_said_is_not_asked(attribute, value):
    scene = Scene((Object("circle", "red", "small", 96, 96),), Background("plain", ("blue",)))
    found = examine(FULL_WORLD.image(scene), FULL_WORLD)
    assert all(found.check(Prompt("", (Stated(),))).values())
    checks = found.check(Prompt("", (Stated(**{attribute: value}),)))
    assert [name for name, good in checks.items() if not good] == [attribute]


def test_two_objects_are_matched_in_any_order_and_relations_are_checked():
    red = Object("circle", "red", "medium", 30, 60)
    green = Object("star", "green", "small", 90, 64)
    scene = Scene((red, green), Background("checked", ("white", "blue")))
    found = examine(FULL_WORLD.image(scene), FULL_WORLD)
    star, circle = Stated(shape="star", colour="green"), Stated(shape="circle")
    assert all(found.check(Prompt("", (star, circle))).values())
    assert all(found.check(Prompt("", (circle, star), relation="left of")).values())
    checks = found.check(Prompt("", (star, circle), relation="left of"))
    assert not checks["relation"] and checks["shape"]
    assert not found.check(Prompt("", (circle,)))["count"]
    swapped = Stated(shape="circle", colour="green"), Stated(shape="star", colour="red")
    assert not all(found.check(Prompt("", swapped)).values())
    assert [holds(relation, red, green) for relation in RELATIONS] == [True, False, True, False]


def faded(image, towards, share):
    return Image.blend(image, Image.new("RGB", image.size, towards), share)


def noisy(image, strength):
    noise = np.random.default_rng(0).normal(0, strength, (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, failing",
    [
        (lambda image: faded(image, (125, 125, 125), 0.5), "right"),
        (lambda image: faded(image, image.getpixel((0, 0)), 0.5), "right"),
        (lambda image: noisy(image, 6), "clean"),
        (lambda image: image.filter(ImageFilter.GaussianBlur(12)), "right"),
        (lambda image: Image.effect_noise(image.size, 80).convert("RGB"), "right"),
        (lambda image: Image.new("RGB", image.size, COLOURS["red"]), "count"),
    ],
)
def test_spoilt_images_fail(spoil, failing):
    scenes = drawn(FREE_WORLD, 20)[0]
    images = [spoil(FREE_WORLD.image(scene)) for scene in scenes]
    result = score(images, full_prompts(FREE_WORLD, scenes), FREE_WORLD)
    assert result["right"] == result[failing] == 0


def test_a_blend_of_two_choices_is_not_clear():
    one, other = (
        Scene((Object("circle", "red", "large", x, 64),), Background("plain", ("blue",)))
        for x in (54, 74)
    )
    blend = Image.blend(FREE_WORLD.image(one), FREE_WORLD.image(other), 0.5)
    checks = examine(blend, FREE_WORLD).check(Prompt("a red circle", (Stated("circle", "red"),)))
    assert not checks["clear"]


def test_held_out_scenes_are_never_drawn_for_training():
    trained = {
        (each.objects[0].shape, each.objects[0].colour, each.background.colours)
        for each in drawn(PLACES_WORLD, 2000)[0]
    }
    tested = {
        (each.objects[0].shape, each.objects[0].colour, each.background.colours)
        for each in drawn(PLACES_WORLD, 300, held_out=True)[0]
    }
    assert trained and tested and not trained & tested


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_prompts_say_what_they_claim_in_known_words(name):
    known = vocabulary(WORLDS[name])
    scenes, prompts = drawn(WORLDS[name], 2000)
    assert len({prompt.text for prompt in prompts}) > 900
    assert {word for prompt in prompts for word in words_of(prompt.text)} <= known
    for prompt in prompts:
        for stated in prompt.objects:
            if stated.colour in ("red", "blue", "green"):
                assert stated.colour in prompt.text.lower()
    if name != "full":
        counts = [
            sum(value is not None for value in vars(prompt.objects[0]).values())
            for prompt in prompts
        ]
        assert sum(count < 4 for count in counts) > len(counts) / 2


def test_every_position_has_one_name_in_each_group_of_places():
    for world in (PLACES_WORLD, FREE_WORLD):
        for size in world.sizes:
            for x, y in world.positions(size):
                for group in range(len(world.places)):
                    assert world.is_at(world.place(group, x, y), x, y)


def test_the_fixed_prompts_are_of_the_first_world(tmp_path):
    prompts = read_prompts(Path(world_module.__file__).with_name("prompts.jsonl"))
    assert len({prompt.text for prompt in prompts}) == 30
    for prompt in prompts:
        (stated,) = prompt.objects
        place = stated.place or "left"
        x, y = next(each for each in PLACES_WORLD.centres if PLACES_WORLD.is_at(place, *each))
        other = "black" if stated.colour == "green" else "green"
        background = prompt.background or Background("plain", (other,))
        left = [each for each in ("red", "blue") if each not in background.colours]
        only = Object(
            stated.shape or "circle", stated.colour or left[0], stated.size or "small", x, y
        )
        found = examine(PLACES_WORLD.image(Scene((only,), background)), PLACES_WORLD)
        assert all(found.check(prompt).values()), prompt.text
        assert not unknown_words(prompt.text, PLACES_WORLD)
    (tmp_path / "bad.jsonl").write_text('{"text": "a circle", "form": "circle"}')
    with pytest.raises(ValueError, match="line 1 is no prompt .*form"):
        read_prompts(tmp_path / "bad.jsonl")


def test_unknown_words_are_named():
    assert unknown_words("A red cat, on the left of a Blue dog; cat") == ["cat", "dog"]
    assert unknown_words_message("two red circles above a checkered heart") == ""
    assert unknown_words("two green stars, outlined", PLACES_WORLD) == ["two", "stars", "outlined"]
    assert unknown_words_message("a cat") == "The bundled model does not know: cat"
