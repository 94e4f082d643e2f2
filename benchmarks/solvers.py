"""How many evaluations of the model each solver needs: distance to a 400-step solution on the
bundled model.

    python benchmarks/solvers.py          (a quarter of an hour on two CPU cores)

Distance is the root mean square difference, in levels of 255, of images from the same noise, over
eight prompts."""

import random

import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.flow import SOLVERS, guided_velocity, schedule
from comfyui_l2p.l2p_core.pipeline import draw_noise
from comfyui_l2p.l2p_core.shapes.scenes import test_scenes
from tqdm import tqdm

IMAGES = 8
REFERENCE_STEPS = 400
STEPS = (6, 8, 10, 12, 14, 16, 18, 20, 24, 30, 50)
SHIFTS = (3.0, 2.0)  # the published one first


def main() -> None:
    pipe = L2PPipeline.from_pretrained(torch_dtype=torch.float32)
    scenes = random.Random(1).sample(test_scenes(), IMAGES)
    captions = [pipe.encode_prompt(scene.caption()) for scene in scenes]
    velocity = guided_velocity(
        pipe.transformer, captions, [pipe.encode_prompt("")] * IMAGES, pipe.defaults.cfg_scale
    )
    noise = draw_noise((IMAGES, 3, pipe.defaults.height, pipe.defaults.width), 0).to(pipe.device)

    def solution(name: str, shift: float, steps: int) -> torch.Tensor:
        return SOLVERS[name](velocity, noise, schedule(steps, shift=shift))

    reference = solution("euler", SHIFTS[0], REFERENCE_STEPS)
    ways = [(name, shift) for name in SOLVERS for shift in SHIFTS]
    table = {
        (*way, steps): float((solution(*way, steps) - reference).square().mean().sqrt() * 127.5)
        for way in ways
        for steps in tqdm(STEPS, desc=f"{way[0]}, shift {way[1]:g}")
    }
    print(
        "| evaluations |",
        " | ".join(f"{name}, shift {shift:g}" for name, shift in ways),
        "|\n|---|" + "---|" * len(ways),
    )
    for steps in STEPS:
        print(f"| {steps} |", " | ".join(f"{table[(*way, steps)]:.2f}" for way in ways), "|")
    bar = table["euler", SHIFTS[0], 30]
    for name, shift in ways:
        print(
            f"{name} of shift {shift:g} reaches the distance of euler at 30 ({bar:.2f}) in"
            f" {min((steps for steps in STEPS if table[name, shift, steps] <= bar), default=None)}"
            " evaluations"
        )


if __name__ == "__main__":
    main()
