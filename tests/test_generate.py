"""The command line, on the bundled model: many prompts, stopping and going on, several processes,
and plain refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from comfyui_l2p.l2p_core import batch as generate_module
from comfyui_l2p.l2p_core.batch import hash_files
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.files.atomic import locked
from comfyui_l2p.l2p_core.images import read_image, save_image
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL, L2PPipeline
from comfyui_l2p.l2p_core.shapes.judge import examine
from comfyui_l2p.l2p_core.shapes.parse import complete, parse
from comfyui_l2p.l2p_core.shapes.world import PLACES_WORLD
from comfyui_l2p.l2p_core.tables import read_rows
from helpers import apart
from PIL import Image
from safetensors.torch import load_file, save_file

FEW = ["--steps", "2", "--height", "32", "--width", "32", "--device", "cpu"]


def settings(path):
    with Image.open(path) as image:
        return json.loads(image.text["l2p"])


@pytest.mark.slow
def test_one_prompt_with_no_checkpoint_uses_the_bundled_model_and_says_so(tmp_path, capsys):
    assert (
        main(["generate", "a red circle — ünïcode", "-o", str(tmp_path / "new" / "out.png"), *FEW])
        == 0
    )
    assert "bundled small model" in capsys.readouterr().out
    written = settings(tmp_path / "new" / "out.png")
    assert (
        written["prompt"] == "a red circle — ünïcode"
        and written["seed"] == 42
        and written["cfg_scale"] == 2.0
    )
    assert written["checkpoint_sha256"] == hash_files([BUNDLED_MODEL / "transformer.safetensors"])
    pipe = L2PPipeline.from_pretrained(device="cpu", torch_dtype=None)  # as the command does
    again = pipe(
        written["prompt"],
        **{
            key: written[key]
            for key in (
                "negative_prompt",
                "seed",
                "height",
                "width",
                "num_inference_steps",
                "cfg_scale",
                "shift",
                "sampler",
            )
        },
    )
    assert apart(again, Image.open(tmp_path / "new" / "out.png")) <= 1, (
        "the settings tell the image"
    )


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.txt", "a circle\n\n  a star  \n"),
        ("p.csv", 'prompt,seed\n"a circle",\na star,\n'),
        ("p.csv", "\ufefftext,file_name\na circle,00000.png\na star,00001\n"),
        ("p.json", '["a circle", {"prompt": "a star"}]'),
        ("p.jsonl", '{"text": "a circle"}\n{"prompt": "a star", "cfg_scale": 2}\n'),
    ],
)
def test_prompts_from_any_file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert (
        main(["generate", "--prompts", str(tmp_path / name), "-o", str(tmp_path / "out"), *FEW])
        == 0
    )
    assert {path.name: settings(path)["prompt"] for path in (tmp_path / "out").iterdir()} == {
        "00000.png": "a circle",
        "00001.png": "a star",
    }


@pytest.mark.slow
def test_rows_override_flags_and_batches_change_nothing(tmp_path):
    (tmp_path / "p.csv").write_text(
        "prompt,seed,width,num_inference_steps\na circle,5,,\na star,,48,\na cross,,,1\n"
    )
    for batch in ("1", "3"):
        assert (
            main(
                [
                    "generate",
                    "--prompts",
                    str(tmp_path / "p.csv"),
                    "-o",
                    str(tmp_path / batch),
                    "--count",
                    "2",
                    "--batch",
                    batch,
                    *FEW,
                    "--dtype",
                    "float32",
                ]
            )
            == 0
        )
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == [f"0000{row}-{copy}.png" for row in range(3) for copy in range(2)]
    assert [settings(tmp_path / "1" / name)["seed"] for name in names] == [5, 6, 42, 43, 42, 43]
    for name in names:
        one, three = (Image.open(tmp_path / batch / name) for batch in ("1", "3"))
        assert one.width == (48 if name.startswith("00001") else 32)
        assert apart(one, three) <= 1


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("a circle\na star\na cross\n")
    command = ["generate", "--prompts", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), *FEW]
    save, calls = generate_module.save_image, []

    def stopping(image, output, facts):
        calls.append(output.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(image, output, facts)

    monkeypatch.setattr(generate_module, "save_image", stopping)
    assert main(command) == 130
    assert "The same command resumes" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["00000.png"]
    assert main(command) == 0
    assert "1 of 3 images exist already" in capsys.readouterr().out
    assert calls == ["00000.png", "00001.png", "00001.png", "00002.png"]


def test_a_changed_start_image_or_encoder_is_another_image(tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photo.png")
    command = [
        "generate",
        "a circle",
        "-o",
        str(tmp_path / "out.png"),
        *FEW,
        "--input-image",
        str(tmp_path / "photo.png"),
    ]
    assert main(command) == 0
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "photo.png")
    assert main(command) == 1
    assert "input_image_sha256" in capsys.readouterr().err
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    encoder = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(encoder)
    save_file(
        {**tensors, "embed_tokens.weight": -tensors["embed_tokens.weight"]},
        encoder,
        metadata={"format": "pt"},
    )
    assert main([*command, "--overwrite"]) == 0
    assert main([*command, "--text-encoder", str(tmp_path / "model")]) == 1
    assert "text_encoder_sha256" in capsys.readouterr().err
    assert str(tmp_path) not in json.dumps(settings(tmp_path / "out.png")), (
        "an image does not tell its folders"
    )


def test_a_renamed_file_is_the_same_file(tmp_path, capsys):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photo.png")
    command = ["generate", "a circle", "-o", str(tmp_path / "out.png"), *FEW, "--input-image"]
    assert main([*command, str(tmp_path / "photo.png")]) == 0
    (tmp_path / "photo.png").rename(tmp_path / "other.png")
    assert main([*command, str(tmp_path / "other.png")]) == 0
    assert "1 of 1 images exist already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, said",
    [
        ({"input_image": "absent.png"}, "prompt 2: there is no absent.png"),
        ({"inpaint_mask": "absent.png"}, "prompt 2: inpaint_mask is given without"),
        (
            {"input_image": "start.png", "inpaint_mask": "absent.png"},
            "prompt 2: there is no absent.png",
        ),
        ({"input_image": "p.json"}, "prompt 2: p.json is not a readable image"),
    ],
)
def test_start_images_are_looked_at_before_anything_is_drawn(
    tmp_path, monkeypatch, capsys, row, said
):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("start.png")
    Path("p.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": "b", **row}]))
    assert main(["generate", "--prompts", "p.json", "-o", "out", *FEW]) == 1
    assert said in capsys.readouterr().err and not Path("out").exists()


@pytest.mark.slow
def test_a_side_that_is_not_given_follows_the_start_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (160, 90)).save("start.png")
    for number, (given, size) in enumerate(
        [
            ({"width": 80}, (80, 48)),
            ({"height": 48}, (80, 48)),
            ({}, (160, 96)),
            ({"width": 32, "height": 32}, (32, 32)),
        ]
    ):
        Path("p.json").write_text(
            json.dumps(
                [{"prompt": "a", "input_image": "start.png", "num_inference_steps": 1, **given}]
            )
        )
        assert main(["generate", "--prompts", "p.json", "-o", f"{number}.png"]) == 0
        assert Image.open(f"{number}.png").size == size


def test_turned_and_16_bit_images_are_read_as_they_look(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 40)
    Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").convert("RGB").getpixel((0, 0)) == (117, 117, 117)


def test_an_error_does_not_wait_for_the_hash(tmp_path, monkeypatch):
    hashed = []

    def slow(files, stop=None):
        hashed.append(stop.wait(60))
        return ""

    monkeypatch.setattr(generate_module, "hash_files", slow)
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = [*FEW, "--text-encoder", str(empty)]
    assert main(["generate", "a", "-o", str(tmp_path / "out.png"), *flags]) == 1
    assert hashed and all(hashed), "told to stop, not timed out"


def test_images_of_other_settings_are_not_taken_for_these(tmp_path, capsys):
    out = str(tmp_path / "out.png")
    assert main(["generate", "a circle", "-o", out, *FEW]) == 0
    assert main(["generate", "a circle", "-o", out, "--seed", "1", *FEW]) == 1
    assert "generated with other settings (seed 42, now 1)" in capsys.readouterr().err
    assert main(["generate", "a circle", "-o", out, "--seed", "1", "--overwrite", *FEW]) == 0
    assert settings(out)["seed"] == 1
    Image.new("RGB", (8, 8)).save(out)
    assert main(["generate", "a circle", "-o", out, *FEW]) == 1
    assert "was not generated by l2p" in capsys.readouterr().err


def test_images_of_before_a_setting_was_one_are_taken_for_these(tmp_path, capsys):
    out = tmp_path / "out.png"
    assert main(["generate", "a circle", "-o", str(out), *FEW]) == 0
    older = {
        name: value
        for name, value in settings(out).items()
        if name not in ("cfg_truncation", "cache_threshold")
    }
    assert len(older) == len(settings(out)) - 2
    save_image(Image.open(out).copy(), out, older)
    assert main(["generate", "a circle", "-o", str(out), *FEW]) == 0
    assert main(["generate", "a circle", "-o", str(out), "--cfg-truncation", "0.5", *FEW]) == 1
    assert "generated with other settings (cfg_truncation 1.0, now 0.5)" in capsys.readouterr().err


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(self, stream, *_, **__):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(["generate", "a circle", "-o", str(tmp_path / "out.png"), *FEW]) == 1
    assert (
        "is full, so out.png was not written" in capsys.readouterr().err
        and os.listdir(tmp_path) == []
    )


@pytest.mark.slow
def test_ctrl_c_leaves_no_half_file(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "comfyui_l2p.l2p_core.cli",
            "generate",
            "a circle",
            "-o",
            str(tmp_path / "out.png"),
            "--steps",
            "1000",
            "--device",
            "cpu",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seen = b""
    while b"step/s" not in seen:  # it is generating
        seen += process.stdout.read1()
        assert process.poll() is None, seen
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and b"stopped" in rest and b"Traceback" not in rest
    assert os.listdir(tmp_path) == []


def test_processes_share_the_prompts(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a circle\na star\na cross\n")
    drawn = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
        assert (
            main(
                [
                    "generate",
                    "--prompts",
                    str(tmp_path / "p.txt"),
                    "-o",
                    str(tmp_path / "out"),
                    *FEW,
                ]
            )
            == 0
        )
        drawn.append(sorted(path.name for path in (tmp_path / "out").iterdir()))
    assert drawn == [["00000.png", "00002.png"], ["00000.png", "00001.png", "00002.png"]]


def test_the_text_encoder_can_leave_first(tmp_path):
    for name, flags in (("kept", []), ("freed", ["--free-text-encoder"])):
        assert (
            main(["generate", "a circle", "-o", str(tmp_path / f"{name}.png"), *FEW, *flags]) == 0
        )
    assert apart(Image.open(tmp_path / "kept.png"), Image.open(tmp_path / "freed.png")) <= 1


def test_start_image_gives_the_size_and_mask_keeps_it(tmp_path):
    photo = Image.effect_noise((48, 64), 90).convert("RGB")
    photo.save(tmp_path / "photo.png")
    Image.new("L", (48, 64), 0).save(tmp_path / "mask.png")
    assert (
        main(
            [
                "generate",
                "a circle",
                "-o",
                str(tmp_path / "out.png"),
                "--steps",
                "2",
                "--device",
                "cpu",
                "--input-image",
                str(tmp_path / "photo.png"),
                "--inpaint-mask",
                str(tmp_path / "mask.png"),
            ]
        )
        == 0
    )
    assert Image.open(tmp_path / "out.png").tobytes() == photo.tobytes(), (
        "a black mask keeps every pixel"
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "give a prompt"),
        (["a", "--height", "100"], "Nearest: 96 and 112"),
        (["a", "-o", "x.jpg"], "images are written as .png"),
        (["a", "-o", "x.png", "--count", "2"], "give a folder"),
        (["a", "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors does not exist"),
        (
            ["a", "--checkpoint", str(BUNDLED_MODEL / "text_encoder" / "model.safetensors")],
            "is a text encoder",
        ),
        (["a", "--text-encoder", "nowhere"], "the text encoder nowhere does not exist"),
        (["a", "--rand-device", "abacus"], "device abacus can't be used"),
        (["a", "--seed", "-1"], "seed is -1"),
        (["a", "--cfg-scale", "nan"], "cfg_scale is 'nan'"),
        (["a", "--input-image", __file__], "is not a readable image"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["a", "--sampler", "heun"], "expected one of euler, ab2"),
        (["a", "--batch", "0"], "expected 1 or more"),
        (["a", "--steps", "0"], "num_inference_steps is 0; expected a whole number from 1 to 1000"),
    ],
)
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *arguments, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("l2p: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("p.csv", "caption\na\n", "unknown column caption; known are file_name, text, prompt"),
        ("p.csv", "seed\n1\n", "no column prompt or text"),
        ("p.txt", "\n", "holds no prompts"),
        ("p.csv", "prompt,seed\na, b, c\n", "more columns than the first line names"),
        ("p.json", '[{"prompt": 5}]', "no column prompt"),
        ("p.json", "{", "is not JSON"),
        ("p.jsonl", "[1]\n", "not a table"),
        ("p.md", "a", "expected .txt"),
    ],
)
def test_prompt_files_that_can_not_be_read_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        read_rows(tmp_path / name)


@pytest.mark.parametrize(
    "content, said",
    [
        ("prompt,file_name\na,../x\n", "leads out of"),
        ("prompt,file_name\na,x\nb,x.png\n", "the same file_name"),
        ("prompt,seed\na,many\n", "seed is 'many'; expected a whole number"),
        ("prompt,height\na,50\n", "height is 50"),
        ("prompt,seed\na,1.5\n", "seed is '1.5'"),
        ("prompt,cfg_truncation\na,1\nb,1.5\n", "prompt 2: cfg_truncation is 1.5"),
        ("prompt,cache_threshold\na,-1\n", "cache_threshold is -1"),
    ],
)
def test_rows_that_make_no_sense_are_rejected_before_drawing(tmp_path, capsys, content, said):
    (tmp_path / "p.csv").write_text(content)
    assert (
        main(["generate", "--prompts", str(tmp_path / "p.csv"), "-o", str(tmp_path / "out"), *FEW])
        == 1
    )
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_inspect_speaks_to_people_and_programs(capsys):
    path = str(BUNDLED_MODEL / "transformer.safetensors")
    assert main(["inspect", path]) == 0
    assert "L2P model" in capsys.readouterr().out
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["patch"] == 16
    assert main(["inspect", __file__]) == 1
    assert "is plain text" in capsys.readouterr().err


@pytest.mark.slow
def test_two_identical_commands_share_one_folder(tmp_path):
    """The second waits and then finds everything; neither fails, and nothing is left."""
    (tmp_path / "p.txt").write_text("a circle\na star\na cross\na square\n")
    command = [
        sys.executable,
        "-m",
        "comfyui_l2p.l2p_core.cli",
        "generate",
        "--prompts",
        str(tmp_path / "p.txt"),
        "-o",
        str(tmp_path / "out"),
        *FEW,
    ]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(os.listdir(tmp_path / "out")) == [f"0000{number}.png" for number in range(4)]


@pytest.mark.parametrize("output, folder", [("out.png", False), ("out", True)])
def test_a_second_run_is_told_of_the_first(tmp_path, monkeypatch, capsys, output, folder):
    monkeypatch.setattr(generate_module, "WAIT", 0)
    (tmp_path / "p.txt").write_text("a circle\na star\n")
    command = [
        "generate",
        "-o",
        str(tmp_path / output),
        *FEW,
        *(["--prompts", str(tmp_path / "p.txt")] if folder else ["a circle"]),
    ]
    with locked(tmp_path / output, "busy", folder=folder):
        assert main(command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        f"another run is writing to {tmp_path / output}. Wait for it to finish, or give another"
        " --output" in said
    )
    assert not [file for file in tmp_path.rglob("*.png")]
    assert main(command) == 0


@pytest.mark.skipif(os.name != "posix", reason="needs links")
@pytest.mark.parametrize("name", [".out.png.part", ".out.png.l2p-part", "out.png"])
def test_a_link_beside_the_output_is_not_written_through(tmp_path, name):
    (tmp_path / "secret").write_text("the only copy")
    (tmp_path / name).symlink_to(tmp_path / "secret")
    assert main(["generate", "a circle", "-o", str(tmp_path / "out.png"), *FEW, "--overwrite"]) == 0
    assert (tmp_path / "secret").read_text() == "the only copy" and not (
        tmp_path / "out.png"
    ).is_symlink()
    assert (tmp_path / "out.png").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    now = os.umask(0)
    os.umask(now)
    return now


@pytest.mark.slow
def test_short_prompts_of_the_bundled_model_are_completed_by_the_seed(tmp_path):
    """The image shows what was said; the record keeps the prompt as typed and as completed."""
    folder = tmp_path / "images"
    command = ["a red circle on a blue background", "-o", str(folder), "--count", "4"]
    assert main(["generate", *command]) == 0
    seen = set()
    for number in range(4):
        with Image.open(folder / f"00000-{number}.png") as image:
            record = json.loads(image.info["l2p"])
            found = examine(image.convert("RGB"), PLACES_WORLD)
        assert record["prompt"] == "a red circle on a blue background"
        assert record["completed_prompt"] == complete(record["prompt"], PLACES_WORLD, 42 + number)
        seen.add(record["completed_prompt"])
        assert all(found.check(parse(record["completed_prompt"], PLACES_WORLD)).values())
    assert len(seen) > 1, "the choices vary with the seed"
    assert main(["generate", *command]) == 0, "they are there already"


def test_complete_prompts_stay_as_they_are(tmp_path):
    out = tmp_path / "out.png"
    prompt = "a large red circle on a blue background, left"
    assert main(["generate", prompt, "-o", str(out), "--steps", "1"]) == 0
    with Image.open(out) as image:
        assert "completed_prompt" not in json.loads(image.info["l2p"])


@pytest.mark.parametrize(
    "prompt, status, said",
    [
        ("a green star", 0, "The bundled model does not know: star"),
        ("a red circle on red", 1, "shape and background are both red. Give colours that differ"),
    ],
)
def test_what_the_bundled_model_does_not_know_is_named(tmp_path, capsys, prompt, status, said):
    assert main(["generate", prompt, "-o", str(tmp_path / "out.png"), "--steps", "1"]) == status
    assert said in capsys.readouterr().err


def test_prompts_of_other_checkpoints_are_read_as_they_are():
    pipe = L2PPipeline.from_pretrained(BUNDLED_MODEL / "transformer.safetensors")
    assert pipe.read_prompt("a star", 1) == "a star"
