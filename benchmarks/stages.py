"""What drawing in stages leaves of an image: what it shows, seams, and how sharp it is; on the
bundled model.

    python benchmarks/stages.py          (to twice the trained size, half an hour on two CPU cores)
    python benchmarks/stages.py --stages 3 --strengths 0.3 --count 8
        (to four times, a quarter of an hour)

right: percent of images that, shrunk to the trained size, the score calls right in everything.
patch seam, tile seam: the mean step from pixel to pixel across borders of patches, or of tiles,
against that elsewhere. Only plain places count, where the last stage's start is even over a patch
around; 1 is no seam. sharp: how steep outlines are against those of the same image enlarged by
Lanczos alone: sum of squared steps by sum of steps."""

import argparse
from itertools import product

import torch
import torch.nn.functional as F
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.images import to_pixels
from comfyui_l2p.l2p_core.settings import ATTENTIONS, REFINEMENTS, WHOLE
from comfyui_l2p.l2p_core.shapes.scenes import test_scenes
from comfyui_l2p.l2p_core.shapes.score import score
from comfyui_l2p.l2p_core.stages import enlarge, windows
from PIL import Image
from torch import Tensor

FAST = {"sampler": "ab2", "num_inference_steps": 16, "shift": 2.0}
EVEN = 8  # levels of 255 that a plain place may differ by
BATCH = 8


def steps_across(pixels: Tensor) -> Tensor:
    """(B, H, W - 1) size of the step from each pixel to its right neighbour, in levels."""
    return pixels.diff(dim=-1).abs().mean(1) * 127.5


def seam(pixels: Tensor, start: Tensor, borders: list[int], reach: int) -> float:
    """Steps across columns that end at `borders` against steps elsewhere, in plain places of
    `start`, both ways of the image.

    Blurred pixels of one 8-bit level count too: half a level is added to both."""
    at, elsewhere = [], []
    for image, before in ((pixels, start), (pixels.mT, start.mT)):
        low, high = (
            -F.max_pool2d(-before, 2 * reach + 1, 1, reach),
            F.max_pool2d(before, 2 * reach + 1, 1, reach),
        )
        plain = ((high - low).amax(1) * 127.5 < EVEN)[..., 1:]
        border = torch.zeros(plain.shape[-1], dtype=torch.bool)
        border[[place - 1 for place in borders]] = True
        across = steps_across(image)
        at.append(across[plain & border])
        elsewhere.append(across[plain & ~border])
    return float((torch.cat(at).mean() + 0.5) / (torch.cat(elsewhere).mean() + 0.5))


def sharpness(pixels: Tensor) -> float:
    across = steps_across(pixels)
    return float(across.square().sum() / across.sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=16, help="images (default 16)")
    parser.add_argument("--stages", type=int, default=2, help="default 2")
    parser.add_argument("--strengths", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument(
        "--shifts",
        type=float,
        nargs="*",
        default=[],
        help="of the schedule: draw without stages as well, with each",
    )
    parser.add_argument("--redraws", nargs="*", choices=REFINEMENTS, default=REFINEMENTS)
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="*",
        default=[0.0],
        help="guidance scales of the later stages; default 0, that of the first",
    )
    parser.add_argument("--attentions", nargs="*", choices=ATTENTIONS, default=[WHOLE])
    args = parser.parse_args()
    pipe = L2PPipeline.from_pretrained(torch_dtype=torch.float32)
    scenes = test_scenes(args.count)
    trained, patch = pipe.defaults.height, pipe.layout.config.patch_size
    side = trained << (args.stages - 1)

    def draw(**settings: object) -> Tensor:
        """(count, 3, H, W)."""
        drawn = []
        for first in range(0, args.count, BATCH):
            batch = scenes[first : first + BATCH]
            drawn += pipe(
                [scene.caption() for scene in batch],
                seed=list(range(first, first + len(batch))),
                **{**FAST, **settings},
            )
        return torch.cat([to_pixels(image) for image in drawn])

    def right(pixels: Tensor) -> float:
        shrunk = F.interpolate((pixels + 1) * 127.5, (trained, trained), mode="area").round().byte()
        return score([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in shrunk], scenes)[
            "right"
        ]

    first = draw()
    start = enlarge(first, side, side)
    window_borders = sorted(
        {
            edge
            for _, span in windows(side, side, trained, patch)
            for edge in (span.start, span.stop)
        }
        - {0, side}
    )
    patch_borders = sorted(set(range(patch, side, patch)) - set(window_borders))

    def row(name: str, pixels: Tensor) -> None:
        print(
            f"| {name} | {right(pixels)} | {seam(pixels, start, patch_borders, patch // 2):.2f} |"
            f" {seam(pixels, start, window_borders, patch // 2):.2f} |"
            f" {sharpness(pixels) / sharpness(start):.2f} |",
            flush=True,
        )

    print(
        f"{args.count} images, {trained} to {side} pixels\n\n| | right | patch seam | tile seam"
        " | sharp |\n|---|---|---|---|---|"
    )
    row(f"as drawn at {trained}, enlarged", start)
    for shift in args.shifts:
        row(f"drawn at {side} at once, shift {shift:g}", draw(height=side, width=side, shift=shift))
    for redraw, strength, guidance, attention in product(
        args.redraws, args.strengths, args.guidance, args.attentions
    ):
        drawn = draw(
            stages=args.stages,
            height=side,
            width=side,
            stage_strength=strength,
            redraw=redraw,
            stage_cfg_scale=guidance,
            stage_attention=attention,
        )
        name = f"{redraw}, strength {strength:g}"
        name += f", guidance {guidance:g}" if guidance else ""
        row(name + f", {attention} attention" * (attention != WHOLE), drawn)


if __name__ == "__main__":
    main()
