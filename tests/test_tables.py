"""Prompt files and names as other programs and operating systems write them."""

import json
import re
import struct
from pathlib import Path

import pytest
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.files.content import identify, left_by_system, printable
from comfyui_l2p.l2p_core.files.header import CheckpointError, find_files, reject_zeros
from comfyui_l2p.l2p_core.files.load import load_model
from comfyui_l2p.l2p_core.outputs import is_one_image, name_fault, output_files
from comfyui_l2p.l2p_core.remote.workflow import read_workflow
from comfyui_l2p.l2p_core.settings import MAX_COUNT
from comfyui_l2p.l2p_core.tables import read_rows
from comfyui_l2p.l2p_core.train.config import TrainConfig, read_config
from comfyui_l2p.l2p_core.train.data import read_examples
from PIL import Image

FEW = ["--steps", "1", "--device", "cpu"]
TABLE = "prompt,seed\r\nein grüner Stern,1\r\nein roter Kreis,\r\n"
ROWS = [{"prompt": "ein grüner Stern", "seed": "1"}, {"prompt": "ein roter Kreis"}]


@pytest.mark.parametrize(
    "content",
    [
        TABLE.encode(),
        TABLE.encode("utf-8-sig"),
        TABLE.encode("utf-16"),
        b"\xfe\xff" + TABLE.encode("utf-16-be"),
        TABLE.replace("\r\n", "\n").encode(),
        TABLE.replace("\r\n", "\r").encode(),
        TABLE.replace(",", ";").encode("utf-8-sig"),
        TABLE.replace(",", "\t").encode("utf-16"),
        b"sep=;\r\n" + TABLE.replace(",", ";").encode(),
        (TABLE.replace("prompt,seed", " prompt , seed ") + ",\r\n").encode(),
    ],
    ids=[
        "UTF-8",
        "with a mark",
        "UTF-16",
        "UTF-16, big-endian",
        "line feeds",
        "returns",
        "semicolons",
        "Excel's Unicode text",
        "Excel's hint",
        "spaces and an empty row",
    ],
)
def test_tables_of_other_programs_are_the_same_rows(tmp_path, content):
    (tmp_path / "p.csv").write_bytes(content)
    assert read_rows(tmp_path / "p.csv") == ROWS


def test_windows_1252_is_read_with_a_warning(tmp_path):
    (tmp_path / "p.csv").write_bytes(TABLE.encode("cp1252"))
    with pytest.warns(UserWarning, match="p.csv is not UTF-8 and was read as Windows-1252"):
        assert read_rows(tmp_path / "p.csv") == ROWS


@pytest.mark.parametrize(
    "header, prompt",
    [
        ("prompt", "a cat; a dog\tand more"),
        ("prompt,seed", '"a, b; c",1'),
    ],
)
def test_separators_in_prompts_are_left_alone(tmp_path, header, prompt):
    (tmp_path / "p.csv").write_text(f"{header}\n{prompt}\n")
    (row,) = read_rows(tmp_path / "p.csv")
    assert row["prompt"] in ("a cat; a dog\tand more", "a, b; c")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"PK\x03\x04" + bytes(22) + b"[Content_Types].xml", "an Excel workbook. Save it as CSV"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("prompt\na".encode("utf-16-le"), "is not text in UTF-8. Save it as UTF-8"),
        (b"\x81\x8d\xff\0", "is not text in UTF-8"),
        (b"prompt,prompt\na,b\n", "two columns prompt"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, content, said):
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_rows(tmp_path / "p.csv")


def test_nan_in_json_is_an_empty_cell(tmp_path):
    (tmp_path / "p.json").write_text(
        '[{"prompt": "a", "negative_prompt": NaN, "file_name": NaN, "seed": NaN}]'
    )
    assert read_rows(tmp_path / "p.json") == [
        {"prompt": "a", "negative_prompt": None, "file_name": None, "seed": None}
    ]
    (tmp_path / "p.json").write_text('[{"prompt": "a", "seed": -Infinity}]')
    with pytest.raises(ValueError, match="-Infinity is no number of JSON"):
        read_rows(tmp_path / "p.json")


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "a \ud83d"}, "prompt 2: prompt is 'a .*half of a character"),
        ({"negative_prompt": "\udc00"}, "prompt 2: negative_prompt is"),
        ({"seed": True}, "prompt 2: seed is True"),
        ({"seed": 2.9}, "prompt 2: seed is 2.9"),
        ({"seed": 2**64}, "prompt 2: seed is"),
        ({"width": 160000}, "prompt 2: width is 160000"),
        ({"stages": 10**30}, "prompt 2: stages is"),
        ({"num_inference_steps": 10**12}, "prompt 2: num_inference_steps is"),
        ({"input_image": ["a"]}, "prompt 2: input_image is"),
        ({"input_image": "a\0b"}, "prompt 2: there is no a"),
        ({"input_image": "a" * 5000}, "prompt 2: there is no a"),
        ({"file_name": "a\0b"}, "prompt 2: file_name .* holds control characters"),
        ({"file_name": "a\x1b[31m"}, "prompt 2: file_name .* holds control characters"),
        ({"file_name": "n" * 300}, "prompt 2: file_name .* is longer than 255 bytes"),
        ({"file_name": "ü" * 130}, "prompt 2: file_name .* is longer than 255 bytes"),
        ({"file_name": "a\ud83d"}, "prompt 2: file_name is .*half of a character"),
        ({"file_name": "."}, "prompt 2: file_name is '.', which names no file"),
        ({"file_name": True}, "prompt 2: file_name is True"),
        ({"file_name": "00000.png/b"}, "prompt 2: file_name needs a folder .* prompt 1 goes"),
        ({"file_name": "00000"}, "prompt 2: two prompts have the same file_name"),
        ({"file_name": "C:\\x"}, "prompt 2: file_name .* leads out of"),
        ({"file_name": "..\\x"}, "prompt 2: file_name .* leads out of"),
        ({"file_name": "taken/x"}, "prompt 2: .* can't be written: .*taken is no folder"),
        ({"file_name": "folder"}, "prompt 2: .* can't be written: it is a folder"),
    ],
)
def test_rows_are_judged_before_the_first_image(tmp_path, capsys, row, said):
    (tmp_path / "out" / "folder.png").mkdir(parents=True)
    (tmp_path / "out" / "taken").write_text("")
    rows = [{"prompt": "a"}, {"prompt": "b", **row}, {"prompt": "c"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    command = ["generate", "--prompts", str(tmp_path / "p.json"), "-o", str(tmp_path / "out")]
    assert main([*command, *FEW]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert not [file for file in (tmp_path / "out").rglob("*.png") if file.is_file()]


def test_numbers_of_csv_json_and_toml_mean_the_same(tmp_path):
    """42.0 is a whole number wherever it stands; 2.9 and true are none anywhere."""
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")

    def seeds(name, text):
        for old in tmp_path.glob("metadata.*"):
            old.unlink()
        (tmp_path / name).write_text(text)
        return [each.seed for each in read_examples(tmp_path, None, 32 * 32, 16)]

    assert seeds("metadata.csv", "file_name,text,seed\na.png,x,1.0\nb.png,y,2\n") == [1, 2]
    row = '{"file_name": "a.png", "text": "x", "seed": %s}'
    assert seeds("metadata.jsonl", row % "7.0") == [7]
    for bad in ("2.9", "true", '"many"', "-1", "1e30"):
        with pytest.raises(ValueError, match="row 1: a.png: seed is .*expected a whole number"):
            seeds("metadata.jsonl", row % bad)
    with pytest.raises(ValueError, match="row 1: a.png: prompt is .*half of a character"):
        seeds("metadata.jsonl", '{"file_name": "a.png", "text": "x \\ud83d"}')

    def steps(value):
        (tmp_path / "c.toml").write_text(
            f'checkpoint = "a"\ndata = "b"\noutput = "c"\nsteps = {value}\n'
        )
        return read_config(tmp_path / "c.toml", {}).steps

    assert steps("42.0") == 42
    for bad in ("2.9", "true", "10000000000", "nan"):
        with pytest.raises(ValueError, match="steps is"):
            steps(bad)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch": 10**6}, "batch is 1000000; expected at most 4096"),
        ({"width": 10**6, "height": 96}, "width is 1000000; expected at most 16384"),
        ({"seed": 2**64}, "seed is"),
        ({"sample_steps": 10**6}, "sample_steps is"),
    ],
)
def test_settings_of_training_have_upper_bounds(changes, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig("a", "b", "c", **changes)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_settings_and_workflows_may_have_marks_of_their_encoding(tmp_path, encoding):
    text = 'checkpoint = "ü"\r\ndata = "b"\r\noutput = "c"\r\n'
    (tmp_path / "c.toml").write_bytes(text.encode(encoding))
    assert read_config(tmp_path / "c.toml", {}).checkpoint == "ü"
    graph = {"1": {"class_type": "A", "inputs": {"text": "ü"}}}
    (tmp_path / "w.json").write_bytes(json.dumps(graph, ensure_ascii=False).encode(encoding))
    assert read_workflow(tmp_path / "w.json") == graph


# Outputs


@pytest.mark.parametrize("name", ["run-v1.5", "2024.05.12", "a.b", "out", "x.tmp"])
@pytest.mark.parametrize("there", [True, False])
def test_folders_may_have_a_dot(tmp_path, name, there):
    if there:
        (tmp_path / name).mkdir()
    assert not is_one_image(tmp_path / name)
    assert output_files([{}], 2, tmp_path / name)[0][1] == tmp_path / name / "00000-1.png"


def test_png_is_png_in_capitals(tmp_path):
    assert output_files([{}], 1, tmp_path / "A.PNG") == [[tmp_path / "A.PNG"]]
    assert output_files([{"file_name": "x.PNG"}], 1, tmp_path) == [[tmp_path / "x.png"]]
    (tmp_path / "folder.png").mkdir()
    assert output_files([{}], 1, tmp_path / "folder.png")[0][0].name == "00000.png"


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.TIFF", "a.gif", "a.pdf"])
def test_other_formats_are_rejected(tmp_path, name):
    with pytest.raises(ValueError, match="written as .png"):
        output_files([{}], 1, tmp_path / name)


def test_names_of_windows_go_into_folders(tmp_path):
    (file,) = output_files([{"file_name": "sub\\a.png"}], 1, tmp_path)[0]
    assert file == tmp_path / "sub" / "a.png"


def test_accents_in_two_forms_are_one_name(tmp_path):
    with pytest.raises(ValueError, match="prompt 2: two prompts have the same file_name"):
        output_files([{"file_name": "\u00e9"}, {"file_name": "e\u0301"}], 1, tmp_path)


@pytest.mark.parametrize("name", ["con.png", "a/NUL.png", "com1.x.png", "a?.png", "a. /b.png"])
def test_names_that_windows_rejects_are_rejected_there_alone(name):
    assert name_fault(name, windows=True) and not name_fault(name, windows=False)
    assert name_fault("console.png", windows=True) is None


def test_the_number_of_images_has_a_bound(tmp_path):
    with pytest.raises(ValueError, match="expected at most 1,000,000"):
        output_files([{}], MAX_COUNT + 1, tmp_path)


# What a file really is


@pytest.mark.parametrize(
    "content, said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page"),
        (b"<?xml version='1.0'?><Error>", "an XML text"),
        (b'{"error":"Repository not found"}', "a JSON text"),
        (b"Entry not found", "plain text"),
        (b"GGUF\3\0\0\0" + bytes(99), "a GGUF file"),
        (b"\x80\2}q\0." + bytes(99), "a PyTorch pickle"),
        (b"\x80\4\x95\n\0\0\0\0\0\0\0}\x94", "a PyTorch pickle"),
        (b"PK\3\4" + bytes(26) + b"archive/data.pkl", "a PyTorch pickle"),
        (b"PK\3\4" + bytes(99), "zip archive"),
        (b"\x1f\x8b\b\0" + bytes(99), "a gzip archive"),
        (bytes(5000), "nothing but zeros"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(99), "macOS"),
        (b"\0\0\0\1Bud1" + bytes(99), "a .DS_Store"),
        (b"\xd0\xcf\x11\xe0" + bytes(99), "a Thumbs.db"),
        (b"[.ShellClassInfo]\r\n", "a desktop.ini"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "a PNG image"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, capsys, content, said):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert said in identify(content).name
    for command in (["inspect", str(file)], ["generate", "a", "--checkpoint", str(file)]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert f"model.safetensors is {identify(content).name}" in error and error.count("\n") == 1


def test_bytes_that_tell_nothing_are_not_named():
    assert identify(b"") is None and identify(bytes(range(1, 99))) is None
    for length in (8, 0x5A4D, 0x8B1F, 0x685A42):  # the letters of a program, gzip and bzip2
        assert identify(struct.pack("<Q", length) + b'{"a": 1}') is None, "a safetensors file"


def test_files_that_systems_leave_beside_the_real_ones_are_passed_over(tmp_path, write):
    import torch

    for name in ("._model.safetensors", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
        assert left_by_system(Path(name))
    file = write({"a": torch.ones(2)})
    assert not left_by_system(file) and find_files(tmp_path) == ([file], set())


def test_a_download_that_was_aborted_and_padded_is_named(tmp_path, write, tiny_weights):
    """Large enough that its last megabyte is all padding."""
    import torch

    tensors = {"context_refiner.9.x": torch.ones(1 << 20), **tiny_weights}
    whole = write({f"layers.9.x{number}": torch.ones(1 << 18) for number in range(4)} | tensors)
    reject_zeros(whole)
    content = whole.read_bytes()
    whole.write_bytes(content[: -(3 << 20)] + bytes(3 << 20))
    with pytest.raises(CheckpointError, match="has its full size, but ends in zeros"):
        reject_zeros(whole)


def test_a_padded_model_is_rejected_as_it_is_loaded(write, tiny_weights, monkeypatch):
    path = write(tiny_weights)
    content = path.read_bytes()
    path.write_bytes(content[:-3000] + bytes(3000))
    monkeypatch.setattr("comfyui_l2p.l2p_core.files.header.MAX_ZEROS", 2000)
    with pytest.raises(CheckpointError, match="ends in zeros"):
        load_model(path)


def test_names_do_not_steer_the_terminal(tmp_path, capsys):
    file = tmp_path / "a\x1b[31m\u202eb.safetensors"
    file.write_bytes(b"x")
    assert main(["inspect", str(file)]) == 1
    assert "a\\x1b[31m\\u202eb.safetensors" in capsys.readouterr().err
    assert printable("ü\n\t🎈\r\x9b") == "ü\n\t🎈\\r\\x9b"
