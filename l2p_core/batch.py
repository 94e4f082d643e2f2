"""Many prompts to image files, resumable and over several processes: `l2p generate`."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from threading import Event

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .attention import SAGE
from .devices import free_memory
from .files.atomic import WAIT, locked, process_rank
from .files.header import hash_files
from .flow import Callback as FlowCallback
from .images import (
    BACKGROUND,
    PNG_KEY,
    is_whole_png,
    mask_levels,
    open_image,
    read_image,
    save_image,
)
from .outputs import output_files
from .pipeline import L2PPipeline, check_mask
from .settings import MAX_BATCH, CompleteSettings, Settings, checked, current_word
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


INPUTS = ("input_image", "inpaint_mask")  # settings that name a file


def plan(
    rows: list[dict], settings: dict, count: int, output: Path, pipe: L2PPipeline
) -> list[Job]:
    """Return every image to generate, its settings checked and complete.

    rows: of a prompt file, see `tables.COLUMNS`. settings: for what a row leaves out; None for the
    checkpoint's default. count: images for each row, with seeds one apart. output: a .png for one
    image, a folder for several. Raises ValueError, with the row's number, for a row, a setting or
    an output that does not fit."""
    look = lru_cache(4)(read_inputs)
    jobs = []
    for number, (row, files) in enumerate(zip(rows, output_files(rows, count, output))):
        row = {
            name: value for name, value in row.items() if value is not None and name != "file_name"
        }
        row["prompt"] = row.pop("text", row.get("prompt", ""))
        values = {**{name: value for name, value in settings.items() if value is not None}, **row}
        try:
            image_file, mask_file = (str(checked(each, values.get(each, ""))) for each in INPUTS)
            check_mask(mask_file, image_file)
            image = look(image_file, mask_file) if image_file else None
            complete = pipe.complete(values, image)
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


def generate(
    jobs: list[Job],
    pipe: L2PPipeline,
    batch: int = 1,
    free_text_encoder: bool | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Generate and write the images that do not exist yet, `batch` at a time, each file atomically.

    free_text_encoder: encode all prompts first, then free the encoder's memory; None to do so only
    if the device's memory needs it. overwrite: generate all. progress: show a bar. Raises
    ValueError, before anything is generated, where an image exists with other settings, and
    AlreadyRunning where another run still writes there after `WAIT` seconds."""
    check_batch(batch)
    if not jobs:
        return
    with (
        lock_outputs([job.output for job in jobs]),
        closing(Records(pipe, batch)) as records,
    ):
        missing = missing_jobs(jobs, records, overwrite)
        if not missing:
            return
        if free_memory(pipe.device) is not None:  # on a CPU nothing is to be chosen
            placement = pipe.place(largest_of(missing), batch, free_text_encoder)
            free_text_encoder = placement.free_text_encoder
            pipe.adopt(placement)
            print(f"Memory: {placement.reason}")
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
                images = generate_batch(
                    group, pipe, encode, input_images(group), partial(_advance, bar, len(group))
                )
                for job, image in zip(group, images, strict=True):
                    save_image(image, job.output, records.of(job))
                bar.update(len(group))


class Records:
    """What the PNGs of one run carry. The files behind it are hashed once, in another thread, so
    that sampling need not wait for them."""

    def __init__(self, pipe: L2PPipeline, batch: int):
        encoder = encoder_files(pipe.text_encoder_path)  # raises where there is none
        self._pipe, self._batch, self._stop = pipe, batch, Event()
        self._beside = beside = ThreadPoolExecutor(1)  # hashing leaves the interpreter free
        self._checkpoint = beside.submit(hash_files, pipe.layout.files, self._stop)
        self._encoder = beside.submit(hash_files, encoder, self._stop)
        self._loras = [
            beside.submit(hash_files, lora.layout.files, self._stop) for lora in pipe.loras
        ]
        self._hash_once = cache(
            lambda file: hash_files([Path(file)], self._stop)
        )  # an input image may serve thousands

    def of(self, job: Job, hashes: dict[str, str] | None = None) -> dict:
        """Return what the PNG of a job carries. hashes: those of its input files, where they are
        on another machine."""
        return image_record(
            job,
            self._pipe,
            self._batch,
            self._checkpoint.result(),
            self._encoder.result(),
            self.input_hashes(job) if hashes is None else hashes,
            [each.result() for each in self._loras],
        )

    def input_hashes(self, job: Job) -> dict[str, str]:
        """Return the SHA-256 of input_image and inpaint_mask, where there are such."""
        return {
            name: self._hash_once(file) for name in INPUTS if (file := getattr(job.settings, name))
        }

    def close(self) -> None:
        """Stop hashing."""
        self._stop.set()
        self._beside.shutdown()


def missing_jobs(jobs: list[Job], records: Records, overwrite: bool) -> list[Job]:
    """Return the jobs whose images do not exist yet, or all to overwrite them. Raises ValueError
    where an image exists with other settings."""
    missing = [
        job
        for job in jobs
        if overwrite or not job.output.exists() or not is_generated(job.output, records.of(job))
    ]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} images exist already")
    return missing


def input_images(group: list[Job]) -> dict[str, Image.Image]:
    """Return the images input_image and inpaint_mask of a batch, where there are such."""
    return {name: read_input(name, file) for name in INPUTS if (file := group[0].shared[name])}


def read_inputs(image_file: str, mask_file: str) -> Image.Image:
    """Return the input image, once it and its mask, if any, are found usable. Raises ValueError."""
    image = read_input("input_image", image_file)
    if mask_file:
        mask_levels(read_input("inpaint_mask", mask_file), image)
    return image


def read_input(name: str, file: str) -> Image.Image:
    """Return the image of one of `INPUTS`; a mask keeps its transparency. Raises ValueError."""
    return read_image(file, None if name == "inpaint_mask" else BACKGROUND)


def largest_of(jobs: list[Job]) -> CompleteSettings:
    """Return the settings of the largest image."""
    return max(
        (job.settings for job in jobs), key=lambda settings: settings.height * settings.width
    )


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
    for name in INPUTS:
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
    lora_hashes: list[str],
) -> dict:
    """Return what a PNG carries of its image: the settings, and what else decides its pixels.

    input_hashes: SHA-256 of input_image and inpaint_mask, where there are such. lora_hashes:
    SHA-256 of each of the pipeline's LoRAs."""
    facts = asdict(job.settings)
    for name, digest in input_hashes.items():  # store the hash, not the local path
        facts[f"{name}_sha256"] = digest
        facts[name] = Path(facts[name]).name
    if job.prompt != job.settings.prompt:
        facts["completed_prompt"] = job.prompt
    if pipe.loras:
        facts["lora"] = [lora.layout.path.name for lora in pipe.loras]
        facts["lora_sha256"] = lora_hashes
        facts["lora_strength"] = [lora.strength for lora in pipe.loras]
    if pipe.attention == SAGE:  # the others differ by rounding
        facts["attention"] = pipe.attention
    if pipe.fp8:
        facts["fp8"] = True
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


def check_batch(batch: int) -> None:
    """Raise ValueError for a number of images at a time that makes no sense."""
    if batch < 1:
        raise ValueError(f"--batch is {batch}; expected 1 or more")
    if batch > MAX_BATCH:
        raise ValueError(f"--batch is {batch}; expected at most {MAX_BATCH}")


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


def batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    """Runs of neighbouring images that can be generated together, `size` at most."""
    for _, run in groupby(jobs, key=lambda job: job.shared):
        while group := list(islice(run, size)):
            yield group


def is_generated(output: Path, wanted: dict) -> bool:
    """Return True where the file has the settings wanted, and False where it has them and is torn.
    Raises ValueError where it has others, or none.

    Settings that an older program did not record have their defaults there. How many images were
    generated together changes only their last bits, so it may differ."""
    try:
        with open_image(output, ("PNG",)) as there:
            settings = dict(json.loads(there.info[PNG_KEY]))
            whole = is_whole_png(there)
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
        was, now = (
            current_word(name, each.get(name, defaults.get(name))) for each in (settings, wanted)
        )
        if was != now:
            raise ValueError(
                f"{output} exists, generated with other settings ({name} {was!r}, now {now!r});"
                " give another --output, or --overwrite"
            )
    if not whole:
        warnings.warn(f"{output} is torn and is generated again", stacklevel=2)
    return whole
