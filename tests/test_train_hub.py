"""Data sets of Hugging Face against the same images in a plain folder; the hub is a stand-in."""

import sys
from dataclasses import replace

import pytest
from comfyui_l2p.l2p_core.train.dataset import read_data
from small_runs import config

datasets = pytest.importorskip("datasets")


@pytest.fixture
def rows(data):
    """The images of `data` as a data set: their bytes, captions and seeds."""
    files = sorted((data / "images").iterdir())
    features = {
        "picture": datasets.Image(),
        "text": datasets.Value("string"),
        "short": datasets.Value("string"),
        "seed": datasets.Value("int64"),
        "scores": datasets.List(datasets.Value("float32")),
    }
    return datasets.Dataset.from_dict(
        {
            "picture": [{"bytes": file.read_bytes(), "path": None} for file in files],
            "text": [f"a shape, number {number}" for number in range(len(files))],
            "short": ["a shape"] * len(files),
            "seed": list(range(len(files))),
            "scores": [[0.5]] * len(files),
        },
        datasets.Features(features),
    )


def examples(given, data, **changes):
    settings = replace(config(data, **changes), data=(str(given),))
    return read_data(settings, 96 * 96, 16, 1, False).main


@pytest.mark.parametrize("kind", ["saved", "splits", "parquet", "hub"])
def test_a_data_set_is_read_like_the_folder_of_its_images(data, rows, monkeypatch, kind):
    given = data.parent / "set"
    if kind == "saved":
        rows.save_to_disk(given)
    elif kind == "splits":
        datasets.DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(given)
    elif kind == "parquet":
        rows.to_parquet(given / "data" / "train-00000.parquet")
    else:
        given = "hf://datasets/someone/shapes"
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **b: asked.append((a, b)) or rows)
    found = examples(given, data)
    wanted = sorted((data / "images").iterdir())
    assert [each.file.read_bytes() for each in found] == [file.read_bytes() for file in wanted]
    assert [each.captions[0] for each in found] == [
        f"a shape, number {number}" for number in range(6)
    ]
    assert [each.seed for each in found] == list(range(6))
    assert examples(f"{given}:1", data, caption_column="short")[0].captions == ("a shape",)
    if kind == "hub":
        assert asked == [(("someone/shapes",), {"split": "train"})], "read once"


def test_a_data_set_that_does_not_fit_is_named(data, rows):
    given = data.parent / "set"
    secret = data.parent / "secret.png"
    secret.write_bytes((data / "images" / "0.png").read_bytes())

    def rejected(words):
        with pytest.raises(ValueError, match=words):
            examples(given, data)
        assert not list((data.parent / "run").glob("datasets/*/metadata.jsonl"))

    rows.remove_columns("picture").to_parquet(given / "train.parquet")
    rejected("has no column of images; its columns are text, short, seed, scores")
    named = datasets.Dataset.from_dict(
        {"picture": [{"bytes": None, "path": str(secret)}], "text": ["a"]},
        features=datasets.Features(
            {"picture": datasets.Image(decode=False), "text": datasets.Value("string")}
        ),
    )
    named.to_parquet(given / "train.parquet")
    rejected("row 1: its image is the file .*secret.png, which is not part of it")
    (given / "train.parquet").write_bytes(b"PAR1 no more")
    rejected("set can't be opened by datasets: ")


def test_the_package_is_named_where_it_is_missing(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"comfyui-l2p\[datasets\]"):
        examples("hf://someone/shapes", data)
