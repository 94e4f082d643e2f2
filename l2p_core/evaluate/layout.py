"""The folder that the images of a benchmark lie in, and what is generated for it.

    card.json                     what generated the images
    evalscope.jsonl               id, prompt and image_path, as EvalScope's general_t2i reads it
    00000/metadata.jsonl          one line: the prompt, and what the benchmark says of it
    00000/samples/0000.png ...    its images
    00000/grid.png                the images together, for GenEval
    grids/ID.png                  the images together, for DPG-Bench

The numbered folders are GenEval's layout; `grids` is what DPG-Bench's program reads."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.header import hash_files
from ..settings import FIELDS
from ..shapes.scenes import test_scenes
from ..tables import read_rows, read_text
from .dpg import CELLS
from .geneval import read_metadata

CARD, EVALSCOPE, GRIDS = "card.json", "evalscope.jsonl", "grids"
SHAPES_PROMPTS = 300
IMAGES = {"geneval": 4, "dpg": 4, "shapes": 1, "prompts": 1}  # of each prompt


@dataclass(frozen=True)
class Item:
    """A prompt of a benchmark. number: of its folder. settings: its own ones, such as a seed."""

    number: int
    id: str
    prompt: str
    metadata: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the folder of its images."""
        return f"{self.number:05d}"

    def file_name(self, copy: int) -> str:
        """File of an image, relative to the benchmark's folder."""
        return f"{self.folder}/samples/{copy:04d}.png"


@dataclass(frozen=True)
class Task:
    """What to generate: a benchmark's prompts, with `count` images of each.

    origin: what the card says of where the prompts come from."""

    benchmark: str
    items: list[Item]
    count: int
    origin: dict[str, str]

    @property
    def names(self) -> set[str]:
        """The files of its images, relative to their folder."""
        return {item.file_name(copy) for item in self.items for copy in range(self.count)}


def read_task(
    benchmark: str, source: Path | None, limit: int | None = None, count: int | None = None
) -> Task:
    """Return what to generate for a benchmark. source, limit: see `read_items`. count: by default
    the benchmark's own. Raises ValueError."""
    count = IMAGES[benchmark] if count is None else count
    if count < 1:
        raise ValueError(f"--count is {count}; expected 1 or more")
    if benchmark == "dpg" and count > CELLS:
        raise ValueError(f"--count is {count}; a grid of DPG-Bench has {CELLS} cells at most")
    items = read_items(benchmark, source, limit)
    if source is None:
        return Task(benchmark, items, count, {})
    digest = hash_files(source_files(benchmark, source))
    return Task(benchmark, items, count, {"source": source.name, "source_sha256": digest})


def read_items(benchmark: str, source: Path | None, limit: int | None = None) -> list[Item]:
    """Return the prompts of a benchmark.

    source: GenEval's metadata file, DPG-Bench's folder of prompts, or a prompt file; None for
    shapes. limit: take so many, spread evenly. Raises ValueError."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; expected 1 or more")
    if benchmark == "shapes":
        return _shapes_items(limit or SHAPES_PROMPTS)
    if source is None:
        kinds = {
            "geneval": "GenEval's evaluation_metadata.jsonl",
            "dpg": "DPG-Bench's folder of prompts",
            "prompts": "a prompt file",
        }
        raise ValueError(f"{benchmark} was given without its prompts; name {kinds[benchmark]}")
    read = {"geneval": _geneval_items, "dpg": _dpg_items, "prompts": _prompt_items}
    items = read[benchmark](source)
    if limit is None or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


def source_files(benchmark: str, source: Path) -> list[Path]:
    """Return the files that `read_items` reads."""
    return sorted(source.glob("*.txt")) if benchmark == "dpg" else [source]


def _geneval_items(file: Path) -> list[Item]:
    rows = read_metadata(file)
    return [Item(number, f"{number:05d}", row["prompt"], row) for number, row in enumerate(rows)]


def _dpg_items(folder: Path) -> list[Item]:
    files = source_files("dpg", folder)
    if not files:
        raise ValueError(f"{folder} holds no .txt files; expected DPG-Bench's folder of prompts")
    items = []
    for number, file in enumerate(files):
        prompt = read_text(file).strip()
        if not prompt:
            raise ValueError(f"{file} is empty; expected a prompt")
        items.append(Item(number, file.stem, prompt, {"item_id": file.stem, "prompt": prompt}))
    return items


def _prompt_items(file: Path) -> list[Item]:
    items = []
    for number, row in enumerate(read_rows(file)):
        settings = {
            name: value for name, value in row.items() if name in FIELDS and name != "prompt"
        }
        prompt = row["prompt"] if row.get("text") is None else row["text"]
        id = Path(str(row.get("file_name") or f"{number:05d}")).stem
        items.append(Item(number, id, prompt, {"prompt": prompt}, settings))
    return items


def _shapes_items(count: int) -> list[Item]:
    """The prompts by which the bundled model is scored, each with its number as the seed."""
    items = []
    for number, scene in enumerate(test_scenes(count)):
        shape = {"class": scene.shape, "count": 1}
        metadata = {
            "tag": "shapes",
            "include": [{**shape, "color": scene.colour}],
            "exclude": [{**shape, "count": 2}],
            "prompt": scene.caption(),
            "scene": vars(scene),
        }
        item = Item(number, f"{number:05d}", scene.caption(), metadata, {"seed": number})
        items.append(item)
    return items


@dataclass(frozen=True)
class Written:
    """An image in a folder, and what its prompt's metadata says."""

    path: Path
    name: str  # relative to the folder, with /
    copy: int
    metadata: dict[str, Any]


def read_folder(folder: Path) -> list[Written]:
    """Return the images of a folder, in order. Raises ValueError where there are none."""
    images = []
    for metadata_file in sorted(folder.glob("*/metadata.jsonl")):
        inner = metadata_file.parent
        samples = sorted(
            file for file in (inner / "samples").glob("*.png") if file.stem.isdecimal()
        )
        if not inner.name.isdecimal() or not samples:
            continue
        metadata = read_rows(metadata_file, any_column=True)[0]
        images += [
            Written(file, file.relative_to(folder).as_posix(), int(file.stem), metadata)
            for file in samples
        ]
    if not images:
        raise ValueError(
            f"{folder} holds no images as 00000/samples/0000.png beside 00000/metadata.jsonl; write"
            " them first: l2p evaluate write"
        )
    return images


def read_card(folder: Path) -> dict[str, Any]:
    """Return the card of a folder; an empty one where there is none."""
    file = folder / CARD
    if not file.is_file():
        return {}
    try:
        card = json.loads(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    return card if isinstance(card, dict) else {}
