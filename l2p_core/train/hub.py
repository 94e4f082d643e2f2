"""Data sets of Hugging Face's `datasets`, as folders of images and captions.

A data set comes from the hub, as hf://OWNER/NAME, or from a folder that `save_to_disk` wrote or
that holds Parquet files. Its images are written once, as they are, beside metadata.jsonl, and read
like any others."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files.atomic import atomic_write, locked
from ..images import open_image

HUB = "hf://"
PATIENCE = 6 * 3600  # seconds that other processes wait for the one that writes
ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif"}


def is_dataset(given: str) -> bool:
    """Return whether a name is of a data set: on the hub, or a folder of its files."""
    folder = Path(given)
    return given.startswith(HUB) or (
        (folder / "dataset_dict.json").is_file()
        or (folder / "state.json").is_file()
        or bool(parquet_files(folder))
    )


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a folder, or of its data/."""
    found = [file for place in (folder, folder / "data") for file in place.glob("*.parquet")]
    return sorted(found)


def as_folder(given: str, place: Path, progress: bool) -> Path:
    """Return the folder of a data set's images and captions, written where it does not exist yet.

    place: where such folders lie. Raises ValueError where the data set can't be had or has no
    images, ImportError where datasets is not installed."""
    digest = hashlib.sha256(given.encode()).hexdigest()[:8]
    folder = place / f"{Path(given).name}-{digest}"
    with locked(folder, f"another run is writing {folder}", PATIENCE, folder=True):
        if not (folder / "metadata.jsonl").is_file():
            write_folder(given, open_dataset(given), folder, progress)
    return folder


def open_dataset(given: str) -> Any:
    """Return the data set, of several splits the one for training. Raises ValueError,
    ImportError."""
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{given} is a data set of Hugging Face, which needs datasets: pip install"
            " 'comfyui-l2p[datasets]'"
        ) from None
    try:
        if given.startswith(HUB):
            name = given.removeprefix(HUB).removeprefix("datasets/")
            return datasets.load_dataset(name, split="train")
        if files := parquet_files(Path(given)):
            return datasets.load_dataset(
                "parquet", data_files=[str(file) for file in files], split="train"
            )
        found = datasets.load_from_disk(given)
        return found["train"] if isinstance(found, datasets.DatasetDict) else found
    except Exception as error:  # whatever datasets makes of a name, a network or a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{given} can't be opened by datasets: {reason}. Expected hf://OWNER/NAME, or a folder"
            " of save_to_disk or of Parquet files, with a split train"
        ) from None


def write_folder(given: str, rows: Any, folder: Path, progress: bool) -> None:
    """Write the images and metadata.jsonl, which comes last. Raises ValueError, with the row."""
    import datasets

    columns = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise ValueError(
            f"{given} has no column of images; its columns are {', '.join(rows.features)}"
        )
    cache = Path(datasets.config.HF_CACHE_HOME).resolve()
    lines = []
    tables = rows.with_format("arrow").iter(batch_size=16)  # whose images are not decoded
    each_row = (row for table in tables for row in table.to_pylist())
    bar = tqdm(each_row, f"reading {given}", len(rows), disable=not progress)
    for number, row in enumerate(bar):
        try:
            content = content_of(row[columns[0]], cache)
            with open_image(io.BytesIO(content), name="its image") as image:
                ending = ENDINGS.get(image.format or "")
            if ending is None:
                raise ValueError("its image is of no format that is supported")
        except (ValueError, OSError) as error:
            raise ValueError(f"{given}, row {number + 1}: {error}") from None
        name = f"{number:06d}{ending}"
        with atomic_write(folder / name, clean=False) as stream:
            stream.write(content)
        lines.append(json.dumps({**plain(row), "file_name": name}, ensure_ascii=False))
    with atomic_write(folder / "metadata.jsonl") as stream:
        stream.write("\n".join(lines).encode("utf-8"))


def content_of(image: Mapping[str, Any] | None, cache: Path) -> bytes:
    """Return the bytes of an image that is not decoded. Raises ValueError.

    cache: the only folder that a data set may name files in."""
    if not image or not (image.get("bytes") or image.get("path")):
        raise ValueError("it has no image")
    if image.get("bytes"):
        return image["bytes"]
    file = Path(image["path"]).resolve()
    if not file.is_relative_to(cache) or not file.is_file():
        raise ValueError(f"its image is the file {image['path']}, which is not part of it")
    return file.read_bytes()


def plain(row: Mapping[str, Any]) -> dict[str, object]:
    """Return the columns that metadata may have: texts, numbers, lists of texts."""
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, (str, int, float))
        or isinstance(value, list)
        and all(isinstance(each, str) for each in value)
    }
