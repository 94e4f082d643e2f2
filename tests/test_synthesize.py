"""The data step against a tiny latent Z-Image with random weights, and against diffusers called by
hand."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.train.data import read_examples
from PIL import Image
from safetensors.torch import load_file

diffusers = pytest.importorskip("diffusers", minversion="0.36")
from latent import make_latent  # noqa: E402  # needs diffusers


@pytest.fixture(scope="session")
def latent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("Z-Image-tiny")
    make_latent(folder)
    return folder


def synthesize(latent, tmp_path, *more, prompts="prompts.txt"):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star, small\n")
    return main(
        [
            "synthesize",
            str(tmp_path / prompts),
            "--model",
            str(latent),
            "-o",
            str(tmp_path / "data"),
            "--height",
            "64",
            "--width",
            "64",
            "--steps",
            "2",
            "--seed",
            "7",
            "--device",
            "cpu",
            *more,
        ]
    )


@pytest.mark.slow
def test_a_folder_to_train_on(latent, tmp_path):
    assert synthesize(latent, tmp_path, "--batch", "3") == 0
    examples = read_examples(tmp_path / "data", None, 64 * 64, 16)
    assert [(example.file.name, example.captions[0], example.seed) for example in examples] == [
        ("000000-0.png", "a red circle", 7),
        ("000000-1.png", "a red circle", 8),
        ("000001-0.png", "a blue star, small", 9),
        ("000001-1.png", "a blue star, small", 10),
    ]
    pipe = diffusers.ZImagePipeline.from_pretrained(latent, torch_dtype=torch.bfloat16)
    for example in examples:
        wanted = pipe(
            example.captions[0],
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(example.seed),
        ).images[0]
        difference = np.abs(
            np.asarray(Image.open(example.file), dtype=int) - np.asarray(wanted, dtype=int)
        )
        assert difference.mean() < 2, "alone and in a batch differ by bfloat16's rounding"
    assert len({Image.open(example.file).tobytes() for example in examples}) == 4


@pytest.mark.slow
def test_a_row_with_an_empty_text_has_its_prompt(latent, tmp_path):
    rows = [{"prompt": "a red circle", "text": None}, {"prompt": "unused", "text": "a star"}]
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    assert synthesize(latent, tmp_path, "--count", "1", prompts="prompts.json") == 0
    examples = read_examples(tmp_path / "data", None, 64 * 64, 16)
    assert [example.captions[0] for example in examples] == ["a red circle", "a star"]


@pytest.mark.slow
def test_a_stopped_run_goes_on(latent, tmp_path):
    assert synthesize(latent, tmp_path) == 0
    files = sorted((tmp_path / "data" / "images").iterdir())
    pixels, times = Image.open(files[2]).tobytes(), [file.stat().st_mtime_ns for file in files]
    files[2].unlink()
    (tmp_path / "data" / "metadata.csv").unlink()
    assert synthesize(latent, tmp_path) == 0
    assert (
        Image.open(files[2]).tobytes() == pixels and (tmp_path / "data" / "metadata.csv").exists()
    )
    assert [file.stat().st_mtime_ns for number, file in enumerate(files) if number != 2] == [
        *times[:2],
        times[3],
    ]


@pytest.mark.slow
def test_processes_share_the_images_and_the_last_writes_the_table(latent, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert synthesize(latent, tmp_path) == 0
    assert [file.name for file in sorted((tmp_path / "data" / "images").iterdir())] == [
        "000000-1.png",
        "000001-1.png",
    ]
    assert not (tmp_path / "data" / "metadata.csv").exists()
    monkeypatch.setenv("RANK", "0")
    assert synthesize(latent, tmp_path) == 0
    with (tmp_path / "data" / "metadata.csv").open() as stream:
        assert [row["seed"] for row in csv.DictReader(stream)] == ["7", "8", "9", "10"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, words",
    [
        (["--steps", "3"], "generated with other settings (num_inference_steps 2, now 3)"),
        (["--height", "60"], "multiples of 16"),
        (["--batch", "0"], "--batch is 0"),
    ],
)
def test_what_does_not_fit_is_rejected(latent, tmp_path, capsys, more, words):
    assert synthesize(latent, tmp_path) == 0
    assert synthesize(latent, tmp_path, *more) == 1
    assert words in capsys.readouterr().err


def test_another_model_is_rejected(tmp_path, capsys):
    assert synthesize(BUNDLED_MODEL, tmp_path) == 1
    assert "is no latent Z-Image: it has no readable model_index.json" in capsys.readouterr().err


@pytest.mark.slow
def test_the_four_steps_to_a_model(latent, tmp_path):
    """Prepare, convert, train and merge, as the published program has them, then draw; by the
    commands of the README."""
    initial, trained, model, image = (
        tmp_path / name
        for name in (
            "initial.safetensors",
            "run/step-2.safetensors",
            "model.safetensors",
            "out.png",
        )
    )
    encoder, small = ("--text-encoder", str(latent)), ("--height", "64", "--width", "64")
    assert synthesize(latent, tmp_path) == 0
    assert main(["convert", str(latent / "transformer"), "-o", str(initial)]) == 0
    assert (
        main(
            [
                "train",
                "--checkpoint",
                str(initial),
                *encoder,
                "--data",
                str(tmp_path / "data"),
                "--output",
                str(trained.parent),
                "--steps",
                "2",
                "--sample-every",
                "0",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    assert main(["merge", "--trained", str(trained), "--base", str(initial), "-o", str(model)]) == 0
    assert (
        main(
            [
                "generate",
                "a red circle",
                "--checkpoint",
                str(model),
                *encoder,
                *small,
                "--steps",
                "2",
                "-o",
                str(image),
            ]
        )
        == 0
    )
    with Image.open(image) as drawn:
        assert drawn.size == (64, 64) and np.asarray(drawn).std() > 1
    before, after = load_file(initial), load_file(model)
    assert after.keys() == before.keys()
    moved = {name for name in after if not torch.equal(after[name].float(), before[name].float())}
    assert "local_decoder.out_conv.weight" in moved and moved <= load_file(trained).keys()
