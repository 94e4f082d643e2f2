"""What the small model reads, draws and betrays: its tables, printed.

    python benchmarks/small_model.py                       R(sigma) against the exact denoiser
    python benchmarks/small_model.py --score 500           full and partial prompts never trained on
    python benchmarks/small_model.py --fit 200             variety over seeds, four for each prompt
    python benchmarks/small_model.py --faults 100          the score that each fault leaves

--checkpoint and --text-encoder name another model than the bundled one, --world another world.
--complete fills in at random what a prompt leaves open before the model reads it.

R = (blind - model) / (blind - exact) in mean squared error of the x0 prediction: the share of the
readable signal that the model reads. 1 is all of it, 0 the mean image of the prompt.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.shapes import judge
from comfyui_l2p.l2p_core.shapes.exact import ExactDenoiser, Predict, readable_table
from comfyui_l2p.l2p_core.shapes.faults import FAULTS
from comfyui_l2p.l2p_core.shapes.judge import CHECKS, examine, scene_of, score
from comfyui_l2p.l2p_core.shapes.parse import complete
from comfyui_l2p.l2p_core.shapes.variety import fit
from comfyui_l2p.l2p_core.shapes.world import (
    ATTRIBUTES,
    PLACES_WORLD,
    WORLDS,
    Choice,
    Prompt,
    World,
    prompt_for,
    read_prompts,
)
from PIL import Image
from torch import Tensor
from tqdm import tqdm

LEVELS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.15)  # a / sigma
BATCH = 25


def x0_of(pipe: L2PPipeline) -> Predict:
    """Return the model's x0 prediction, without guidance."""

    @torch.no_grad()
    def predict(noisy: Tensor, sigma: Tensor, prompts: list[Prompt]) -> Tensor:
        captions = [pipe.encode_prompt(prompt.text) for prompt in prompts]
        velocity = -pipe.transformer(noisy.to(pipe.device), (1 - sigma).to(pipe.device), captions)
        return noisy - sigma[:, None, None, None] * velocity.float().cpu()

    return predict


def full_choice(rng: random.Random) -> Choice:
    return Choice((frozenset(ATTRIBUTES),), background=True)


def partial_choice(rng: random.Random) -> Choice:
    """Leave out one to three of the attributes and the background."""
    names = (*ATTRIBUTES, "background")
    named = set(names) - set(rng.sample(names, rng.randint(1, 3)))
    return Choice((frozenset(named) - {"background"},), "background" in named)


def prompts_of(
    world: World,
    count: int,
    choice: Callable[[random.Random], Choice],
    seed: int = 0,
    held_out: bool = True,
) -> list[Prompt]:
    """Draw prompts, all different, of scenes that are held out of training or not."""
    rng, prompts = random.Random(seed), {}
    while len(prompts) < count:
        prompt = prompt_for(world, world.scene(rng, held_out), rng, choice(rng))
        prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def generate(
    pipe: L2PPipeline,
    prompts: Sequence[Prompt],
    side: int,
    first_seed: int = 0,
    completed: World | None = None,
    **settings: object,
) -> list[Image.Image]:
    """One image for each prompt, its seed the prompt's number from `first_seed`.

    completed: fill in what prompts leave open, in this world's terms."""
    images = []
    for start in tqdm(range(0, len(prompts), BATCH), unit="batch", leave=False):
        texts = [prompt.text for prompt in prompts[start : start + BATCH]]
        seeds = list(range(first_seed + start, first_seed + start + len(texts)))
        if completed:
            texts = [complete(text, completed, seed) for text, seed in zip(texts, seeds)]
        images += pipe(texts, seed=seeds, height=side, width=side, **settings)
    return images


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def print_readable(pipe: L2PPipeline, world: World, count: int) -> None:
    row("a / sigma", *LEVELS)
    row("sigma", *(f"{1 / (1 + level):.3f}" for level in LEVELS))
    for kind, shares in readable_table(x0_of(pipe), ExactDenoiser(world), LEVELS, count).items():
        row(kind, *(f"{share:.2f}" for share in shares))


def print_score(pipe: L2PPipeline, world: World, count: int, settings: dict) -> None:
    row("prompts", "right", *CHECKS)
    sets = {
        "full": prompts_of(world, count, full_choice),
        "partial": prompts_of(world, count, partial_choice),
    }
    if world is PLACES_WORLD:
        sets["prompts.jsonl"] = read_prompts(Path(judge.__file__).with_name("prompts.jsonl"))
    for kind, prompts in sets.items():
        result = score(generate(pipe, prompts, world.side, **settings), prompts, world)
        row(kind, *(result.get(name, "") for name in ("right", *CHECKS)))


def print_fit(pipe: L2PPipeline, world: World, count: int, settings: dict, seeds: int = 4) -> None:
    prompts = prompts_of(world, count, partial_choice, held_out=False)
    found: list[list] = [[] for _ in prompts]
    for seed in range(seeds):
        images = generate(pipe, prompts, world.side, seed * count, **settings)
        for scenes, image, prompt in zip(found, images, prompts):
            measured = examine(image, world)
            right = all(measured.check(prompt).values())
            scenes.append(scene_of(measured) if right else None)
    result = fit(found, prompts, ExactDenoiser(world))
    for name, value in vars(result).items():
        if value is not None:
            row(name, f"{value:.3f}")
    row("outside its limit", ", ".join(result.failures()) or "nothing")


def print_faults(pipe: L2PPipeline, world: World, count: int, settings: dict) -> None:
    half = count // 2
    prompts = prompts_of(world, count - half, full_choice) + prompts_of(world, half, partial_choice)
    row("fault", "right", *CHECKS)
    for name, fault in FAULTS.items():
        with fault(pipe) as changed:
            images = generate(pipe, prompts, world.side, **{**settings, **changed})
        result = score(images, prompts, world)
        row(name, *(result.get(check, "") for check in ("right", *CHECKS)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="default: the bundled model")
    parser.add_argument("--text-encoder", help="default: beside the checkpoint")
    parser.add_argument("--world", choices=WORLDS, default="places")
    parser.add_argument("--readable", type=int, default=64, help="scenes for R (default 64)")
    parser.add_argument("--score", type=int, metavar="N", help="score N full, N partial prompts")
    parser.add_argument("--fit", type=int, metavar="N", help="test the fit on N prompts")
    parser.add_argument("--faults", type=int, metavar="N", help="score N prompts with each fault")
    parser.add_argument(
        "--complete",
        action="store_true",
        help="fill in what prompts leave open before the model reads them",
    )
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--shift", type=float, help="default: the checkpoint's")
    parser.add_argument("--sampler", help="default: the checkpoint's")
    parser.add_argument("--guidance", type=float, help="default: the checkpoint's")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    pipe = L2PPipeline.from_pretrained(  # by its file, so that prompts are read as they are
        args.checkpoint or BUNDLED_MODEL / "transformer.safetensors",
        args.text_encoder,
        torch_dtype=getattr(torch, args.dtype),
    )
    settings = {
        "num_inference_steps": args.steps,
        "shift": args.shift,
        "sampler": args.sampler,
        "cfg_scale": args.guidance,
    }
    world = WORLDS[args.world]
    if args.complete:
        settings["completed"] = world
    if args.score:
        print_score(pipe, world, args.score, settings)
    if args.fit:
        print_fit(pipe, world, args.fit, settings)
    if args.faults:
        print_faults(pipe, world, args.faults, settings)
    if not (args.score or args.fit or args.faults):
        print_readable(pipe, world, args.readable)


if __name__ == "__main__":
    main()
