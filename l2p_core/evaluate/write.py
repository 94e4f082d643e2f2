"""Generate the images of a benchmark: `l2p evaluate write`."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ... import __version__
from ..batch import Job, generate, plan
from ..commands.arguments import file_and_strength, pipeline_arguments, share
from ..files.atomic import atomic_write
from ..images import PNG_KEY, open_image, read_image
from ..outputs import is_one_image
from ..pipeline import BUNDLED_MODEL, L2PPipeline
from ..settings import Settings, checked
from .command import GENERAL
from .layout import CARD, EVALSCOPE, GRIDS, Item, Task, read_card, read_task

OF_ONE_IMAGE = ("prompt", "completed_prompt", "seed")  # of a PNG's record, and no part of a card


def run_write(args: argparse.Namespace) -> None:
    """Generate a benchmark's images, and say how its own program scores them."""
    task = read_task(args.benchmark, args.source, args.limit, args.count)
    rank, processes, device = share(args.device)
    options = pipeline_arguments(args)
    if args.benchmark == "shapes":
        options["text_encoder"] = shapes_encoder(args.checkpoint, args.text_encoder)
    pipe = L2PPipeline.from_pretrained(
        **options, device=device, progress=args.checkpoint is not None
    )
    for given in args.lora:
        pipe.load_lora(*file_and_strength(given))
    write(
        task,
        pipe,
        flag_settings(args),
        args.output,
        args.batch,
        args.free_text_encoder,
        args.overwrite,
        rank,
        processes,
    )
    if rank == 0:
        print(args.output)
        print(next_command(args.benchmark, args.output))


def flag_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of an image that the flags say; None where one is not given."""
    return {name: getattr(args, name) for name in GENERAL if name != "prompt"}


def shapes_encoder(checkpoint: str | None, given: str | None) -> str | Path | None:
    """Return the text encoder for the prompts of the bundled model: its own one, unless another
    is given or lies beside the checkpoint."""
    if given or checkpoint is None:
        return given
    place = Path(checkpoint)
    folders = (place, place.parent) if place.is_dir() else (place.parent,)
    if any((folder / "text_encoder").is_dir() for folder in folders):
        return None
    return BUNDLED_MODEL / "text_encoder"


def next_command(benchmark: str, folder: Path) -> str:
    """Return how the images of a folder are scored."""
    if benchmark == "geneval":
        return (
            f"GenEval's own program: python evaluation/evaluate_images.py {folder} --outfile"
            " results.jsonl --model-path DETECTOR"
        )
    if benchmark == "dpg":
        width = read_card(folder)["width"]
        return f"DPG-Bench's own program: bash dpg_bench/dist_eval.sh {folder / GRIDS} {width}"
    if benchmark == "shapes":
        return f"Score: l2p evaluate score shapes {folder}"
    return f"EvalScope's general_t2i reads {folder / 'evalscope.jsonl'}"


def write(
    task: Task,
    pipe: L2PPipeline,
    settings: dict[str, Any],
    folder: Path,
    batch: int = 1,
    free_text_encoder: bool | None = None,
    overwrite: bool = False,
    rank: int = 0,
    processes: int = 1,
) -> None:
    """Generate a task's images, their grids and the card; what exists already is kept.

    settings: of all images; None for the checkpoint's default. rank, processes: this process's
    part of the prompts. For the rest see `batch.generate`, which raises what this raises."""
    if is_one_image(folder):
        raise ValueError(f"--output is {folder}, an image file; give a folder")
    planned = _jobs(task, settings, folder, pipe)
    if task.benchmark == "dpg":
        _check_cells(planned)
    mine = list(zip(task.items, planned, strict=True))[rank::processes]
    jobs = [job for _, item_jobs in mine for job in item_jobs]
    generate(jobs, pipe, batch, free_text_encoder, overwrite, progress=rank == 0)

    for item, _ in mine:
        _write_text(folder / item.folder / "metadata.jsonl", json.dumps(item.metadata) + "\n")
    if task.benchmark in ("geneval", "dpg"):
        for item, item_jobs in tqdm(mine, unit="grid", disable=rank > 0):
            name = f"{item.folder}/grid.png"
            if task.benchmark == "dpg":
                name = f"{GRIDS}/{item.id}.png"
            _update_grid([job.output for job in item_jobs], folder / name)
    if rank == 0:
        card = {
            "program": f"comfyui-l2p {__version__}",
            "torch": torch.__version__,
            "device": str(pipe.device),
            "benchmark": task.benchmark,
            **task.origin,
            "prompts": len(task.items),
            "images_per_prompt": task.count,
            "first_seed": planned[0][0].settings.seed,
            **_shared_record(planned[0][0].output),
        }
        _write_text(folder / CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
        _write_text(folder / EVALSCOPE, _evalscope_lines(task.items, planned))


def _jobs(task: Task, settings: dict[str, Any], folder: Path, pipe: L2PPipeline) -> list[list[Job]]:
    """The images of each prompt. A fault is that of a prompt's first image, by its number."""
    by_item: list[list[Job]] = [[] for _ in task.items]
    for copy in range(task.count):
        rows = []
        for item in task.items:
            first = item.settings.get("seed")
            first = settings.get("seed") if first is None else first
            seed = int(checked("seed", Settings.seed if first is None else first)) + copy
            own = {"prompt": item.prompt, "file_name": item.file_name(copy), "seed": seed}
            rows.append({**item.settings, **own})
        outputs = plan(rows, settings, 1, folder, pipe)
        for jobs, job in zip(by_item, outputs, strict=True):
            jobs.append(job)
    return by_item


def _check_cells(planned: list[list[Job]]) -> None:
    """Raise ValueError unless all images are squares of one size, as DPG-Bench cuts its grids."""
    sizes = {(job.settings.width, job.settings.height) for jobs in planned for job in jobs}
    width, height = max(sizes)
    if len(sizes) > 1 or width != height:
        raise ValueError(
            f"images have {width} x {height} pixels; DPG-Bench cuts its grids into squares of one"
            " size. Give --width and --height the same number"
        )


def _update_grid(cells: list[Path], file: Path) -> None:
    """Write images as a grid two cells wide, row by row, unless that was done since they were
    generated."""
    newest = max(cell.stat().st_mtime_ns for cell in cells)
    if file.is_file() and file.stat().st_mtime_ns >= newest:
        return
    images = [read_image(cell).convert("RGB") for cell in cells]
    width, height = images[0].size
    columns = min(len(images), 2)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as stream:
        grid.save(stream, "PNG")


def _shared_record(image: Path) -> dict[str, Any]:
    """What an image's record says of all images of a run."""
    with open_image(image, ("PNG",)) as opened:
        record = json.loads(opened.info[PNG_KEY])
    return {name: value for name, value in record.items() if name not in OF_ONE_IMAGE}


def _evalscope_lines(items: list[Item], planned: list[list[Job]]) -> str:
    lines = []
    for item, jobs in zip(items, planned, strict=True):
        for copy, job in enumerate(jobs):
            row = {
                "id": f"{item.id}-{copy}" if len(jobs) > 1 else item.id,
                "prompt": item.prompt,
                "image_path": str(job.output.absolute()),
            }
            lines.append(json.dumps(row, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def _write_text(file: Path, text: str) -> None:
    """Write a text file, unless it says that already."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() and file.read_bytes() == text.encode():
        return
    with atomic_write(file) as stream:
        stream.write(text.encode())
