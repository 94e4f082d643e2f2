"""Prompts to picture files, many at a time and over several processes: `l2p generate`."""
import csv
import io
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import MISSING, Field, asdict, dataclass, fields
from functools import cache, lru_cache
from itertools import groupby, islice
from pathlib import Path
from threading import Event

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from .files.atomic import WAIT, atomic_write, locked, process_rank
from .header import hash_files
from .image import open_image
from .pipeline import L2PPipeline, check_mask, usable_device
from .sampler import check_shortcuts, schedule, solver
from .stages import Stage
from .text import encoder_files

PNG_KEY = "l2p"  # the text chunk that carries a picture's settings as JSON


@dataclass(frozen=True)
class Picture:
    """One picture to draw: where to, and every setting that decides what it looks like, named as in `L2PPipeline`."""
    output: Path
    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    num_inference_steps: int
    cfg_scale: float
    shift: float
    sampler: str
    denoising_strength: float
    stages: int
    stage_strength: float
    redraw: str
    rand_device: str
    cfg_truncation: float = 1.0
    cache_threshold: float = 0.0
    input_image: str = ""  # a file; empty for none
    inpaint_mask: str = ""

    @property
    def shared(self) -> dict:
        """The settings that all pictures of one batch have in common."""
        return {name: value for name, value in asdict(self).items() if name not in ("output", "prompt", "seed")}

    def plan(self, pipe: L2PPipeline) -> list[Stage]:
        """The drawings that lead to it. Raises ValueError where its settings do not fit."""
        return pipe.plan_stages(self.height, self.width, self.num_inference_steps, self.denoising_strength, self.stages,
                                self.stage_strength, self.redraw)


SETTINGS = tuple(field.name for field in fields(Picture) if field.name != "output")
COLUMNS = ("file_name", "text", *SETTINGS)  # what a row of a prompt file may say; text is another name for prompt


def plan(rows: list[dict], settings: dict, count: int, output: Path, pipe: L2PPipeline) -> list[Picture]:
    """Every picture to draw, with nothing left open.

    rows: of a prompt file, see `COLUMNS`. settings: for what a row leaves out; None for the checkpoint's default.
    count: pictures for each row, with seeds one apart. output: a .png for one picture, a folder for several.
    Raises ValueError where a row, a setting or the output makes no sense."""
    pictures, look = [], lru_cache(4)(open_picture)
    for number, (row, files) in enumerate(zip(rows, output_files(rows, count, output))):
        row = {name: value for name, value in row.items() if value is not None and name != "file_name"}
        row["prompt"] = row.pop("text", row.get("prompt", ""))
        values = {**{name: value for name, value in settings.items() if value is not None}, **row}
        try:
            values = {field.name: cast(field, values[field.name]) for field in fields(Picture) if field.name in values}
            check_mask(values.get("inpaint_mask"), values.get("input_image"))
            if values.get("inpaint_mask"):
                look(values["inpaint_mask"])
            if values.get("input_image"):
                values["height"], values["width"] = pipe.size_for(look(values["input_image"]), values.get("height"), values.get("width"))
            values = {**pipe.defaults._asdict(), **values}
            pipe.check_size(values["height"], values["width"])
            schedule(values["num_inference_steps"], values["denoising_strength"], values["shift"])
            solver(values["sampler"])
            check_shortcuts(*(values.get(name, getattr(Picture, name)) for name in ("cfg_truncation", "cache_threshold")))
            usable_device(values["rand_device"])
            if not 0 <= values["seed"] <= 2**64 - count:
                raise ValueError(f"seed is {values['seed']}; expected a whole number from 0 to 2^64 - 1")
            drawn = [Picture(file, **{**values, "seed": values["seed"] + copy}) for copy, file in enumerate(files)]
            drawn[0].plan(pipe)
        except ValueError as error:
            raise ValueError(f"prompt {number + 1}: {error}" if len(rows) > 1 else str(error)) from None
        pictures += drawn
    return pictures


def output_files(rows: list[dict], count: int, output: Path) -> list[list[Path]]:
    """The files of each row's pictures: `output` itself where it is a .png, else named in that folder by the row's
    file_name or number, and by the copy where there are several. Raises ValueError where that makes no sense."""
    if output.suffix and output.suffix.lower() != ".png":
        raise ValueError(f"--output is {output}; pictures are written as .png, which keeps their settings")
    if count < 1:
        raise ValueError(f"--count is {count}; expected 1 or more")
    if output.suffix and len(rows) * count > 1:
        raise ValueError(f"--output is one file, {output}, for {len(rows) * count} pictures; give a folder")
    out = []
    for number, row in enumerate(rows):
        name = Path(str(row.get("file_name") or f"{number:05d}"))
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"prompt {number + 1}: file_name {name} leads out of {output}")
        stem = name.name.removesuffix(".png")
        out.append([output] if output.suffix else
                   [output / name.with_name(f"{stem}-{copy}.png" if count > 1 else f"{stem}.png") for copy in range(count)])
    files = [file for row in out for file in row]
    if len(set(files)) < len(files):
        raise ValueError("two prompts have the same file_name; give each its own")
    return out


def cast(setting: Field, value: object) -> str | int | float:
    """A setting as the type it has. Raises ValueError where it can't be."""
    try:
        result = setting.type(value)
        if isinstance(value, (list, dict)) or setting.type is not str and (
                not math.isfinite(result) or not isinstance(value, str) and result != value):
            raise ValueError
        return result
    except (TypeError, ValueError, OverflowError):
        kind = {int: "a whole number", float: "a number"}.get(setting.type, "text")
        raise ValueError(f"{setting.name} is {value!r}; expected {kind}") from None


def draw(pictures: list[Picture], pipe: L2PPipeline, batch: int = 1, free_text_encoder: bool = False,
         overwrite: bool = False, progress: bool = True) -> None:
    """Draw and write the pictures that are not there yet, `batch` at a time, each file whole or not at all.

    free_text_encoder: encode all prompts first, then take the encoder out of memory. overwrite: draw all. progress: show
    a bar. Raises ValueError, before anything is drawn, where a picture is there with other settings, and AlreadyRunning where
    another run still writes there after `WAIT` seconds."""
    if batch < 1:
        raise ValueError(f"--batch is {batch}; expected 1 or more")
    if not pictures:
        return
    stop = Event()
    with lock_outputs([picture.output for picture in pictures]), ThreadPoolExecutor(1) as beside, ExitStack() as at_end:
        at_end.callback(stop.set)  # hashing, which leaves the interpreter free to draw
        checkpoint_hash = beside.submit(hash_files, pipe.layout.files, stop)
        encoder_hash = beside.submit(hash_files, encoder_files(pipe.text_encoder_path), stop)
        hash_once = cache(lambda file: hash_files([Path(file)], stop))  # a start picture may serve thousands

        def describe(picture: Picture) -> dict:
            facts = {name: value for name, value in asdict(picture).items() if name in SETTINGS}
            for name in ("input_image", "inpaint_mask"):
                if facts[name]:  # a folder's name is nobody's business, the content is
                    facts[f"{name}_sha256"] = hash_once(facts[name])
                    facts[name] = Path(facts[name]).name
            return {**facts, "dtype": str(pipe.dtype).removeprefix("torch."), "quantization": pipe.layout.quantization,
                    "text_encoder_sha256": encoder_hash.result(), "checkpoint": pipe.layout.path.name,
                    "checkpoint_sha256": checkpoint_hash.result()}

        missing = [picture for picture in pictures if overwrite or not picture.output.exists()
                   or not is_drawn(picture.output, describe(picture))]
        if len(missing) < len(pictures):
            print(f"{len(pictures) - len(missing)} of {len(pictures)} pictures are there already")
        if not missing:
            return
        encode = pipe.encode_prompt
        encode(missing[0].prompt)  # what is wrong with the text encoder shows before the bar does
        if free_text_encoder:
            texts = {text for picture in missing for text in (picture.prompt, picture.negative_prompt)}
            encode = {text: pipe.encode_prompt(text).cpu() for text in texts}.__getitem__
            pipe.unload_text_encoder()
        with tqdm(total=sum(stage.steps for picture in missing for stage in picture.plan(pipe)), unit="step", disable=not progress) as bar:
            for group in batches(missing, batch):
                settings = group[0].shared
                files = {name: open_picture(file) for name in ("input_image", "inpaint_mask") if (file := settings.pop(name))}
                drawn = pipe(
                    prompt_embeds=[encode(picture.prompt) for picture in group],
                    negative_prompt_embeds=encode(settings.pop("negative_prompt")),
                    seed=[picture.seed for picture in group],
                    callback=lambda done, steps, _: bar.update(len(group) if done else 0), **settings, **files)
                for picture, image in zip(group, drawn, strict=True):
                    save(image, picture.output, describe(picture))
                bar.update(len(group))


def lock_outputs(outputs: list[Path]) -> AbstractContextManager[None]:
    """Keep other runs from writing these files: the file itself if there is one, else the folder that holds them all.

    Processes that a launcher started share the work, so the first one locks for all of them."""
    if process_rank() > 0:
        return nullcontext()
    several = len(outputs) > 1
    place = Path(os.path.commonpath([output.parent.absolute() for output in outputs])) if several else outputs[0]
    busy = f"another run is writing to {place}. Wait for it to finish, or give another --output"
    return locked(place, busy, WAIT, folder=several)


def read_rows(file: Path, any_column: bool = False) -> list[dict]:
    """One dict per prompt from .txt, .csv, .json or .jsonl. any_column: take columns of every name, and none for granted.
    Raises ValueError with the line that can't be read."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file.name} is not UTF-8 text; save it as UTF-8") from None
    match file.suffix.lower():
        case ".txt":
            rows = [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]
        case ".csv":
            try:
                rows = list(csv.DictReader(io.StringIO(text, newline="")))
            except csv.Error as error:
                raise ValueError(f"{file.name} is not CSV: {error}") from None
            for number, row in enumerate(rows):
                if row.pop(None, None):
                    raise ValueError(f"{file.name}, prompt {number + 1} has more columns than the first line names; put a "
                                     "prompt with commas in quotes")
            rows = [{name: value for name, value in row.items() if value} for row in rows]
        case ".json" | ".jsonl":
            try:
                rows = (json.loads(text) if file.suffix.lower() == ".json"
                        else [json.loads(line) for line in text.split("\n") if line.strip()])
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{file.name} is not {file.suffix[1:].upper()}: {error}") from None
            rows = [{"prompt": row} if isinstance(row, str) else row for row in (rows if isinstance(rows, list) else [rows])]
        case suffix:
            raise ValueError(f"{file.name} ends in {suffix or 'nothing'}; expected .txt, .csv, .json or .jsonl")
    if not rows:
        raise ValueError(f"{file.name} holds no prompts")
    for number, row in enumerate(rows):
        unknown = row.keys() - set(row if any_column else COLUMNS) if isinstance(row, dict) else {"not a table"}
        if unknown or not any_column and not isinstance(row.get("prompt", row.get("text")), str):
            raise ValueError(f"{file.name}, prompt {number + 1}: "
                             + (f"unknown column {sorted(map(str, unknown))[0]}" if unknown else "no column prompt or text")
                             + f"; known are {', '.join(COLUMNS)}")
    return rows


def batches(pictures: list[Picture], size: int) -> Iterator[list[Picture]]:
    """Runs of neighbouring pictures that can be drawn together, `size` at most."""
    for _, run in groupby(pictures, key=lambda picture: picture.shared):
        while group := list(islice(run, size)):
            yield group


def is_drawn(output: Path, wanted: dict) -> bool:
    """True where the file has the very settings wanted. Raises ValueError where it has others, or none."""
    try:
        with open_image(output, ("PNG",)) as there:
            settings = dict(json.loads(there.info[PNG_KEY]))
    except (OSError, KeyError, ValueError, TypeError, RecursionError):
        raise ValueError(f"{output} exists and was not drawn by l2p; give another --output, or --overwrite") from None
    lacking = {each.name: each.default for each in fields(Picture) if each.default is not MISSING}  # in files of before they were settings
    for name in {**wanted, **settings}:
        if f"{name}_sha256" in wanted:  # the same file under another name
            continue
        was, now = (each.get(name, lacking.get(name)) for each in (settings, wanted))
        if was != now:
            raise ValueError(f"{output} exists, drawn with other settings ({name} {was!r}, now {now!r}); give another --output, or "
                             "--overwrite")
    return True


def save(image: Image.Image, output: Path, settings: dict) -> None:
    """Write the PNG with its settings, atomically."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(settings, ensure_ascii=False))
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as stream:
        image.save(stream, "PNG", pnginfo=info)


def open_picture(file: str | Path) -> Image.Image:
    """The picture, read whole. Raises ValueError where it is none, or not there."""
    try:
        with open_image(file) as picture:
            picture = ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise ValueError(f"there is no {file}") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever Pillow makes of a damaged file
        raise ValueError(f"{file} is no picture that Pillow can read: {error}") from None
    if picture.mode.startswith("I"):  # 16 bits a pixel
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    return picture
