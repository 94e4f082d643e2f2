"""The bundled small model distilled to 8 steps without guidance, and its score against its
teacher's.

    python benchmarks/distill.py --folder /tmp/distill           distil, score, draw the sheet
    python benchmarks/distill.py --folder /tmp/distill --steps 0 score what is there
    python benchmarks/distill.py --folder /tmp/distill-seen --seen --steps 800
                                            without prompts that the teacher was not trained on
    python benchmarks/distill.py --folder /tmp/distill --steps 100 --student-steps 0
                                                                 the same for the guidance alone

Resumes an interrupted run. prompts.txt, the run and sheet.png are written to the folder; those of
guidance alone are called run-0 and sheet-0.png."""

import argparse
import random
from pathlib import Path

import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.shapes.scenes import scenes, test_scenes, training_scenes
from comfyui_l2p.l2p_core.shapes.score import generate, score
from comfyui_l2p.l2p_core.train.distill import distill
from comfyui_l2p.l2p_core.train.distill_config import DistillConfig
from comfyui_l2p.l2p_core.train.record import grid

TEACHER = BUNDLED_MODEL / "transformer.safetensors"
ENCODER = BUNDLED_MODEL / "text_encoder"
SHIFT = 1.0  # equal steps: a long last step leaves noise, and low sigmas decide the outlines
GUIDANCE = 2.5  # of the teacher, whose default is 2: a student's outlines are softer
PROMPTS = 1000  # without --seen
SHOWN = 8  # images in a row of the sheet


def config_of(folder: Path, run: Path, steps: int, student_steps: int, seen: bool) -> DistillConfig:
    """Return the settings, in float32 on one core."""
    return DistillConfig(
        checkpoint=str(TEACHER),
        text_encoder=str(ENCODER),
        prompts=str(folder / "prompts.txt"),
        output=str(run),
        steps=steps,
        student_steps=student_steps,
        batch=4,
        accumulate=2,
        freeze="",
        learning_rate=1.5e-4,
        shift=SHIFT,
        teacher_guidance=GUIDANCE,
        schedule="cosine",
        warmup=10,
        ema=0.98 if seen else 0.97,  # --seen takes more steps
        mixed_precision="no",
        device="cpu",
        checkpointing=False,
        save_every=25,
        sample_every=0,
    )


def write_prompts(file: Path, seen: bool) -> None:
    """Write prompts in the one form that the model reads, in random order.

    seen: those of every scene that the teacher was trained on, and of no other. Else those of
    PROMPTS scenes, drawn from all."""
    rng, all_seen = random.Random(0), training_scenes()
    chosen = rng.sample(all_seen, len(all_seen)) if seen else rng.sample(scenes(), PROMPTS)
    file.write_text("".join(f"{scene.caption()}\n" for scene in chosen))


def newest_step(run: Path) -> Path:
    """Return the last step file of a run."""
    return max(run.glob("step-*.safetensors"), key=lambda file: int(file.stem[5:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=480, help="of training (default 480)")
    parser.add_argument(
        "--student-steps",
        type=int,
        default=8,
        help="in which the student generates (default 8); 0: as many as the teacher",
    )
    parser.add_argument(
        "--seen", action="store_true", help="distil only on prompts that the teacher was trained on"
    )
    parser.add_argument("--count", type=int, default=300, help="prompts scored (default 300)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if args.student_steps == 8 else f"-{args.student_steps}"
    run = args.folder / f"run{suffix}"
    if args.steps:
        write_prompts(args.folder / "prompts.txt", args.seen)
        distill(config_of(args.folder, run, args.steps, args.student_steps, args.seen))

    tested = test_scenes(args.count)
    prompts = [scene.caption() for scene in tested]
    variants = [(TEACHER, {}), (TEACHER, {"cfg_scale": 1.0})]
    if steps := args.student_steps:
        variants.append((TEACHER, {"num_inference_steps": steps}))
        variants.append((TEACHER, {"num_inference_steps": steps, "cfg_scale": 1.0}))
    variants.append((newest_step(run), {}))
    rows = []
    for checkpoint, settings in variants:
        pipe = L2PPipeline.from_pretrained(checkpoint, ENCODER, torch_dtype=torch.float32)
        images = generate(pipe, prompts, **settings)
        chosen = pipe.complete(settings)
        passes = chosen.num_inference_steps * (1 if chosen.cfg_scale == 1 else 2)
        who = "teacher" if checkpoint == TEACHER else f"student, {checkpoint.stem}"
        name = f"{who}, {chosen.num_inference_steps} steps, guidance scale {chosen.cfg_scale:g}"
        result = score(images, tested)
        if not rows:
            print("| model and settings | passes |", " | ".join(result), "|")
        print("|", " | ".join(map(str, (name, passes, *result.values()))), "|", flush=True)
        rows.append(images[:SHOWN])
    grid(rows).save(args.folder / f"sheet{suffix}.png")


if __name__ == "__main__":
    main()
