"""Images above the trained resolution: generated at it, then resized and refined, twice as large
each time."""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .flow import Velocity
from .images import to_images, to_pixels
from .settings import INTERPOLATED, LOCAL, TILED, CompleteSettings

OVERLAP = 4  # neighbouring windows share a quarter of their side
SMALLEST, LARGEST = (
    1 / 4,
    2,
)  # times the trained number of pixels that one pass generates
FARTHEST = 8  # times the trained side: the published table of positions ends at 512, training at 64


class Stage(NamedTuple):
    """One generation on the way to the final size."""

    height: int
    width: int
    steps: int
    strength: float  # denoising strength; 1 keeps nothing of what it starts from
    window: int  # side in pixels of the tiles it is generated in; 0 for the whole image at once
    rope_scale: float  # RoPE interpolation factor of rows and columns
    cfg_scale: float  # guidance scale; 1 is no guidance
    neighbourhood: int  # side in pixels that patches attend within; 0 for the whole image


def plan_stages(settings: CompleteSettings, trained: tuple[int, int], multiple: int) -> list[Stage]:
    """Return the stages that lead to an image of the settings' size, each twice as large as the one
    before it.

    A later stage takes its share of the settings' steps, `stage_strength`, and a guidance scale of
    its own where one is set. trained: height and width of the trained resolution. multiple: what
    every height and width is a multiple of. Raises ValueError for so many stages that the first
    would be smaller than `multiple`."""
    height, width, count = settings.height, settings.width, settings.stages
    if min(height, width) < multiple << (count - 1):
        most = (min(height, width) // multiple).bit_length()
        raise ValueError(
            f"stages is {count}; expected 1 to {most} for {width} x {height}: each is twice as"
            f" large as the one before it, and the first is at least {multiple} pixels"
        )
    plan: list[Stage] = []
    for times in (2**later for later in reversed(range(count))):
        size = [round(side / times / multiple) * multiple for side in (height, width)]
        strength = settings.stage_strength if plan else settings.denoising_strength
        steps = (
            max(1, round(settings.num_inference_steps * strength))
            if plan
            else settings.num_inference_steps
        )
        refines = (
            strength < 1
        )  # something of what it starts from is kept, so its composition is given
        cfg_scale = settings.stage_cfg_scale if plan else 0
        above = math.sqrt(math.prod(size) / math.prod(trained)) if refines else 1.0
        tiled = settings.redraw == TILED and refines and max(size) > max(trained)
        local = settings.stage_attention == LOCAL and above > 1 and not tiled
        interpolated = settings.redraw == INTERPOLATED and above > 1
        plan.append(
            Stage(
                size[0],
                size[1],
                steps,
                strength,
                max(trained) if tiled else 0,
                1 / above if interpolated else 1.0,
                cfg_scale or settings.cfg_scale,
                max(trained) if local else 0,
            )
        )
    return plan


def run_stages(
    plan: list[Stage],
    generate: Callable[[Stage, Tensor | None, Tensor | None, Tensor | None], Tensor],
    image: Callable[[Stage], Tensor] | None = None,
    mask: Callable[[Stage], Tensor] | None = None,
) -> Tensor:
    """Generate stage by stage, each from the one before it, resized to its size.

    generate: (stage, start, image, mask) → (B, 3, h, w) in about [-1, 1]. start is None for pure
    noise; image and mask are None without a mask. image: stage → the input image at its size, (B or
    1, 3, h, w). mask: stage → (B or 1, 1, h, w), 1 where pixels are generated. Raises ValueError
    where an image comes out as NaN."""
    x = None
    for stage in plan:
        given = None if image is None else image(stage)
        hole = None if mask is None else mask(stage)
        kept = None if hole is None else given
        x = generate(stage, _start(x, stage, given, hole), kept, hole)
        if not x.isfinite().all():
            raise ValueError(
                "the image came out as NaN: the model's numbers overflow in this dtype, or its file"
                " is damaged. Try bfloat16, or float32 on a card without it"
            )
    return x


def _start(
    x: Tensor | None, stage: Stage, image: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """What a stage starts from: the stage before it, else the input image, whose pixels stay
    outside of the mask."""
    start = image if x is None else enlarge(x, stage.height, stage.width)
    return start if mask is None else mask * start + (1 - mask) * image


def misfit(plan: list[Stage], trained: tuple[int, int]) -> str | None:
    """What is wrong with the sizes of the drawings, and what to do instead; None where nothing is.

    trained: height and width that the checkpoint was trained at."""
    first, (height, width) = plan[0], trained
    times = first.height * first.width / (height * width)
    size = (
        f"{first.width} x {first.height} is {times:.2g} times the {width} x {height} pixels that"
        " this checkpoint was trained at"
    )
    if first.strength == 1 and times < SMALLEST:
        return (
            f"{size}: images that small are worse. Generate at {width} x {height}, and shrink the"
            " image"
        )
    if first.strength == 1 and times > LARGEST:
        return (
            f"{size}: in one pass the image repeats itself or falls apart. Generate in"
            f" {round(math.log2(times) / 2) + len(plan)} stages"
        )
    for stage in plan:
        if (
            not stage.window
            and stage.rope_scale * max(stage.height / height, stage.width / width) > FARTHEST
        ):
            return (
                f"{stage.width} x {stage.height} in one pass is more than {FARTHEST} times as"
                f" long as the {width} x {height} pixels that this checkpoint was trained at,"
                " farther than its published table of positions goes. "
                + (
                    "Generate an image nearer to a square"
                    if stage.strength == 1
                    else "Set redraw to tiled"
                )
            )
    return None


def in_windows(velocity: Velocity, window: int, step: int) -> Velocity:
    """The velocity, asked of one window at a time."""
    return lambda x, sigma: by_windows(lambda part: velocity(part, sigma), x, window, step)


def by_windows(function: Callable[[Tensor], Tensor], x: Tensor, window: int, step: int) -> Tensor:
    """`function` of an image (B, C, H, W), each of its `windows` taken for an image of its own.

    Where they overlap, each counts by how far inside it a pixel is (MultiDiffusion, arXiv
    2302.08113, with weights that fall to the edge)."""
    total, weights = torch.zeros_like(x), x.new_zeros(x.shape[-2:])
    height, width = x.shape[-2:]
    for rows, columns in windows(height, width, window, step):
        weight = ramp(rows.stop - rows.start, x.device)[:, None] * ramp(
            columns.stop - columns.start, x.device
        )
        total[..., rows, columns] += weight * function(x[..., rows, columns])
        weights[rows, columns] += weight
    return total / weights


def windows(height: int, width: int, window: int, step: int) -> list[tuple[slice, slice]]:
    """Rows and columns of overlapping squares of `window` pixels that cover the image, beginning
    at multiples of `step`; the whole where window is 0."""

    def along(length: int) -> list[slice]:
        if not 0 < window < length:
            return [slice(0, length)]
        gaps = -(-(length - window) // (window - window // OVERLAP))
        starts = [
            round(place * (length - window) / gaps / step) * step for place in range(gaps + 1)
        ]
        return [slice(start, start + window) for start in starts]

    return list(product(along(height), along(width)))


def ramp(length: int, device: torch.device) -> Tensor:
    """(length,): rising over a quarter to 1, and falling over the last one."""
    place = torch.arange(length, device=device)
    return (torch.minimum(place + 1, length - place) / (length // OVERLAP)).clamp(max=1)


def enlarge(pixels: Tensor, height: int, width: int) -> Tensor:
    """(B, 3, H, W) → (B, 3, height, width) by Lanczos, in levels of 255."""
    return torch.cat(
        [
            to_pixels(image.resize((width, height), Image.Resampling.LANCZOS))
            for image in to_images(pixels)
        ]
    ).to(pixels.device)
