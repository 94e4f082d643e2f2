"""Images and captions to train on: folders in ComfyUI's input and output, and images of a graph."""

import csv
import hashlib
import io as text_io
import json
import os
import re
from pathlib import Path

import folder_paths
import torch
from PIL import Image

from ..l2p_core.files.atomic import atomic_write
from ..l2p_core.train.dataset import (
    CAPTIONS,
    IMAGES,
    METADATA,
    Reading,
    find_named,
    rows_of,
    subfolders,
)

FROM_GRAPH = "images of the graph"
TRAINING = "l2p_training"  # in ComfyUI's output: a folder for each run
IN_OUTPUT = " [output]"  # ComfyUI's own mark for what lies there
DEPTH = 4  # folders below input or output; links may lead in a circle
REPEATED = re.compile(r"[1-9]\d*_")  # of kohya's folders: 10_star
NAMES = ("file_name", "image", "mask")  # columns that name files


def dataset_folders() -> list[str]:
    """Return what can be chosen: folders of images in ComfyUI's input, and folders of images with
    captions in its output, which are marked."""
    found = folders_below(Path(folder_paths.get_input_directory()), captioned=False)
    made = folders_below(Path(folder_paths.get_output_directory()), captioned=True)
    return [*found, *(f"{name}{IN_OUTPUT}" for name in made)]


def folders_below(root: Path, captioned: bool) -> list[str]:
    """Return the folders that hold images, as names below the root.

    captioned: only those that hold captions too."""
    found = []
    for place, folders, files in os.walk(root, followlinks=True):
        relative = Path(place).relative_to(root)
        hidden = {name for name in folders if name.startswith(".") or name == TRAINING}
        folders[:] = sorted(set(folders) - hidden) if len(relative.parts) < DEPTH else []
        ends = {Path(name).suffix.lower() for name in files}
        images = bool(ends & set(IMAGES)) and (not captioned or bool(ends & set(CAPTIONS)))
        repeated = not captioned and any(REPEATED.match(name) for name in folders)
        if relative.parts and (images or repeated or set(METADATA) & set(files)):
            found.append(relative.as_posix())
    return sorted(found)


def dataset_path(name: str) -> Path:
    """Return the folder of that name. Raises ValueError where there is none, or where its metadata
    names files outside it."""
    if name not in dataset_folders():
        raise ValueError(
            f"there is no folder of images {name!r} in {folder_paths.get_input_directory()}. Press"
            " R to list what is there"
        )
    if name.endswith(IN_OUTPUT):
        folder = Path(folder_paths.get_output_directory()) / name.removesuffix(IN_OUTPUT)
    else:
        folder = Path(folder_paths.get_input_directory()) / name
    for each, _ in subfolders(folder):
        source, rows = rows_of(each, Reading())
        for row in rows:
            for column in NAMES:
                file = find_named(each, str(row[column])) if row.get(column) else None
                if file and not Path(os.path.abspath(file)).is_relative_to(each):
                    raise ValueError(
                        f"{source} names {row[column]}, which is not in {each}. Put all its images"
                        " there"
                    )
    return folder


def stamps_below(name: str) -> list[tuple]:
    """Return what tells that a dataset folder changed; nothing for images of the graph."""
    if name not in dataset_folders():
        return []
    folder = dataset_path(name)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]


def save_images(images: list[torch.Tensor], prompts: list[str], trigger: str, run: Path) -> Path:
    """Write images of a graph and their captions as a dataset folder in a run's, and return it.

    images: IMAGEs (B, H, W, 3 or 4). prompts: one for each image, or one for all; lines of one
    text count as prompts where there are as many. The folder's name follows from the contents, so
    that a run resumes on the same ones. Raises ValueError where the counts do not fit."""
    frames = [frame for batch in images for frame in batch]
    captions = captions_for(len(frames), prompts, trigger)
    pixels = [frame.float().mul(255).round().clamp(0, 255).byte().cpu().numpy() for frame in frames]
    digest = hashlib.sha256(json.dumps(captions).encode())
    for each in pixels:
        digest.update(repr(each.shape).encode())
        digest.update(each.tobytes())
    folder = run / f"dataset-{digest.hexdigest()[:12]}"
    if (folder / METADATA[0]).is_file():  # it is written last
        return folder

    folder.mkdir(parents=True, exist_ok=True)
    rows = [("file_name", "text")]
    for number, (each, caption) in enumerate(zip(pixels, captions), 1):
        rows.append((f"{number:05d}.png", caption))
        with atomic_write(folder / rows[-1][0]) as stream:
            Image.fromarray(each).save(stream, "PNG")
    table = text_io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    with atomic_write(folder / METADATA[0]) as stream:
        stream.write(table.getvalue().encode())
    return folder


def captions_for(count: int, prompts: list[str], trigger: str) -> list[str]:
    """Return a caption for each of so many images. Raises ValueError."""
    lines = [line for text in prompts for line in text.splitlines() if line.strip()]
    given = [" ".join(each.split()) for each in (prompts if len(prompts) > 1 else lines)]
    if not given and trigger:
        given = [""]  # the trigger word alone is the caption
    if len(given) not in (1, count):
        raise ValueError(
            f"there are {count} images and {len(given)} prompts; expected a prompt for each image,"
            " or one for all"
        )
    return given * count if len(given) == 1 else given
