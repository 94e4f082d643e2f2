"""The bundled small model distilled to 8 steps without guidance, and its score against its
teacher's.

    python benchmarks/distill.py --folder /tmp/distill           distil, score, draw the sheet
    python benchmarks/distill.py --folder /tmp/distill --steps 0 score what is there

Resumes an interrupted run. prompts.txt, the run and sheet.png are written to the folder."""

import argparse
import random
from pathlib import Path

import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.shapes.scenes import test_scenes, training_scenes
from comfyui_l2p.l2p_core.shapes.score import generate, score
from comfyui_l2p.l2p_core.train.distill import distill
from comfyui_l2p.l2p_core.train.distill_config import DistillConfig
from comfyui_l2p.l2p_core.train.record import grid

TEACHER = BUNDLED_MODEL / "transformer.safetensors"
ENCODER = BUNDLED_MODEL / "text_encoder"
PROMPTS = 500  # of scenes that the teacher was trained on; the score has others
SHOWN = 8  # images in a row of the sheet


def config_of(folder: Path, steps: int) -> DistillConfig:
    """Return the settings, in float32 on one core."""
    return DistillConfig(
        checkpoint=str(TEACHER),
        text_encoder=str(ENCODER),
        prompts=str(folder / "prompts.txt"),
        output=str(folder / "run"),
        steps=steps,
        batch=4,
        accumulate=2,
        freeze="",
        learning_rate=1e-4,
        warmup=10,
        ema=0.95,
        mixed_precision="no",
        device="cpu",
        checkpointing=False,
        save_every=25,
        sample_every=0,
    )


def write_prompts(file: Path) -> None:
    """Write prompts in the one form that the model reads."""
    scenes = random.Random(0).sample(training_scenes(), PROMPTS)
    file.write_text("".join(f"{scene.caption()}\n" for scene in scenes))


def newest_step(run: Path) -> Path:
    """Return the last step file of a run."""
    return max(run.glob("step-*.safetensors"), key=lambda file: int(file.stem[5:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=140, help="of training (default 140)")
    parser.add_argument("--count", type=int, default=300, help="prompts scored (default 300)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.steps:
        write_prompts(args.folder / "prompts.txt")
        distill(config_of(args.folder, args.steps))
    student = newest_step(args.folder / "run")

    scenes = test_scenes(args.count)
    prompts = [scene.caption() for scene in scenes]
    variants = {
        "teacher, 30 steps, guidance scale 2": (TEACHER, {}),
        "teacher, 8 steps, guidance scale 2": (TEACHER, {"num_inference_steps": 8}),
        "teacher, 8 steps": (TEACHER, {"num_inference_steps": 8, "cfg_scale": 1.0}),
        "student, 8 steps": (student, {}),
    }
    rows = []
    for name, (checkpoint, settings) in variants.items():
        pipe = L2PPipeline.from_pretrained(checkpoint, ENCODER, torch_dtype=torch.float32)
        images = generate(pipe, prompts, **settings)
        chosen = pipe.complete(settings)
        passes = chosen.num_inference_steps * (1 if chosen.cfg_scale == 1 else 2)
        result = score(images, scenes)
        print("|", " | ".join(map(str, (name, passes, *result.values()))), "|", flush=True)
        rows.append(images[:SHOWN])
    grid(rows).save(args.folder / "sheet.png")


if __name__ == "__main__":
    main()
