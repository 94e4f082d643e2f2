"""Score a model on prompts it was never trained on: `python -m comfyui_l2p.l2p_core.shapes.score`

Images that another program generates, such as ComfyUI, are scored in two steps. `--write-prompts
prompts.csv` writes prompts, seeds and file names; `--images FOLDER` scores the images in a folder.
"""

import argparse
import csv
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from ..files.atomic import atomic_write
from ..images import read_image
from ..pipeline import L2PPipeline
from .scenes import SIZE, Scene, judge, test_scenes

BATCH = 25


def score(images: list[Image.Image], scenes: list[Scene]) -> dict[str, float]:
    """Percent of images in which each attribute is right, the background clean, and all of them
    at once ("right")."""
    counts: Counter[str] = Counter()
    for image, scene in zip(images, scenes, strict=True):
        checks = judge(image).compare(scene)
        counts.update(name for name, passed in checks.items() if passed)
        counts["right"] += all(checks.values())
    return {
        name: round(100 * counts[name] / len(scenes), 1)
        for name in ("right", "shape", "colour", "background", "place", "size", "clean")
    }


def contact_sheet(images: list[Image.Image], captions: list[str], columns: int = 6) -> Image.Image:
    """The images in a grid, each over its caption."""
    cell_width, cell_height = SIZE + 8, SIZE + 58
    sheet = Image.new(
        "RGB", (columns * cell_width, -(-len(images) // columns) * cell_height), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = index % columns * cell_width + 4, index // columns * cell_height + 4
        sheet.paste(image, (left, top))
        lines = [""]
        for word in caption.split():
            if pen.textlength(f"{lines[-1]} {word}") > SIZE:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((left, top + SIZE + 2), "\n".join(lines), fill="black", spacing=0)
    return sheet


def generate(
    pipe: L2PPipeline, captions: list[str], progress: bool = True, **settings: Any
) -> list[Image.Image]:
    """An image for each caption, with its number as the seed. settings: as the pipeline takes
    them."""
    images: list[Image.Image] = []
    for start in tqdm(range(0, len(captions), BATCH), unit="batch", disable=not progress):
        batch = captions[start : start + BATCH]
        images += pipe(batch, seed=list(range(start, start + len(batch))), **settings)
    return images


def main() -> None:
    """Generate, judge and print the score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="default: the bundled model")
    parser.add_argument("--text-encoder", help="default: beside the checkpoint")
    parser.add_argument("--count", type=int, default=300, help="prompts (default 300)")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--sampler", help="default: the checkpoint's")
    parser.add_argument("--shift", type=float, help="default: the checkpoint's")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--write-prompts",
        type=Path,
        metavar="FILE",
        help="write the prompts as CSV and generate nothing",
    )
    parser.add_argument(
        "--images",
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="judge these images instead of generating",
    )
    parser.add_argument(
        "--sheet", type=Path, help="write the first 24 images with their captions here"
    )
    args = parser.parse_args()
    scenes = test_scenes(args.count)
    names = [f"{number:03d}.png" for number in range(len(scenes))]
    if args.write_prompts:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(
            [
                ("file_name", "prompt", "seed"),
                *(
                    (name, scene.caption(), number)
                    for number, (name, scene) in enumerate(zip(names, scenes))
                ),
            ]
        )
        with atomic_write(args.write_prompts) as stream:
            stream.write(text.getvalue().encode())
        return
    if args.images:
        images = [read_image(args.images / name).convert("RGB") for name in names]
    else:
        pipe = L2PPipeline.from_pretrained(
            args.checkpoint, args.text_encoder, torch_dtype=getattr(torch, args.dtype)
        )
        images = generate(
            pipe,
            [scene.caption() for scene in scenes],
            num_inference_steps=args.steps,
            sampler=args.sampler,
            shift=args.shift,
        )
    if args.sheet:
        with atomic_write(args.sheet) as stream:
            sheet = contact_sheet(images[:24], [scene.caption() for scene in scenes[:24]])
            sheet.save(stream, Image.registered_extensions().get(args.sheet.suffix.lower(), "PNG"))
    print(json.dumps(score(images, scenes)))


if __name__ == "__main__":
    main()
