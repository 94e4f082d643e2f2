"""What a whole image above the trained resolution computes, for each way to refine stages.

    python benchmarks/whole_image.py
    python benchmarks/whole_image.py --size 2048 --stages 2

Operations of all steps, counted on tensors that have only a shape, and the seconds that they imply
on two cards (`roofline.py`, no measurement). The first row is the 4K model, in one stage."""

import argparse
from collections.abc import Iterator
from functools import cache

from comfyui_l2p.l2p_core.settings import INTERPOLATED, TILED, CompleteSettings
from comfyui_l2p.l2p_core.stages import Stage, plan_stages, windows
from count import NEGATIVE_PROMPT, PROMPT, Counter, ours, published_config
from roofline import CARDS, times

SHOWN = "H100 SXM", "RTX 4090"


@cache
def step(patch: int, size: int, guided: bool) -> Counter:
    """One step at that size."""
    scale = 2.0 if guided else 1.0
    return ours(published_config(patch), size, (PROMPT, NEGATIVE_PROMPT), scale)


def steps_of(plan: list[Stage], patch: int) -> Iterator[tuple[int, Counter]]:
    """How often each step is computed."""
    for stage in plan:
        tiles = windows(stage.height, stage.width, stage.window, patch)
        size = stage.window or stage.height
        yield stage.steps * len(tiles), step(patch, size, stage.cfg_scale != 1)


def row(name: str, plan: list[Stage], patch: int) -> str:
    counted = list(steps_of(plan, patch))
    operations = sum(often * each.total().flops for often, each in counted) / 1e12
    seconds = (
        sum(often * sum(times(CARDS[card], each).values()) for often, each in counted)
        for card in SHOWN
    )
    return f"| {name} | {operations:,.0f} | {' | '.join(f'{each:.0f}' for each in seconds)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="side in pixels (default 4096)")
    parser.add_argument("--stages", type=int, default=3, help="of the 1K model (default 3)")
    args = parser.parse_args()
    print(f"| {args.size} pixels | TFLOP | s, {' | s, '.join(SHOWN)} |\n|---|---|---|---|")

    def plan(trained: int, steps: int, **settings) -> list[Stage]:
        complete = CompleteSettings(
            height=args.size,
            width=args.size,
            num_inference_steps=steps,
            cfg_scale=2.0,
            **settings,
        )
        return plan_stages(complete, (trained, trained), 64)

    print(row("4K model", plan(4096, 50), 64), flush=True)
    for redraw in (INTERPOLATED, TILED):
        for scale, guidance in ((0.0, ""), (1.0, ", guidance scale 1")):
            stages = plan(1024, 30, stages=args.stages, redraw=redraw, stage_cfg_scale=scale)
            print(row(f"1K model, {redraw}{guidance}", stages, 16), flush=True)


if __name__ == "__main__":
    main()
