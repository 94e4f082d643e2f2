"""A folder of pictures with captions → batches: what is wrong is found, by name, before training
starts.

Which examples make batch number n, and every draw in it, follow from the seed and n alone, so a run
goes on anywhere."""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import cycle, islice
from pathlib import Path
from threading import Condition
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ..files.atomic import atomic_write, remove_leftovers
from ..files.header import CheckpointError, hash_files
from ..files.save import save_tensors
from ..flow import training_sigmas
from ..images import (
    MAX_DECODED_BYTES,
    check_image,
    decoded_bytes,
    open_image,
    read_image,
    to_pixels,
)
from ..pipeline import L2PPipeline, draw_noise
from ..settings import checked
from ..tables import read_rows
from ..text import LAYER, MAX_TOKENS, TEMPLATE, encoder_files, find_tokenizer
from .config import TrainConfig

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.json")
NAMED = 10  # faults that are listed one by one


@dataclass(frozen=True)
class Example:
    """One picture, its captions, and the height and width it is trained at."""

    file: Path
    captions: tuple[str, ...]  # one of them is drawn each time
    seed: int | None  # of its paired noise
    size: tuple[int, int]
    name: str = ""  # in the metadata
    digest: str = ""  # SHA-256 of the file, the captions and the seed


@dataclass(frozen=True)
class Batch:
    """What one pass takes: B pictures of one size."""

    pictures: Tensor  # (B, 3, H, W) in [-1, 1]
    captions: list[Tensor]  # B of (L, cap_feat_dim)
    noise: Tensor  # (B, 3, H, W)
    sigma: Tensor  # (B,)


def read_examples(
    folder: Path,
    fixed: tuple[int, int] | None,
    max_pixels: int,
    multiple: int,
    progress: bool = False,
) -> list[Example]:
    """Every row of the folder's metadata as an example, each picture read once to its end.

    Columns: file_name or image; text or prompt, in JSON also a list of captions; seed may be left
    out. A name is looked for in the folder, then in images/. fixed: height and width for all.
    max_pixels, multiple: see `target_size`. Raises ValueError, which names what is wrong."""
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is None:
        raise ValueError(
            f"{folder} has no {METADATA[0]} or {METADATA[1]}. Make one with the columns file_name,"
            " text and, for paired noise, seed"
        )
    rows = read_rows(metadata, any_column=True)
    memory = Memory(MAX_DECODED_BYTES)

    def check(row: dict) -> Example | str:
        name, caption, seed = (
            row.get("file_name", row.get("image")),
            row.get("text", row.get("prompt")),
            row.get("seed"),
        )
        if not isinstance(name, str) or not name:
            return "no file_name"
        captions = tuple(caption) if isinstance(caption, list) else (caption,)
        if not captions or not all(isinstance(each, str) and each.strip() for each in captions):
            return f"{name}: no caption"
        file = find_named(folder, name)
        if file is None:
            return f"{name}: no such file"
        try:
            for each in captions:
                checked("prompt", each)
            seed = None if seed is None else int(checked("seed", seed))
        except ValueError as error:
            return f"{name}: {error}"
        try:
            with open_image(file) as image:
                needed = decoded_bytes(image)
            with memory.held(needed):
                height, width = check_image(file)
            digest = sha256_of(file)
        except (ValueError, OSError) as error:
            return f"{name}: {error}"
        size = fixed or target_size(height, width, max_pixels, multiple)
        if not all(size):
            return f"{name}: {width} x {height} pixels, and sides are multiples of {multiple}"
        digest.update(json.dumps([captions, seed]).encode())
        return Example(file, captions, seed, size, name, digest.hexdigest())

    with ThreadPoolExecutor() as readers:
        found = list(
            tqdm(readers.map(check, rows), "checking pictures", len(rows), disable=not progress)
        )
    faults = [
        f"row {number}: {fault}" for number, fault in enumerate(found, 1) if isinstance(fault, str)
    ]
    examples = [example for example in found if isinstance(example, Example)]
    faults += [
        f"{file.name} is named {count} times"
        for file, count in Counter(example.file for example in examples).items()
        if count > 1
    ]
    if seeds := sum(example.seed is not None for example in examples):
        faults += [
            f"{example.file.name}: no seed, but {seeds} others have one"
            for example in examples
            if example.seed is None
        ]
    if faults:
        more = f"\n... and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise ValueError(
            f"{metadata} has {len(faults)} faults; mend them or take the rows out:\n"
            + "\n".join(faults[:NAMED])
            + more
        )
    return examples


class Memory:
    """So many bytes, which threads share."""

    def __init__(self, total: int):
        self.total = self.free = total
        self.changed = Condition()

    @contextmanager
    def held(self, count: int) -> Iterator[None]:
        """Hold this many bytes, or all of them where it is more, once they are free."""
        count = min(count, self.total)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= count)
            self.free -= count
        try:
            yield
        finally:
            with self.changed:
                self.free += count
                self.changed.notify_all()


def find_named(folder: Path, name: str) -> Path | None:
    """Return the file that metadata names, in the folder or in its images/; None without one.

    Names may come from another operating system: with backslashes, or with accents as one character
    (NFC) or two (NFD)."""
    spellings = [name, name.replace("\\", "/")]
    spellings += [normalize(form, each) for each in spellings for form in ("NFC", "NFD")]
    for each in dict.fromkeys(spellings):
        for place in (folder / each, folder / "images" / each):
            try:
                if place.is_file():
                    return place
            except (OSError, ValueError):  # a name that no file can have
                continue
    return None


def sha256_of(file: Path) -> "hashlib._Hash":
    """Return the SHA-256 of a file, to be updated further."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest


def target_size(height: int, width: int, max_pixels: int, multiple: int) -> tuple[int, int]:
    """Height and width a picture is trained at, as the published program has it: shrunk to
    `max_pixels` where it has more, then down to multiples of `multiple`. Never enlarged; 0 where a
    side is too small."""
    if height * width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        height, width = int(height / shrink), int(width / shrink)
    return height // multiple * multiple, width // multiple * multiple


def crop_and_resize(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of the picture at that size: resized to cover it (bilinear, antialiased), the rest
    cut off."""
    scale = max(width / picture.width, height / picture.height)
    size = round(picture.width * scale), round(picture.height * scale)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    # Not Image.crop, which warns of images as large as the 10K model's.
    return Image.fromarray(np.asarray(picture)[top : top + height, left : left + width])


def hold_out(examples: list[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(the rest, in their order; so many, drawn by the seed). Raises ValueError where nothing is
    left."""
    if count >= len(examples):
        raise ValueError(
            f"held_out is {count}, and there are {len(examples)} pictures in all; expected fewer"
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    return (
        [example for number, example in enumerate(examples) if number not in chosen],
        [example for number, example in enumerate(examples) if number in chosen],
    )


class Encodings:
    """Captions as the text encoder gives them, one file each, in a folder that outlives the run.

    A file's name follows from the caption and from what encoded it, so another encoder never meets
    them."""

    def __init__(self, folder: Path, pipe: L2PPipeline):
        self.folder, self.pipe = folder, pipe
        path = pipe.text_encoder_path
        described = [
            file
            for folder in (path, find_tokenizer(path, pipe.tokenizer_path))
            for pattern in ("*.json", "merges.txt")
            for file in sorted(folder.glob(pattern))
        ]
        self.maker = {
            "text_encoder_sha256": hash_files(encoder_files(path)),
            "tokenizer_and_config_sha256": hash_files(described),
            "dtype": str(pipe.dtype),
            "template": TEMPLATE,
            "layer": str(LAYER),
            "max_tokens": str(MAX_TOKENS),
        }

    def add(self, captions: list[str], progress: bool = False) -> None:
        """Encode and store those that are not there, then take the encoder out of memory."""
        missing = [
            caption for caption in dict.fromkeys(captions) if not self.file(caption).exists()
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        for caption in tqdm(missing, "encoding captions", disable=not progress or not missing):
            features = self.pipe.text_encoder.encode(caption).cpu()
            with atomic_write(self.file(caption), clean=False) as stream:
                save_tensors(stream, {"features": features}, {"caption": caption, **self.maker})
        self.pipe.unload_text_encoder()

    def __getitem__(self, caption: str) -> Tensor:
        """(L, cap_feat_dim). Raises CheckpointError where the file is damaged."""
        file, width = self.file(caption), self.pipe.layout.config.cap_feat_dim
        try:
            features = load_file(file)["features"]
            if (
                features.dim() != 2
                or features.shape[1] != width
                or not 1 <= len(features) <= MAX_TOKENS
            ):
                raise ValueError(
                    f"it is {tuple(features.shape)}, expected (1 to {MAX_TOKENS}, {width})"
                )
            return features
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} can't be read ({error}). Delete it, and it is made again"
            ) from None

    def file(self, caption: str) -> Path:
        """Where a prompt's embeddings are kept."""
        digest = hashlib.sha256(json.dumps([caption, self.maker]).encode()).hexdigest()
        return self.folder / f"{digest[:40]}.safetensors"


class Batches:
    """The endless row of batches of a run; batch n is the same whenever it is asked for.

    processes, rank: a batch of `config.batch` for each process, cut from one of `size`, as large as
    all together."""

    def __init__(
        self,
        examples: list[Example],
        encodings: Encodings,
        config: TrainConfig,
        patch_size: int,
        processes: int = 1,
        rank: int = 0,
    ):
        paired = (
            config.noise == "paired"
            or config.noise == "auto"
            and patch_size == 16
            and examples[0].seed is not None
        )
        if paired and examples[0].seed is None:
            raise ValueError(
                f"noise is paired, but the pictures in {config.data} have no seeds. Add a column"
                " seed, or take random noise"
            )
        self.examples, self.encodings, self.config, self.patch_size, self.paired = (
            examples,
            encodings,
            config,
            patch_size,
            paired,
        )
        self.size, self.own = (
            processes * config.batch,
            slice(rank * config.batch, (rank + 1) * config.batch),
        )
        self._epoch = lru_cache(maxsize=2)(
            partial(plan_epoch, examples, config.batch, processes, config.seed)
        )
        self.per_epoch = len(self._epoch(0))

    def __getitem__(self, number: int) -> Batch:
        config = self.config
        order = self._epoch(number // self.per_epoch)[number % self.per_epoch]
        generator = self.generator(number)
        sigma = training_sigmas(
            self.size, config.timestep_sampling, config.shift, self.patch_size, generator
        )
        dropped = torch.rand(self.size, generator=generator) < config.caption_dropout
        picks = torch.rand(self.size, generator=generator)
        examples = [self.examples[index] for index in order[self.own]]
        height, width = examples[0].size
        return Batch(
            torch.cat(
                [
                    to_pixels(
                        crop_and_resize(
                            read_image(example.file, config.background).convert("RGB"),
                            height,
                            width,
                        )
                    )
                    for example in examples
                ]
            ),
            [
                self.encodings["" if drop else example.captions[int(pick * len(example.captions))]]
                for example, drop, pick in zip(examples, dropped[self.own], picks[self.own])
            ],
            draw_noise(
                (len(examples), 3, height, width),
                [
                    self._noise_seed(number, place, example)
                    for place, example in enumerate(examples, self.own.start)
                ],
            ),
            sigma[self.own],
        )

    def _noise_seed(self, number: int, place: int, example: Example) -> int:
        """The seed of the noise that an example meets at one place of one batch."""
        if not self.paired:
            return self.generator(number, place).initial_seed()
        assert example.seed is not None  # of all examples or of none, and the first has one
        return example.seed

    def generator(self, *number: int) -> torch.Generator:
        """For the draws of one batch, or of one place in it."""
        digest = hashlib.sha256(repr((self.config.seed, *number)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def plan_epoch(
    examples: list[Example], batch: int, processes: int, seed: int, epoch: int
) -> list[list[int]]:
    """Every example once, in rows of a batch for each process, and each batch of one picture size.

    What is left of a size after whole rows is cut into batches, the last filled up from the size's
    first; and such batches, of any sizes, make rows, the last filled up from theirs."""
    rng = random.Random(f"{seed} {epoch}")
    buckets: dict[tuple[int, int], list[int]] = {}
    for index, example in enumerate(examples):
        buckets.setdefault(example.size, []).append(index)
    rows, left = [], []
    for bucket in buckets.values():
        rng.shuffle(bucket)
        whole = len(bucket) // (batch * processes) * batch * processes
        rows += cut(bucket[:whole], batch * processes)
        left += cut(filled(bucket[whole:], batch, bucket), batch)
    rows += [sum(row, []) for row in cut(filled(left, processes, left), processes)]
    rng.shuffle(rows)
    return rows


def cut(items: list, size: int) -> list[list]:
    """Cut a list into parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def filled(items: list, size: int, more: list) -> list:
    """The items, and as many of `more`, from its first on and around, as make a multiple of
    `size`."""
    return items + list(islice(cycle(more), -len(items) % size))
