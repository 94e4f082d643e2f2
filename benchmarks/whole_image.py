"""What a whole image above the trained resolution computes, for each way to refine stages.

    python benchmarks/whole_image.py
    python benchmarks/whole_image.py --size 2048 --stages 2

Operations of all steps, counted on tensors that have only a shape, and the seconds that they imply
on two cards (`roofline.py`, no measurement). The first row is the 4K model, in one stage."""

import argparse
from collections.abc import Iterator
from functools import cache
from itertools import product

from comfyui_l2p.l2p_core.settings import INTERPOLATED, LOCAL, TILED, WHOLE, CompleteSettings
from comfyui_l2p.l2p_core.stages import Stage, plan_stages, windows
from count import NEGATIVE_PROMPT, PROMPT, Counter, ours, published_config
from roofline import CARDS, times

SHOWN = "H100 SXM", "RTX 4090"


@cache
def step(patch: int, size: int, guided: bool, neighbourhood: int) -> Counter:
    """One step at that size. neighbourhood: in tokens, or 0."""
    scale, prompts = 2.0 if guided else 1.0, (PROMPT, NEGATIVE_PROMPT)
    config = published_config(patch)
    return ours(config, size, prompts, scale, neighbourhood=neighbourhood)


def steps_of(plan: list[Stage], patch: int) -> Iterator[tuple[int, Counter]]:
    """How often each step is computed."""
    for stage in plan:
        tiles = windows(stage.height, stage.width, stage.window, patch)
        size = stage.window or stage.height
        guided, neighbourhood = stage.cfg_scale != 1, stage.neighbourhood // patch
        yield stage.steps * len(tiles), step(patch, size, guided, neighbourhood)


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
    print(
        f"| image of {args.size} x {args.size} pixels | TFLOP | s, {' | s, '.join(SHOWN)} |\n"
        "|---|---|---|---|"
    )

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
    ways = ((INTERPOLATED, WHOLE), (INTERPOLATED, LOCAL), (TILED, WHOLE))
    for (redraw, attention), scale in product(ways, (0.0, 1.0)):
        options = {"redraw": redraw, "stage_attention": attention, "stage_cfg_scale": scale}
        name = f"1K model, {redraw}{', local attention' * (attention == LOCAL)}"
        stages = plan(1024, 30, stages=args.stages, **options)
        print(row(f"{name}{', guidance scale 1' * (scale == 1)}", stages, 16), flush=True)


if __name__ == "__main__":
    main()
