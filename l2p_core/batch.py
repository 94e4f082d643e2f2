"""Many prompts to image files, resumable and over several processes: `l2p generate`."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from threading import Event

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .files.atomic import WAIT, locked, process_rank
from .files.header import hash_files
from .flow import Callback as FlowCallback
from .images import PNG_KEY, open_image, read_image, save_image
from .pipeline import L2PPipeline, check_mask
from .settings import FIELDS, CompleteSettings, Settings, checked
from .text import encoder_files


@dataclass(frozen=True)
class Job:
    """One image to generate: its file and its settings, with nothing left open."""

    output: Path
    settings: CompleteSettings
    prompt: str  # as it is encoded: see `L2PPipeline.read_prompt`

    @property
    def shared(self) -> dict:
        """The settings that all images of one batch have in common."""
        return {
            name: value
            for name, value in asdict(self.settings).items()
            if name not in ("prompt", "seed")
        }


COLUMNS = (
    "file_name",
    "text",
    *FIELDS,
)  # what a row of a prompt file may set; text is another name for prompt


def plan(
    rows: list[dict], settings: dict, count: int, output: Path, pipe: L2PPipeline
) -> list[Job]:
    """Return every image to generate, its settings checked and complete.

    rows: of a prompt file, see `COLUMNS`. settings: for what a row leaves out; None for the
    checkpoint's default. count: images for each row, with seeds one apart. output: a .png for one
    image, a folder for several. Raises ValueError, with the row's number, for a row, a setting or
    an output that does not fit."""
    jobs, look = [], lru_cache(4)(read_image)
    for number, (row, files) in enumerate(zip(rows, output_files(rows, count, output))):
        row = {
            name: value for name, value in row.items() if value is not None and name != "file_name"
        }
        row["prompt"] = row.pop("text", row.get("prompt", ""))
        values = {**{name: value for name, value in settings.items() if value is not None}, **row}
        try:
            check_mask(values.get("inpaint_mask"), values.get("input_image"))
            for name in ("inpaint_mask", "input_image"):
                if values.get(name):
                    look(checked(name, values[name]))
            complete = pipe.complete(
                values, look(values["input_image"]) if values.get("input_image") else None
            )
            checked("seed", complete.seed + count - 1)
            pipe.plan_stages(complete)
            for copy, file in enumerate(files):
                seed = complete.seed + copy
                read = pipe.read_prompt(complete.prompt, seed)
                jobs.append(Job(file, replace(complete, seed=seed), read))
        except ValueError as error:
            raise ValueError(
                f"prompt {number + 1}: {error}" if len(rows) > 1 else str(error)
            ) from None
    return jobs


def output_files(rows: list[dict], count: int, output: Path) -> list[list[Path]]:
    """The files of each row's pictures: `output` itself where it is a .png, else named in that
    folder by the row's file_name or number, and by the copy where there are several. Raises
    ValueError where that makes no sense."""
    if output.suffix and output.suffix.lower() != ".png":
        raise ValueError(
            f"--output is {output}; pictures are written as .png, which keeps their settings"
        )
    if count < 1:
        raise ValueError(f"--count is {count}; expected 1 or more")
    if output.suffix and len(rows) * count > 1:
        raise ValueError(
            f"--output is one file, {output}, for {len(rows) * count} pictures; give a folder"
        )
    out = []
    for number, row in enumerate(rows):
        name = Path(str(row.get("file_name") or f"{number:05d}"))
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"prompt {number + 1}: file_name {name} leads out of {output}")
        stem = name.name.removesuffix(".png")
        out.append(
            [output]
            if output.suffix
            else [
                output / name.with_name(f"{stem}-{copy}.png" if count > 1 else f"{stem}.png")
                for copy in range(count)
            ]
        )
    files = [file for row in out for file in row]
    if len(set(files)) < len(files):
        raise ValueError("two prompts have the same file_name; give each its own")
    return out


def draw(
    jobs: list[Job],
    pipe: L2PPipeline,
    batch: int = 1,
    free_text_encoder: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Generate and write the images that do not exist yet, `batch` at a time, each file atomically.

    free_text_encoder: encode all prompts first, then free the encoder's memory. overwrite: generate
    all. progress: show a bar. Raises ValueError, before anything is generated, where an image
    exists with other settings, and AlreadyRunning where another run still writes there after `WAIT`
    seconds."""
    if batch < 1:
        raise ValueError(f"--batch is {batch}; expected 1 or more")
    if not jobs:
        return
    stop = Event()
    with (
        lock_outputs([job.output for job in jobs]),
        ThreadPoolExecutor(1) as beside,
        ExitStack() as at_end,
    ):
        at_end.callback(stop.set)  # hashing, which leaves the interpreter free to sample
        checkpoint_hash = beside.submit(hash_files, pipe.layout.files, stop)
        encoder_hash = beside.submit(hash_files, encoder_files(pipe.text_encoder_path), stop)
        hash_once = cache(
            lambda file: hash_files([Path(file)], stop)
        )  # an input image may serve thousands

        def record(job: Job) -> dict:
            hashes = {
                name: hash_once(file)
                for name in ("input_image", "inpaint_mask")
                if (file := getattr(job.settings, name))
            }
            return image_record(
                job, pipe, batch, checkpoint_hash.result(), encoder_hash.result(), hashes
            )

        missing = [
            job
            for job in jobs
            if overwrite or not job.output.exists() or not is_drawn(job.output, record(job))
        ]
        if len(missing) < len(jobs):
            print(f"{len(jobs) - len(missing)} of {len(jobs)} images exist already")
        if not missing:
            return
        encode: Callable[[str], Tensor] = pipe.encode_prompt
        encode(missing[0].prompt)  # a fault of the text encoder shows before the bar does
        if free_text_encoder:
            prompts = {
                prompt for job in missing for prompt in (job.prompt, job.settings.negative_prompt)
            }
            encode = {prompt: pipe.encode_prompt(prompt).cpu() for prompt in prompts}.__getitem__
            pipe.unload_text_encoder()
        steps = sum(stage.steps for job in missing for stage in pipe.plan_stages(job.settings))
        with tqdm(total=steps, unit="step", disable=not progress) as bar:
            for group in batches(missing, batch):
                files = {
                    name: read_image(file)
                    for name in ("input_image", "inpaint_mask")
                    if (file := group[0].shared[name])
                }
                images = generate_batch(
                    group, pipe, encode, files, partial(_advance, bar, len(group))
                )
                for job, image in zip(group, images, strict=True):
                    save_image(image, job.output, record(job))
                bar.update(len(group))


def generate_batch(
    group: list[Job],
    pipe: L2PPipeline,
    encode: Callable[[str], Tensor],
    files: dict[str, Image.Image],
    callback: FlowCallback,
) -> list[Image.Image]:
    """Generate images whose settings are equal except for prompt and seed, in one batch.

    encode: prompt → (L, cap_feat_dim). files: the images input_image and inpaint_mask, where there
    are such. callback: as for `L2PPipeline`."""
    shared = group[0].shared
    for name in ("input_image", "inpaint_mask"):
        del shared[name]
    return pipe(
        prompt_embeds=[encode(job.prompt) for job in group],
        negative_prompt_embeds=encode(shared.pop("negative_prompt")),
        seed=[job.settings.seed for job in group],
        callback=callback,
        **shared,
        **files,
    )


def image_record(
    job: Job,
    pipe: L2PPipeline,
    batch: int,
    checkpoint_hash: str,
    encoder_hash: str,
    input_hashes: dict[str, str],
) -> dict:
    """Return what a PNG carries of its image: the settings, and what else decides its pixels.

    input_hashes: SHA-256 of input_image and inpaint_mask, where there are such."""
    facts = asdict(job.settings)
    for name, digest in input_hashes.items():  # store the hash, not the local path
        facts[f"{name}_sha256"] = digest
        facts[name] = Path(facts[name]).name
    if job.prompt != job.settings.prompt:
        facts["completed_prompt"] = job.prompt
    return {
        **facts,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "quantization": pipe.layout.quantization,
        "batch": batch,
        "batch_guidance": pipe.batch_guidance,
        "text_encoder_sha256": encoder_hash,
        "checkpoint": pipe.layout.path.name,
        "checkpoint_sha256": checkpoint_hash,
    }


def _advance(bar: tqdm, images: int, done: int, *_: object) -> None:
    """Move the bar by one step of so many images; the first call comes before a step is done."""
    bar.update(images if done else 0)


def lock_outputs(outputs: list[Path]) -> AbstractContextManager[None]:
    """Keep other runs from writing these files: the file itself if there is one, else the folder
    that holds them all.

    Processes that a launcher started share the work, so the first one locks for all of them."""
    if process_rank() > 0:
        return nullcontext()
    several = len(outputs) > 1
    place = (
        Path(os.path.commonpath([output.parent.absolute() for output in outputs]))
        if several
        else outputs[0]
    )
    busy = f"another run is writing to {place}. Wait for it to finish, or give another --output"
    return locked(place, busy, WAIT, folder=several)


def read_rows(file: Path, any_column: bool = False) -> list[dict]:
    """One dict per prompt from .txt, .csv, .json or .jsonl. any_column: take columns of every name,
    and none for granted. Raises ValueError with the line that can't be read."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file.name} is not UTF-8 text; save it as UTF-8") from None
    rows: list[dict]
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
                    raise ValueError(
                        f"{file.name}, prompt {number + 1} has more columns than the first line"
                        " names; put a prompt with commas in quotes"
                    )
            rows = [{name: value for name, value in row.items() if value} for row in rows]
        case ".json" | ".jsonl":
            try:
                rows = (
                    json.loads(text)
                    if file.suffix.lower() == ".json"
                    else [json.loads(line) for line in text.split("\n") if line.strip()]
                )
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{file.name} is not {file.suffix[1:].upper()}: {error}") from None
            rows = [
                {"prompt": row} if isinstance(row, str) else row
                for row in (rows if isinstance(rows, list) else [rows])
            ]
        case suffix:
            raise ValueError(
                f"{file.name} ends in {suffix or 'nothing'}; expected .txt, .csv, .json or .jsonl"
            )
    if not rows:
        raise ValueError(f"{file.name} holds no prompts")
    for number, row in enumerate(rows):
        unknown = (
            row.keys() - set(row if any_column else COLUMNS)
            if isinstance(row, dict)
            else {"not a table"}
        )
        if unknown or not any_column and not isinstance(row.get("prompt", row.get("text")), str):
            raise ValueError(
                f"{file.name}, prompt {number + 1}: "
                + (
                    f"unknown column {sorted(map(str, unknown))[0]}"
                    if unknown
                    else "no column prompt or text"
                )
                + f"; known are {', '.join(COLUMNS)}"
            )
    return rows


def batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    """Runs of neighbouring images that can be generated together, `size` at most."""
    for _, run in groupby(jobs, key=lambda job: job.shared):
        while group := list(islice(run, size)):
            yield group


def is_drawn(output: Path, wanted: dict) -> bool:
    """Return True where the file has the settings wanted. Raises ValueError where it has others, or
    none.

    Settings that an older program did not record have their defaults there. How many images were
    generated together changes only their last bits, so it may differ."""
    try:
        with open_image(output, ("PNG",)) as there:
            settings = dict(json.loads(there.info[PNG_KEY]))
    except (OSError, KeyError, ValueError, TypeError, RecursionError):
        raise ValueError(
            f"{output} exists and was not generated by l2p; give another --output, or --overwrite"
        ) from None
    defaults = asdict(Settings())
    for name in {**wanted, **settings}:
        if f"{name}_sha256" in wanted or name in (
            "batch",
            "batch_guidance",
        ):  # the same file may have another name
            continue
        was, now = (each.get(name, defaults.get(name)) for each in (settings, wanted))
        if was != now:
            raise ValueError(
                f"{output} exists, generated with other settings ({name} {was!r}, now {now!r});"
                " give another --output, or --overwrite"
            )
    return True
