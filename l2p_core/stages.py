"""Pictures larger than a checkpoint was trained for: drawn at its size, then enlarged and redrawn, twice as large each time."""
import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .image import to_pictures, to_pixels
from .sampler import Velocity

STAGE_STRENGTH = 0.2
REDRAWS = SQUEEZED, WINDOWS, WHOLE = "squeezed", "windows", "whole"  # the first is what `benchmarks/stages.py` found best
OVERLAP = 4  # neighbouring windows share a quarter of their side
SMALLEST, LARGEST = 1 / 4, 2  # times the trained number of pixels that a picture is drawn at in one go
FARTHEST = 8  # times the trained side: the published table of positions ends at 512, training at 64


class Stage(NamedTuple):
    """One drawing on the way to the final size."""
    height: int
    width: int
    steps: int
    strength: float  # how far what it starts from is noised; 1 leaves nothing of it
    window: int  # side in pixels of the windows it is drawn in; 0 for the whole at once
    rope_scale: float  # of the positions of rows and columns


def plan_stages(height: int, width: int, steps: int, strength: float, stages: int, stage_strength: float, redraw: str,
                trained: tuple[int, int], multiple: int) -> list[Stage]:
    """The drawings that lead to a picture of that size, each twice as large as the one before it.

    height, width: of the last, multiples of `multiple`, as all are. steps, strength: of the first; a later one takes its
    share of the steps, `stage_strength`. redraw: how a picture of which something is left, and which is larger than the
    trained height and width, is drawn: squeezed, at once with the positions of a picture of the trained number of pixels;
    windows of the trained size; whole, at once as it is. Raises ValueError for stages below 1 or so many that the first is smaller than
    `multiple`, a stage_strength outside (0, 1] or another redraw."""
    if stages < 1 or min(height, width) < multiple << (stages - 1):
        raise ValueError(f"stages is {stages}; expected 1 to {(min(height, width) // multiple).bit_length()} for {width} x {height}, each twice "
                         f"as large as the one before it, the first at least {multiple} pixels")
    if not 0 < stage_strength <= 1:
        raise ValueError(f"stage_strength is {stage_strength}; expected above 0 and up to 1")
    if redraw not in REDRAWS:
        raise ValueError(f"redraw is {redraw!r}; expected one of {', '.join(REDRAWS)}")
    plan = []
    for times in (2**later for later in reversed(range(stages))):
        size = [round(side / times / multiple) * multiple for side in (height, width)]
        far = stage_strength if plan else strength
        larger = math.sqrt(math.prod(size) / math.prod(trained)) if far < 1 else 1.0
        plan.append(Stage(*size, max(1, round(steps * far)) if plan else steps, far,
                          max(trained) if redraw == WINDOWS and far < 1 and max(size) > max(trained) else 0,
                          1 / larger if redraw == SQUEEZED and larger > 1 else 1.0))
    return plan


def misfit(plan: list[Stage], trained: tuple[int, int]) -> str | None:
    """What is wrong with the sizes of the drawings, and what to do instead; None where nothing is.

    trained: height and width that the checkpoint was trained at."""
    first, (height, width) = plan[0], trained
    times = first.height * first.width / (height * width)
    size = f"{first.width} x {first.height} is {times:.2g} times the {width} x {height} pixels that this checkpoint was trained at"
    if first.strength == 1 and times < SMALLEST:
        return f"{size}: what it draws that small is worse. Draw at {width} x {height}, and shrink the picture"
    if first.strength == 1 and times > LARGEST:
        return f"{size}: what it draws at once repeats itself or falls apart. Draw in {round(math.log2(times) / 2) + len(plan)} stages"
    for stage in plan:
        if not stage.window and stage.rope_scale * max(stage.height / height, stage.width / width) > FARTHEST:
            return (f"{stage.width} x {stage.height}, drawn at once, is more than {FARTHEST} times as long as the {width} x {height} pixels that "
                    "this checkpoint was trained at, farther than its published table of positions goes. "
                    + ("Draw a picture nearer to a square" if stage.strength == 1 else "Redraw in windows"))
    return None


def in_windows(velocity: Velocity, window: int, step: int) -> Velocity:
    """The velocity, asked of one window at a time."""
    return lambda x, sigma: by_windows(lambda part: velocity(part, sigma), x, window, step)


def by_windows(function: Callable[[Tensor], Tensor], x: Tensor, window: int, step: int) -> Tensor:
    """`function` of a picture (B, C, H, W), each of its `windows` taken for a picture of its own.

    Where they overlap, each counts by how far inside it a pixel is (MultiDiffusion, arXiv 2302.08113, with weights that
    fall to the edge)."""
    total, weights = torch.zeros_like(x), x.new_zeros(x.shape[-2:])
    for rows, columns in windows(*x.shape[-2:], window, step):
        weight = ramp(rows.stop - rows.start, x.device)[:, None] * ramp(columns.stop - columns.start, x.device)
        total[..., rows, columns] += weight * function(x[..., rows, columns])
        weights[rows, columns] += weight
    return total / weights


def windows(height: int, width: int, window: int, step: int) -> list[tuple[slice, slice]]:
    """Rows and columns of overlapping squares of `window` pixels that cover the picture, beginning at multiples of `step`; the
    whole where window is 0."""
    def along(length: int) -> list[slice]:
        if not 0 < window < length:
            return [slice(0, length)]
        gaps = -(-(length - window) // (window - window // OVERLAP))
        starts = [round(place * (length - window) / gaps / step) * step for place in range(gaps + 1)]
        return [slice(start, start + window) for start in starts]
    return list(product(along(height), along(width)))


def ramp(length: int, device: torch.device) -> Tensor:
    """(length,): rising over a quarter to 1, and falling over the last one."""
    place = torch.arange(length, device=device)
    return (torch.minimum(place + 1, length - place) / (length // OVERLAP)).clamp(max=1)


def enlarge(pixels: Tensor, height: int, width: int) -> Tensor:
    """(B, 3, H, W) → (B, 3, height, width) by Lanczos, in levels of 255."""
    return torch.cat([to_pixels(picture.resize((width, height), Image.Resampling.LANCZOS)) for picture in to_pictures(pixels)]).to(pixels.device)
