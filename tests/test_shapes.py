"""The judge of the small model is judged: true images pass, and one wrong attribute fails. And
its recipe runs."""

import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.files.layout import defaults_metadata
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.shapes import score as scoring
from comfyui_l2p.l2p_core.shapes import train as recipe
from comfyui_l2p.l2p_core.shapes.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZE,
    SIZES,
    Scene,
    render,
    scenes,
    training_scenes,
)
from comfyui_l2p.l2p_core.shapes.scenes import (
    test_scenes as held_out_scenes,
)
from comfyui_l2p.l2p_core.shapes.score import contact_sheet, score
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

SCENES = held_out_scenes(60)
CHOICES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "size": tuple(SIZES),
    "place": tuple(PLACES),
}


def images(wanted):
    return [render(scene) for scene in wanted]


@pytest.mark.slow
def test_the_generators_own_images_score_100():
    assert set(score(images(scenes()[::7]), scenes()[::7]).values()) == {100.0}


@pytest.mark.parametrize("attribute", CHOICES)
def test_one_wrong_attribute_scores_0(attribute):
    rng = random.Random(1)
    wrong = []
    for scene in SCENES:
        others = [
            value
            for value in CHOICES[attribute]
            if value not in (scene.colour, scene.background, getattr(scene, attribute))
        ]
        wrong.append(replace(scene, **{attribute: rng.choice(others)}))
    result = score(images(wrong), SCENES)
    assert result["right"] == 0 and result[attribute] == 0
    assert all(value == 100 for name, value in result.items() if name not in ("right", attribute))


def faded(image, towards, share):
    return Image.blend(image, Image.new("RGB", image.size, towards), share)


@pytest.mark.parametrize(
    "spoil, attribute",
    [
        (lambda image: faded(image, (125, 125, 125), 0.4), "right"),
        (lambda image: faded(image, image.getpixel((0, 0)), 0.5), "right"),
        (
            lambda image: Image.fromarray(
                np.clip(
                    np.asarray(image) + np.random.default_rng(0).normal(0, 5, (SIZE, SIZE, 3)),
                    0,
                    255,
                ).astype(np.uint8)
            ),
            "clean",
        ),
        (lambda image: image.filter(ImageFilter.GaussianBlur(9)), "right"),
        (lambda image: Image.effect_noise((SIZE, SIZE), 80).convert("RGB"), "clean"),
    ],
)
def test_spoilt_images_score_0(spoil, attribute):
    result = score([spoil(image) for image in images(SCENES)], SCENES)
    assert result["right"] == 0 and result[attribute] == 0


def test_a_blank_image_is_judged_not_crashed_on():
    assert (
        score([Image.new("RGB", (SIZE, SIZE), COLOURS["red"])] * len(SCENES), SCENES)["right"] == 0
    )


def test_test_prompts_were_never_trained_on():
    tests = held_out_scenes()
    triples, trained = (
        {(scene.shape, scene.colour, scene.background) for scene in some}
        for some in (tests, training_scenes())
    )
    assert len(set(tests)) == 300 and not triples & trained and len(trained) > 150
    for index, words in enumerate((SHAPES, COLOURS, COLOURS)):
        assert {triple[index] for triple in trained} == set(words), (
            "each word is learned, only not in these combinations"
        )


def test_captions_and_contact_sheet():
    scene = Scene("circle", "red", "blue", "large", "left")
    assert scene.caption() == "a large red circle on a blue background, left"
    assert (
        replace(scene, colour="orange").caption(False, False)
        == "an orange circle on a blue background"
    )
    assert contact_sheet(images([scene] * 7), [scene.caption()] * 7).size == (
        6 * (SIZE + 8),
        2 * (SIZE + 58),
    )


SETTINGS, FINISH = (
    Path(recipe.__file__).with_name(name) for name in ("shapes.toml", "finish.toml")
)


@pytest.mark.slow
def test_the_recipe_makes_a_model_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    few = training_scenes()[::50]
    monkeypatch.setattr(recipe, "scenes", lambda: few)
    monkeypatch.setattr(recipe, "training_scenes", lambda: few)
    monkeypatch.setattr(recipe, "SCORED", 2)

    def run(folder, steps):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        flags = [
            "--batch",
            "2",
            "--save-every",
            "2",
            "--sample-every",
            "4",
            "--sample-steps",
            "2",
            "--device",
            "cpu",
            "--schedule",
            "constant",
            "--mixed-precision",
            "no",  # bfloat16 is slow where a CPU has no arithmetic for it
        ]
        assert main(["train", str(SETTINGS), *flags, "--steps", str(steps)]) == 0
        return tmp_path / folder / "shapes" / "run" / f"step-{steps}.safetensors"

    whole = load_file(run("whole", 4))
    run("halves", 2)
    found = load_file(run("halves", 4))
    assert (
        whole.keys()
        == found.keys()
        == load_file(tmp_path / "whole/shapes/init/transformer.safetensors").keys()
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    one, other = (
        tree_leaves(torch.load(tmp_path / folder / "shapes/run/resume.pt"))
        for folder in ("whole", "halves")
    )
    assert len(one) == len(other) > 500, "the optimizers' state and the guide are there too"
    assert all(
        torch.equal(*pair) if isinstance(pair[0], torch.Tensor) else pair[0] == pair[1]
        for pair in zip(one, other)
    )
    assert (
        (tmp_path / "whole/shapes/run/samples/step-0000004.json")
        .read_text()
        .startswith('{"right": 0')
    )
    image = tmp_path / "out.png"
    assert (
        main(
            [
                "generate",
                "a red circle",
                "--checkpoint",
                str(tmp_path / "whole/shapes/run/step-4.safetensors"),
                "--text-encoder",
                str(tmp_path / "whole/shapes/init"),
                "--steps",
                "1",
                "-o",
                str(image),
            ]
        )
        == 0
    )
    assert Image.open(image).size == (SIZE, SIZE), "step files say what size they draw"
    monkeypatch.chdir(tmp_path / "whole")
    assert (
        main(
            [
                "train",
                str(FINISH),
                "--checkpoint",
                "shapes/run/step-4.safetensors",
                "--steps",
                "1",
                "--batch",
                "2",
                "--sample-every",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert load_file(tmp_path / "whole/shapes/finish/step-1.safetensors").keys() == whole.keys()


def test_the_finish_makes_nothing_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(FINISH)]) == 1
    assert "l2p train l2p_core/shapes/shapes.toml" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )


def test_the_recipe_overwrites_nothing_of_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(b"precious")
    assert main(["train", str(SETTINGS), "--checkpoint", "mine.safetensors"]) == 1
    assert "mine.safetensors exists and shapes/images does not" in capsys.readouterr().err
    assert (tmp_path / "mine.safetensors").read_bytes() == b"precious" and len(
        list(tmp_path.iterdir())
    ) == 1


def test_the_score_is_of_the_checkpoints_own_settings(tmp_path, monkeypatch):
    own = {"num_inference_steps": 3, "cfg_scale": 1.0, "shift": 1.5, "sampler": "ab2"}
    checkpoint, seen = tmp_path / "own.safetensors", []
    tensors = load_file(BUNDLED_MODEL / "transformer.safetensors")
    save_file(tensors, checkpoint, defaults_metadata(own))

    def generate(pipe, captions, **settings):
        seen.append(pipe.complete(settings))
        return images(SCENES[:2])

    monkeypatch.setattr(scoring, "generate", generate)
    encoder = ["--text-encoder", str(BUNDLED_MODEL / "text_encoder")]
    for given in ([], ["--shift", "2", "--sampler", "euler"]):
        command = ["score", str(checkpoint), *encoder, "--count", "2", *given]
        monkeypatch.setattr(sys, "argv", command)
        scoring.main()
    assert [(each.shift, each.sampler, each.num_inference_steps) for each in seen] == [
        (1.5, "ab2", 3),
        (2.0, "euler", 3),
    ]
