"""Folders of images with captions → examples. What is wrong is found, by name, before training
starts.

A folder holds metadata.csv or .jsonl, or images with a caption in a .txt beside each."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition
from unicodedata import normalize

from tqdm import tqdm

from ..files.content import left_by_system
from ..images import (
    MAX_DECODED_BYTES,
    check_image,
    decoded_bytes,
    open_image,
    read_image,
    upright_size,
)
from ..settings import checked
from ..tables import read_rows, read_text
from .buckets import bucket_size, target_size, too_few
from .config import TrainConfig
from .hub import as_folder, is_dataset

METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
CAPTIONS = (".txt", ".caption")
MASK = "-masklabel"  # OneTrainer's name of the mask beside an image
PLACEHOLDER = "[trigger]"  # in captions, as in ai-toolkit
NAMED = 10  # faults that are listed one by one


@dataclass(frozen=True)
class Example:
    """One image, its captions, and the height and width it is trained at."""

    file: Path
    captions: tuple[str, ...]  # one of them is taken each time, at random
    seed: int | None  # of its paired noise
    size: tuple[int, int]
    name: str = ""  # in the metadata
    digest: str = ""  # SHA-256 of the file, the captions, the seed and the mask
    image_digest: str = ""  # SHA-256 of the file alone
    pixels: tuple[int, int] | None = None  # height and width of the file
    mask: Path | None = None  # white is trained on
    weight: float = 1.0  # of its loss
    sizes: tuple[tuple[int, int], ...] = ()  # all that it is trained at, where these are several


@dataclass(frozen=True)
class Reading:
    """How folders are read.

    caption_column: of the metadata; by default text, prompt or caption. trigger: a word that every
    caption gets. masks: look for masks. buckets: sizes are of the fixed list. resolutions: sides of
    squares; an image is trained at the area of each."""

    caption_column: str = ""
    trigger: str = ""
    masks: bool = False
    buckets: bool = False
    resolutions: tuple[int, ...] = ()


def read_examples(
    folder: Path,
    fixed: tuple[int, int] | None,
    max_pixels: int,
    multiple: int,
    progress: bool = False,
    reading: Reading = Reading(),
) -> list[Example]:
    """Return every image of a folder as an example; each file is read once to its end.

    Raises ValueError, which names what is wrong. See `scan`."""
    return read_to_end(*scan(folder, fixed, max_pixels, multiple, reading), progress)


def scan(
    folder: Path,
    fixed: tuple[int, int] | None,
    max_pixels: int,
    multiple: int,
    reading: Reading = Reading(),
) -> tuple[Path, list[Example]]:
    """Return (what names the images, an example of each), by the rows and the headers alone.

    Rows are those of the metadata: file_name or image; text, prompt or caption, in JSON also a list
    of captions; optionally seed and mask. A name is looked for in the folder, then in images/.
    Without metadata every image counts, and its caption is in the .txt of its name.
    fixed: height and width for all. max_pixels, multiple: see `target_size`. Raises ValueError,
    which names what is wrong."""
    source, rows = rows_of(folder, reading)

    def check(row: dict) -> Example | str:
        """What is cheap to check, and the size by the header alone."""
        name, seed = row.get("file_name", row.get("image")), row.get("seed")
        if not isinstance(name, str) or not name:
            return "no file_name"
        captions = captions_of(row, reading)
        if captions is None:
            return f"{name}: no caption"
        file = find_named(folder, name)
        if file is None:
            return f"{name}: no such file"
        try:
            for caption in captions:
                checked("prompt", caption)
            seed = None if seed is None else int(checked("seed", seed))
        except ValueError as error:
            return f"{name}: {error}"
        mask = find_mask(folder, file, row) if reading.masks else None
        if isinstance(mask, str):
            return f"{name}: {mask}"
        try:
            height, width = size_in_header(file)
        except (ValueError, OSError) as error:
            return f"{name}: {error}"
        size_for = bucket_size if reading.buckets else target_size
        size = fixed or size_for(height, width, max_pixels, multiple)
        if not all(size):
            return f"{name}: {width} x {height} pixels, and sides are multiples of {multiple}"
        others = [size_for(height, width, side**2, multiple) for side in reading.resolutions]
        sizes = tuple(dict.fromkeys([size, *(each for each in others if all(each))]))
        return Example(
            file, captions, seed, size, name, pixels=(height, width), mask=mask, sizes=sizes
        )

    found = [check(row) for row in rows]
    examples = [each for each in found if isinstance(each, Example)]
    raise_faults(source, [*row_faults(found), *faults_together(examples)])
    return source, examples


def read_to_end(source: Path, examples: list[Example], progress: bool) -> list[Example]:
    """Return the examples with the hashes of their files, which are read to their ends.

    source: what names them, for the message. Raises ValueError, which names what is wrong."""
    memory = Memory(MAX_DECODED_BYTES)

    def read_whole(example: Example) -> Example | str:
        """Read the files to their ends."""
        try:
            with open_image(example.file) as image:
                needed = decoded_bytes(image)
            with memory.held(needed):
                check_image(example.file)
        except (ValueError, OSError) as error:
            return f"{example.name}: {error}"
        if example.mask is not None and (fault := fault_of_mask(example)):
            return f"{example.name}: {fault}"
        return with_digests(example)

    with ThreadPoolExecutor() as readers:
        whole = list(
            tqdm(
                readers.map(read_whole, examples),
                "checking images",
                len(examples),
                disable=not progress,
            )
        )
    raise_faults(source, row_faults(whole))
    return [each for each in whole if isinstance(each, Example)]


def rows_of(folder: Path, reading: Reading) -> tuple[Path, list[dict]]:
    """Return (what names the images, a row for each). Raises ValueError."""
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is not None:
        rows = read_rows(metadata, any_column=True)
        column = reading.caption_column
        if column and not any(column in row for row in rows):
            columns = ", ".join(dict.fromkeys(str(name) for row in rows for name in row))
            raise ValueError(f"{metadata} has no column {column}; its columns are {columns}")
        return metadata, rows
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that holds images and captions")
    for place in (folder, folder / "images"):
        if rows := sidecar_rows(place):
            return place, rows
    raise ValueError(
        f"{folder} has no {METADATA[0]} or {METADATA[2]}, and no images. Make a metadata file with"
        " the columns file_name, text and, for paired noise, seed; or put a .txt with the caption"
        " beside each image"
    )


def sidecar_rows(folder: Path) -> list[dict]:
    """Return a row for each image of a folder, its caption from the .txt or .caption beside it."""
    if not folder.is_dir():
        return []
    rows = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in IMAGES or file.stem.endswith(MASK) or left_by_system(file):
            continue
        row = {"file_name": file.name}
        caption = next(
            (file.with_suffix(end) for end in CAPTIONS if file.with_suffix(end).is_file()), None
        )
        if caption is not None:
            row["text"] = read_caption(caption)
        rows.append(row)
    return rows


def read_caption(file: Path) -> str:
    """Return the caption in a file as one line. Raises ValueError."""
    return " ".join(read_text(file).split())


def captions_of(row: dict, reading: Reading) -> tuple[str, ...] | None:
    """Return the captions of a row with the trigger word; None where there is none.

    The trigger word replaces [trigger], or stands before a caption that lacks it. Alone it is the
    caption of an image that has none."""
    columns = (reading.caption_column,) if reading.caption_column else ("text", "prompt", "caption")
    caption = next((row[name] for name in columns if row.get(name) is not None), None)
    if reading.trigger and (caption is None or caption == ""):
        return (reading.trigger,)
    captions = tuple(caption) if isinstance(caption, list) else (caption,)
    if not captions or not all(isinstance(each, str) and each.strip() for each in captions):
        return None
    return tuple(with_trigger(each, reading.trigger) for each in captions)


def with_trigger(caption: str, trigger: str) -> str:
    """Return a caption that holds the trigger word."""
    if not trigger:
        return caption
    if PLACEHOLDER in caption:
        return caption.replace(PLACEHOLDER, trigger)
    return caption if trigger in caption else f"{trigger}, {caption}"


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


def find_mask(folder: Path, image: Path, row: dict) -> Path | str | None:
    """Return an image's mask, or what is wrong with its name; None where it has none.

    It is the file in the column mask, NAME-masklabel.png beside the image, or of its name in
    masks/."""
    if name := row.get("mask"):
        return find_named(folder, str(name)) or f"there is no mask {name}"
    places = (
        image.with_name(f"{image.stem}{MASK}.png"),
        folder / "masks" / f"{image.stem}.png",
        folder / "masks" / image.name,
    )
    return next((place for place in places if place.is_file()), None)


def fault_of_mask(example: Example) -> str | None:
    """Return why a mask can't be used."""
    assert example.mask is not None
    try:
        mask = read_image(example.mask).convert("L")
    except (ValueError, OSError) as error:
        return f"its mask {error}"
    assert example.pixels is not None
    height, width = example.pixels
    if abs(mask.width * height - mask.height * width) > max(mask.size) * 2:
        return f"its mask is {mask.width} x {mask.height}, and the image {width} x {height}"
    return None if mask.getextrema()[1] else "its mask is black; white is trained on"


def size_in_header(file: Path) -> tuple[int, int]:
    """Return height and width of an image as it is shown. Raises ValueError."""
    with open_image(file) as image:
        return upright_size(image)


def with_digests(example: Example) -> Example:
    """Return the example with the hashes of its contents."""
    content = sha256_of(example.file)
    image_digest = content.hexdigest()
    content.update(json.dumps([example.captions, example.seed]).encode())
    if example.mask is not None:
        content.update(example.mask.read_bytes())
    return replace(example, digest=content.hexdigest(), image_digest=image_digest)


def sha256_of(file: Path) -> "hashlib._Hash":
    """Return the SHA-256 of a file, to be updated further."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest


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


def row_faults(checked: list[Example | str]) -> list[str]:
    """Return the faults among what `check` returned, each with its row."""
    return [
        f"row {number}: {fault}"
        for number, fault in enumerate(checked, 1)
        if isinstance(fault, str)
    ]


def faults_together(examples: list[Example]) -> list[str]:
    """Return the files that are named twice, and those without a seed where others have one."""
    counts = Counter(example.file for example in examples)
    faults = [f"{file.name} is named {count} times" for file, count in counts.items() if count > 1]
    if seeds := sum(example.seed is not None for example in examples):
        faults += [
            f"{example.file.name}: no seed, but {seeds} others have one"
            for example in examples
            if example.seed is None
        ]
    return faults


def raise_faults(source: Path, faults: list[str]) -> None:
    """Raise ValueError that lists faults, if there are some."""
    if faults:
        more = f"\n... and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise ValueError(
            f"{source} has {len(faults)} faults; mend them or take the rows out:\n"
            + "\n".join(faults[:NAMED])
            + more
        )


def folders_of(
    data: tuple[str, ...], written: Path | None = None, progress: bool = False
) -> list[tuple[Path, int]]:
    """Return (folder, repeats) of FOLDER or FOLDER:REPEATS.

    A folder without images of its own stands for its subfolders called REPEATS_NAME, as kohya's
    trainers take them. A data set of Hugging Face becomes a folder in `written`; None where there
    is to be none."""
    found = []
    for given in data:
        path, _, number = given.rpartition(":")
        repeated = bool(path) and number.isascii() and number.isdigit() and not Path(given).exists()
        if repeated and not int(number):
            raise ValueError(f"data is {given!r}; expected 1 or more repeats")
        name, repeats = (path, int(number)) if repeated else (given, 1)
        if written and is_dataset(name):
            found.append((as_folder(name, written, progress), repeats))
        else:
            found += [(each, repeats * times) for each, times in subfolders(Path(name))]
    return found


def subfolders(folder: Path) -> list[tuple[Path, int]]:
    """Return the folder, or its REPEATS_NAME subfolders where it holds no images itself."""
    own = any((folder / name).is_file() for name in METADATA)
    if own or not folder.is_dir() or sidecar_rows(folder) or sidecar_rows(folder / "images"):
        return [(folder, 1)]
    numbered = [
        (each, int(match[1]))
        for each in sorted(folder.iterdir())
        if each.is_dir() and (match := re.match(r"([1-9]\d*)_", each.name))
    ]
    return numbered or [(folder, 1)]


@dataclass(frozen=True)
class Data:
    """All images of a run."""

    main: list[Example]
    repeats: list[int]  # of each of `main`, in an epoch
    regularization: list[Example]

    @property
    def examples(self) -> list[Example]:
        """Every image once."""
        return [*self.main, *self.regularization]

    def epoch(self, trained_on: list[Example]) -> list[Example]:
        """Return the examples of an epoch from those of `main` that are trained on.

        Each stands there as often as it is repeated, once for each of its sizes, and
        regularization images until there are as many."""
        times = {example.file: count for example, count in zip(self.main, self.repeats)}
        turns = range(max(self.repeats, default=0))
        once = [each for turn in turns for each in trained_on if turn < times[each.file]]
        taught = [each for example in once for each in at_its_sizes(example)]
        extra = [each for example in self.regularization for each in at_its_sizes(example)]
        count = max(len(extra), len(taught)) if extra else 0
        return taught + [extra[place % len(extra)] for place in range(count)]


def at_its_sizes(example: Example) -> list[Example]:
    """Return the example once for each size that it is trained at."""
    return [replace(example, size=size) for size in example.sizes or (example.size,)]


def read_data(
    config: TrainConfig, max_pixels: int, multiple: int, step_images: int, progress: bool
) -> Data:
    """Return the images of `config.data` and `config.regularization`.

    Rows and headers of all folders are checked before an image is read to its end.
    max_pixels, multiple: see `target_size`. step_images: images that all processes take in a batch.
    Raises ValueError that names what is wrong."""
    fixed = (config.height, config.width) if config.height else None
    buckets = config.buckets == "fixed" or (
        config.buckets == "auto" and step_images > 1 and not config.size_step
    )
    reading = Reading(
        config.caption_column, config.trigger, config.masked_loss, buckets, config.resolutions
    )
    step = config.size_step or multiple
    main = [
        (*scan(folder, fixed, max_pixels, step, reading), times)
        for folder, times in folders_of(config.data, written_to(config), progress)
    ]
    extra = [
        scan(folder, fixed, max_pixels, step, replace(reading, trigger=""))
        for folder, _ in folders_of(config.regularization, written_to(config), progress)
    ]
    scanned = Data(
        [each for _, examples, _ in main for each in examples],
        [times for _, examples, times in main for _ in examples],
        [each for _, examples in extra for each in examples],
    )
    raise_faults(Path(config.data[0]), faults_together(scanned.examples))
    check_counts(scanned, config, step_images)
    return Data(
        [each for source, found, _ in main for each in read_to_end(source, found, progress)],
        scanned.repeats,
        [
            replace(each, weight=config.regularization_weight)
            for source, found in extra
            for each in read_to_end(source, found, progress)
        ],
    )


def check_counts(data: Data, config: TrainConfig, step_images: int) -> None:
    """Raise ValueError where there are too few images, or seeds, for what is asked."""
    if config.held_out >= len(data.main):
        raise nothing_left(config.held_out, len(data.main))
    rest = data.epoch(data.main[config.held_out :])
    if len(rest) < step_images:
        raise too_few(len(rest), config.batch, step_images // config.batch)
    if config.noise == "paired" and any(each.seed is None for each in data.examples):
        raise no_seeds(config)


def no_seeds(config: TrainConfig) -> ValueError:
    """Return the error for paired noise without seeds."""
    return ValueError(
        f"noise is paired, but images in {', '.join(config.data)} have no seeds. Add a column seed,"
        " or take random noise"
    )


def nothing_left(held_out: int, count: int) -> ValueError:
    """Return the error for a validation set that takes all images."""
    return ValueError(
        f"held_out is {held_out}, and there are {count} images in all; expected fewer"
    )


def cache_folder(config: TrainConfig) -> Path:
    """Return the folder of prompt embeddings: `cache`, or encodings/ in the first data folder."""
    return Path(config.cache or folders_of(config.data, written_to(config))[0][0] / "encodings")


def written_to(config: TrainConfig) -> Path:
    """Return where data sets of Hugging Face are written as folders."""
    return Path(config.output) / "datasets"


def hold_out(examples: list[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Return (the rest, the validation set), both in their order.

    The set follows from the seed and the images' contents: names and order do not change it.
    Copies of an image stay together, so the set may be larger. Raises ValueError where nothing is
    left."""
    if not count:
        return examples, []

    def rank(example: Example) -> str:
        return hashlib.sha256(f"{seed} {example.image_digest}".encode()).hexdigest()

    ranked = sorted(rank(example) for example in examples)
    limit = ranked[min(count, len(ranked)) - 1]
    held = [example for example in examples if rank(example) <= limit]
    if len(held) == len(examples):
        raise nothing_left(count, len(examples))
    return [example for example in examples if rank(example) > limit], held
