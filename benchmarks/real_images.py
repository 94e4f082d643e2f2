"""A LoRA of real images, on the bundled model: 20 handwritten digits that scikit-learn ships.

    pip install scikit-learn
    python benchmarks/real_images.py --folder /tmp/real-images (half an hour on one CPU core)

The bundled model knows plain shapes alone, and its text encoder only words about them. So each
digit gets the caption of a shape of its own, and a LoRA is trained on two scans of each digit. Then
every caption generates eight images, before and after, from noise that training did not meet. The
judge has never seen the 20 scans: it looks for the nearest of the 1,777 others and says its digit.
real-images.png shows both scans of each digit, then two images before and two after."""

import argparse
import csv
from itertools import product
from pathlib import Path

import numpy as np
import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.shapes.scenes import PLACES, SHAPES, SIZE
from comfyui_l2p.l2p_core.train.config import TrainConfig
from comfyui_l2p.l2p_core.train.record import grid
from comfyui_l2p.l2p_core.train.run import train
from PIL import Image

DIGITS, OF_EACH, TRIES = range(10), 2, 8
CAPTIONS = [
    f"a large white {shape} on a black background, {place}"
    for place, shape in product(PLACES, SHAPES)
][: len(DIGITS)]


def scans() -> tuple[np.ndarray, np.ndarray]:
    """Return the 1,797 scans, (scans, 8, 8) of 0 to 255, and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("this benchmark needs scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    return (found.images * (255 / 16)).round().astype(np.uint8), found.target


def chosen(digits: np.ndarray) -> list[int]:
    """Return the numbers of the scans to train on: the first of each digit."""
    return [int(place) for digit in DIGITS for place in np.flatnonzero(digits == digit)[:OF_EACH]]


def enlarged(scan: np.ndarray) -> Image.Image:
    """Return a scan at the model's size."""
    return Image.fromarray(scan).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")


def write_data(folder: Path, images: list[Image.Image]) -> None:
    """Write the folder to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file_name", "text"])
        for number, image in enumerate(images):
            image.save(folder / f"{number:02}.png")
            rows.writerow([f"{number:02}.png", CAPTIONS[number // OF_EACH]])


def generate(lora: Path | None, steps: int) -> list[list[Image.Image]]:
    """Return TRIES images of each caption, of seeds that no other image has."""
    pipe = L2PPipeline.from_pretrained(device="cpu", torch_dtype=torch.float32)
    if lora is not None:
        pipe.load_lora(lora)
    return [
        [
            pipe(caption, seed=1000 + number, height=SIZE, width=SIZE, num_inference_steps=steps)
            for number in range(TRIES)
        ]
        for caption in CAPTIONS
    ]


def judged(image: Image.Image, others: np.ndarray, digits: np.ndarray) -> int:
    """Return the digit of the nearest scan."""
    small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), np.float32)
    return int(digits[np.square(others.astype(np.float32) - small).sum((1, 2)).argmin()])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200, help="of training (default 1200)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--sample-steps", type=int, default=20)
    args = parser.parse_args()
    images, digits = scans()
    taken = chosen(digits)
    enlargements = [enlarged(images[place]) for place in taken]
    others, their_digits = np.delete(images, taken, 0), np.delete(digits, taken)
    write_data(args.folder / "data", enlargements)
    train(
        TrainConfig(
            checkpoint=str(BUNDLED_MODEL / "transformer.safetensors"),
            data=(str(args.folder / "data"),),
            output=str(args.folder / "run"),
            height=SIZE,
            width=SIZE,
            lora_rank=args.rank,
            learning_rate=args.learning_rate,
            schedule="cosine",
            warmup=20,
            batch=4,
            steps=args.steps,
            caption_dropout=0.1,
            mixed_precision="no",
            checkpointing=False,
            device="cpu",
            save_every=100,
            keep=1,
        )
    )
    lora = max((args.folder / "run").glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    print("| model | judged as the digit of the caption |\n|---|---|")
    rows = [enlargements[::OF_EACH], enlargements[1::OF_EACH]]
    for name, file in (("before training", None), ("after training", lora)):
        found = generate(file, args.sample_steps)
        right = sum(
            judged(image, others, their_digits) == digit
            for digit, of_digit in enumerate(found)
            for image in of_digit
        )
        print(f"| {name} | {right} of {len(DIGITS) * TRIES} |", flush=True)
        rows += [[of_digit[number] for of_digit in found] for number in range(2)]
    grid(rows).save(args.folder / "real-images.png")


if __name__ == "__main__":
    main()
