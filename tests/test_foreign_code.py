"""Files of others run nothing: text encoders, tokenizers, latent models, settings, images, and the
folder one works in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_l2p.l2p_core.batch import is_generated
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.files.header import CheckpointError
from comfyui_l2p.l2p_core.images import read_image
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.text import TextEncoder
from comfyui_l2p.l2p_core.train import run as training
from comfyui_l2p.l2p_core.train.config import OWN_RECIPES, read_config, to_toml
from comfyui_l2p.l2p_core.train.data import read_examples
from comfyui_l2p.l2p_core.train.synthesize import open_pipeline
from PIL import Image
from small_runs import CHECKPOINT, config

MARK = "raise SystemExit('foreign code ran')\n"


def edited(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def encoder(tmp_path):
    """A copy of the bundled text encoder and tokenizer."""
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    for file in (tmp_path / "model").rglob("*"):
        file.chmod(0o755)
    return tmp_path / "model"


@pytest.mark.parametrize(
    "where, changes, code",
    [
        (
            "tokenizer/tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
            "tokenizer",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": "evil.Evil"}},
            "tokenizer",
        ),
        (
            "text_encoder/config.json",
            {
                "model_type": "evil",
                "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
            },
            "text_encoder",
        ),
    ],
)
def test_a_text_encoders_own_code_is_neither_run_nor_offered(
    encoder, monkeypatch, where, changes, code
):
    (encoder / code / "evil.py").write_text(MARK)
    edited(encoder / where, **changes)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the code"))
    with pytest.raises(CheckpointError) as found:
        TextEncoder.load(encoder)
    assert "custom code" not in str(found.value)


def test_settings_that_name_code_are_named_in_the_refusal(encoder):
    edited(
        encoder / "tokenizer/tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )
    with pytest.raises(
        CheckpointError,
        match=(
            r"tokenizer_config.json names Python code of its own \(auto_map\), which this program"
            r" never runs"
        ),
    ):
        TextEncoder.load(encoder)


def test_code_beside_a_tokenizer_that_needs_none_is_left_alone(encoder):
    (encoder / "tokenizer" / "evil.py").write_text(MARK)
    edited(encoder / "text_encoder/config.json", auto_map={"AutoModel": "evil.Evil"})
    assert TextEncoder.load(encoder).encode("a circle").shape[1] == 96


def test_a_kernel_of_the_hub_is_not_fetched(encoder):
    edited(
        encoder / "text_encoder/config.json",
        attn_implementation="evil/kernel",
        _attn_implementation="evil/kernel",
    )
    assert TextEncoder.load(encoder).encode("a circle").shape[1] == 96


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected"),
        ({"hidden_size": 2**40}, "hidden_size is"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"intermediate_size": "x" * 10_000}, "intermediate_size is x"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
    ],
)
def test_a_text_encoder_of_no_size_is_rejected_before_it_is_built(encoder, changes, said):
    edited(encoder / "text_encoder/config.json", **changes)
    with pytest.raises(CheckpointError, match=said) as found:
        TextEncoder.load(encoder)
    assert len(str(found.value)) < 600


@pytest.mark.parametrize(
    "shapes",
    [
        {"layers.9999.x": [0]},
        {"layers.0.self_attn.q_norm.weight": [0]},
        {"layers.0.self_attn.q_norm.weight": [4, 4]},
        {"embed_tokens.weight": [2**40, 0]},
        {"layers.0.mlp.gate_proj.weight": [0]},
        {"layers.99999999999999999999.x": [0]},
    ],
)
def test_a_single_file_text_encoder_of_no_size_is_rejected(encoder, write, shapes):
    from safetensors.torch import load_file

    tensors = load_file(next((encoder / "text_encoder").glob("*.safetensors")))
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    file = write(
        {**tensors, **{name: torch.empty(shape) for name, shape in shapes.items()}},
        "encoder.safetensors",
    )
    with pytest.raises(CheckpointError):
        TextEncoder.load(file, encoder / "tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize(
    "component",
    [
        ["evil", "Evil"],
        ["os", "system"],
        ["transformers", "AutoTokenizer"],
        ["transformers", "AutoModel"],
        ["diffusers", "DiffusionPipeline"],
        [["evil"], "Evil"],
        "evil",
        3,
    ],
)
def test_a_latent_model_names_no_other_modules(tmp_path, monkeypatch, component):
    pytest.importorskip("diffusers", minversion="0.36")
    (tmp_path / "evil.py").write_text(MARK)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "ZImagePipeline", "tokenizer": component})
    )
    with pytest.raises(CheckpointError, match="model_index.json"):
        open_pipeline(tmp_path, torch.device("cpu"), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{",
        '{"_class_name": ["evil", "Evil"]}',
        '{"_class_name": "StableDiffusionPipeline"}',
        "[" * 100_000,
    ],
)
def test_a_folder_that_is_no_latent_model_is_rejected(tmp_path, index):
    pytest.importorskip("diffusers", minversion="0.36")
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(CheckpointError, match="Tongyi-MAI/Z-Image-Turbo"):
        open_pipeline(tmp_path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    "recipe", ["evil:Run", "images.evil:Run", "evil", "comfyui_l2p.l2p_core.shapes.train:Other"]
)
def test_a_recipe_in_a_settings_file_alone_is_rejected(data, monkeypatch, capsys, recipe):
    monkeypatch.chdir(data)
    for place in (data / "evil.py", data / "images" / "evil.py"):
        place.write_text(MARK)
    toml = data / "run.toml"
    toml.write_text(to_toml(config(data, recipe=recipe)))
    before = list(sys.path)
    assert main(["train", str(toml)]) == 1
    said = capsys.readouterr().err
    assert (
        f"names the recipe '{recipe}', which is Python code" in said
        and f"--recipe {recipe}" in said
    )
    assert main(["train", "--estimate", str(toml)]) == 1
    with pytest.raises(ValueError, match="must not run code"):
        training.train(read_config(toml, {}), progress=False)
    assert sys.path == before and not (data.parent / "run").exists()


@pytest.mark.slow
def test_a_recipe_of_the_current_folder_runs_when_the_command_names_it(data, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from comfyui_l2p.l2p_core.train.run import Run\nclass Mine(Run):\n    def loss(self,"
        " batch):\n        return 0 * super().loss(batch)\n"
    )
    (tmp_path / "accelerate.py").write_text(MARK)
    (tmp_path / "run.toml").write_text(to_toml(config(data, steps=1, recipe="mine:Mine")))
    command = [Path(sys.executable).with_name("l2p"), "train", "run.toml", "--recipe", "mine:Mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "log.csv").read_text().splitlines()[1].startswith("1,0.0,")
    again = subprocess.run([*command, "--steps", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, (
        "the run's own config.toml names the recipe, which is compared and not imported"
    )


@pytest.mark.parametrize("recipe", OWN_RECIPES)
def test_the_programs_own_recipes_may_stand_in_a_settings_file(data, recipe):
    toml = data / "run.toml"
    toml.write_text(to_toml(config(data, recipe=recipe)))
    assert issubclass(training.find_recipe(read_config(toml, {}).recipe), training.Run)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["accelerate", "peft", "torch", "json", "PIL", "tomllib"])
def test_modules_of_the_current_folder_are_not_imported(tmp_path, data, module):
    (tmp_path / f"{module}.py").write_text(MARK)
    command = [
        Path(sys.executable).with_name("l2p"),
        "train",
        "--checkpoint",
        CHECKPOINT,
        "--data",
        "nowhere",
        "--output",
        "run",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        "foreign code ran" not in done.stderr
        and "nowhere is no folder" in done.stderr
        and done.returncode == 1
    )


FOREIGN = ["EPS", "DDS", "TGA", "ICO", "PCX", "IM", "SGI", "PDF"]
ALLOWED = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_image_of_another_format_is_rejected_whatever_its_name(tmp_path, monkeypatch, kind):
    """EPS above all, which Pillow gives to Ghostscript: here one that leaves a trace."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image", kind)
    file = (tmp_path / "image").rename(tmp_path / "image.png")
    with pytest.raises(
        ValueError, match="image.png is not a readable image: it is not a PNG, JPEG"
    ):
        read_image(file)
    with pytest.raises(ValueError, match="was not generated by l2p"):
        is_generated(file, {})
    (tmp_path / "metadata.csv").write_text("file_name,text\nimage.png,a circle\n")
    with pytest.raises(ValueError, match="image.png.* is not a PNG, JPEG"):
        read_examples(tmp_path, None, 64 * 64, 16)
    assert (
        main(
            [
                "generate",
                "a circle",
                "--steps",
                "1",
                "--device",
                "cpu",
                "--input-image",
                str(file),
                "-o",
                str(tmp_path / "o.png"),
            ]
        )
        == 1
    )
    assert not (tmp_path / "ran").exists() and not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("kind", ALLOWED)
def test_the_usual_formats_are_opened(tmp_path, kind):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image", kind)
    red, green, blue = read_image(tmp_path / "image").convert("RGB").getpixel((32, 32))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.skipif(os.name != "posix", reason="needs FIFOs")
def test_an_image_that_is_a_fifo_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(ValueError, match="there is no .*image.png"):
        read_image(tmp_path / "image.png")
    with pytest.raises(ValueError, match="was not generated by l2p"):
        is_generated(tmp_path / "image.png", {})
