"""The sizes that images are trained at, and which images make a batch.

A fixed list of shapes keeps batches full: images of many shapes share few sizes."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from .dataset import Example

ASPECTS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 21 / 9)  # of landscape shapes, each also as portrait
SCALES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4)  # of the sides, for images smaller than the trained area
ENLARGE = 1.1  # an image is resized up by a tenth at most


def target_size(height: int, width: int, max_pixels: int, multiple: int) -> tuple[int, int]:
    """Height and width an image is trained at, as the published program has it: shrunk to
    `max_pixels` where it has more, then down to multiples of `multiple`. Never enlarged; 0 where a
    side is too small."""
    if height * width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        height, width = int(height / shrink), int(width / shrink)
    return height // multiple * multiple, width // multiple * multiple


def bucket_shapes(max_pixels: int, multiple: int) -> list[tuple[int, int]]:
    """Return the fixed list of (height, width): seven aspect ratios, landscape and portrait.

    Sides are multiples of `multiple`, the area is as near to `max_pixels` as they allow and never
    above."""
    cells = max_pixels // multiple**2
    shapes = set()
    for aspect in ASPECTS:
        short = next(
            (
                side
                for side in range(math.isqrt(cells), 0, -1)
                if side * round(side * aspect) <= cells
            ),
            0,
        )
        long = round(short * aspect)
        shapes |= {(short * multiple, long * multiple), (long * multiple, short * multiple)}
    return sorted(shapes)


def bucket_size(height: int, width: int, max_pixels: int, multiple: int) -> tuple[int, int]:
    """Return the shape of the fixed list that crops least of an image.

    An image too small for `max_pixels` takes a shape of the same list for 3/4, 1/2, 3/8 or 1/4 of
    the sides, so it is resized up by a tenth at most. Returns `target_size` where none is small
    enough."""
    for scale in SCALES:
        shapes = [
            (high, wide)
            for high, wide in bucket_shapes(int(max_pixels * scale**2), multiple)
            if high and max(high / height, wide / width) <= ENLARGE
        ]
        if shapes:
            return min(shapes, key=lambda shape: cropped_share((height, width), shape))
    return target_size(height, width, max_pixels, multiple)


def cropped_share(image: tuple[int, int], size: tuple[int, int]) -> float:
    """Return the share of an image, (height, width), that `crop_and_resize` to a size cuts off."""
    aspects = sorted((image[1] / image[0], size[1] / size[0]))
    return 1 - aspects[0] / aspects[1]


def crop_and_resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of the image at that size: resized to cover it (bilinear, antialiased), the rest
    cut off."""
    scale = max(width / image.width, height / image.height)
    size = round(image.width * scale), round(image.height * scale)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    # Not Image.crop, which warns of images as large as the 10K model's.
    return Image.fromarray(np.asarray(image)[top : top + height, left : left + width])


def plan_epoch(
    examples: "Sequence[Example]", batch: int, processes: int, seed: int, epoch: int
) -> list[list[int]]:
    """Return the batches of an epoch: every example once, in rows of batch * processes indices.

    A row holds images of one size as far as they go. What is left of each size shares rows, and the
    last row is completed with other images, of its sizes first. Rows do not depend on how many
    processes share them. Raises ValueError where there are fewer images than a row takes."""
    size = batch * processes
    if len(examples) < size:
        raise too_few(len(examples), batch, processes)
    rng = random.Random(f"{seed} {epoch}")
    buckets: dict[tuple[int, int], list[int]] = {}
    for index, example in enumerate(examples):
        buckets.setdefault(example.size, []).append(index)
    rows, left = [], []
    for bucket in buckets.values():
        rng.shuffle(bucket)
        whole = len(bucket) // size * size
        rows += cut(bucket[:whole], size)
        left += bucket[whole:]
    shared = cut(left, size)
    if shared:
        rows += [*shared[:-1], completed(shared[-1], size, buckets, examples)]
    rng.shuffle(rows)
    return rows


def too_few(count: int, batch: int, processes: int) -> ValueError:
    """Return the error for fewer images than a step takes."""
    return ValueError(
        f"a step takes {batch * processes} images (batch {batch}, processes {processes}), and there"
        f" are {count} to train on. Give a smaller batch, or repeats: --data FOLDER:REPEATS"
    )


def completed(
    row: list[int],
    size: int,
    buckets: dict[tuple[int, int], list[int]],
    examples: "Sequence[Example]",
) -> list[int]:
    """Return a row with so many other images that it holds `size`, those of its sizes first."""
    sizes = {examples[index].size for index in row}
    candidates = [index for each in sizes_in_order(buckets, sizes) for index in buckets[each]]
    others = [index for index in candidates if index not in row]
    full = row + others[: size - len(row)]
    return sorted(full, key=lambda index: list(buckets).index(examples[index].size))


def sizes_in_order(
    buckets: dict[tuple[int, int], list[int]], first: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return all sizes, those in `first` at the beginning."""
    return sorted(buckets, key=lambda size: size not in first)


def cut(items: list, size: int) -> list[list]:
    """Cut a list into parts of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def planned_as_before(examples: "Sequence[Example]", batch: int, processes: int) -> bool:
    """Return whether the first version of this program made the same batches.

    It filled the batches of each size with copies, so it did where nothing was to be filled, or one
    size alone by other images of it, in one process."""
    counts = Counter(example.size for example in examples)
    uneven = [count for count in counts.values() if count % (batch * processes)]
    return not uneven or len(uneven) == 1 and processes == 1 and uneven[0] >= batch


def report(examples: "Sequence[Example]", size: int, noun: str = "image") -> str:
    """Return the bucket report: images of each size, the crop, and the steps of an epoch.

    size: images that a step takes. noun: what an example is called."""
    counts = Counter(example.size for example in examples)
    lines = []
    for (height, width), count in sorted(counts.items()):
        crops = [
            cropped_share(each.pixels, each.size)
            for each in examples
            if each.size == (height, width) and each.pixels
        ]
        most = f", {100 * max(crops):.0f} % cropped at most" if crops else ""
        lines.append(f"{width} x {height}: {count} {noun}{'s' * (count > 1)}{most}")
    shared = sum(count % size for count in counts.values())
    steps = -(-len(examples) // size)
    lines.append(
        f"{len(counts)} size{'s' * (len(counts) > 1)}, {steps} batches of {size} an epoch;"
        f" {shared} {noun}s share a batch with other sizes or wrap around"
    )
    return "\n".join(lines)
