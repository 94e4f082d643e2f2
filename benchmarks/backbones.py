"""Proofs of the backbones in docs/backbones.md.

python benchmarks/backbones.py overfit --folder /tmp/overfit
    (a tiny model of --backbone with random weights over-fits four images by `l2p train`, and
    `l2p generate` generates them from noise: PSNR of each. Minutes on a CPU)
python benchmarks/backbones.py convert --folder /tmp/full
    (`l2p convert` of a full-size FLUX.2-klein of random weights: memory and time. 16 GB of disk)
python benchmarks/backbones.py cards
    (what a full-size model takes on cards of 16 and 24 GB, counted on headers)"""

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from cards import klein_config, klein_shapes, text_encoder_tensors, write_sparse
from cards import row as row_of
from comfyui_l2p.l2p_core import cli
from comfyui_l2p.l2p_core.backbones import BACKBONES, FLUX2_KLEIN, Backbone
from comfyui_l2p.l2p_core.files.load import expected_shapes
from comfyui_l2p.l2p_core.shapes.scenes import render, scenes
from PIL import Image
from transfer import open_gates, quiet_patches

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import backbones  # noqa: E402

SIDE, IMAGES = 64, 4
WIDTH = 32  # of the text encoder; at 8, prompts differ by half as much


def l2p(*arguments: object) -> None:
    """Run a command of l2p in this process."""
    command = [str(each) for each in arguments]
    print("l2p", *command, flush=True)
    if cli.main(command):
        raise SystemExit(1)


def quiet_klein() -> torch.nn.Module:
    """Return a tiny FLUX.2 that learns prompts from the first steps."""
    transformer = backbones.flux2(768, 64, (1, 2), gain=1, joint_attention_dim=3 * WIDTH)
    open_gates(transformer)
    quiet_patches(transformer)
    return transformer


def overfit(folder: Path, steps: int, row: Backbone) -> None:
    """Train on a handful of images, generate them, and print how near they come."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    model = folder / "pixel.safetensors"
    torch.manual_seed(0)
    if row is FLUX2_KLEIN:
        backbones.save_text_encoder(folder, WIDTH)
        transformer = quiet_klein()
    else:
        backbones.save_qwen_image(folder)
        transformer = backbones.qwen_image(768)
    backbones.save_with_decoder(model, row, transformer, 16)
    chosen = random.Random(0).sample(scenes(), IMAGES)
    for number, scene in enumerate(chosen):
        image = render(scene).resize((SIDE, SIDE))
        image.save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(scene.caption())
    common = ("--text-encoder", folder)
    l2p(
        *("train", "--checkpoint", model, *common, "--data", data, "--output", folder / "run"),
        *("--steps", steps, "--batch", IMAGES, "--freeze", "", "--learning-rate", 2e-3),
        *("--schedule", "cosine", "--warmup", 20, "--mixed-precision", "no", "--device", "cpu"),
        *("--timestep-sampling", "shifted", "--shift", row.shift, "--max-grad-norm", 1),
        *("--height", SIDE, "--width", SIDE, "--save-every", 200, "--sample-every", 0),
        *("--no-checkpointing", "--seed", 0),
    )
    whole = folder / "model.safetensors"
    part = folder / "run" / f"step-{steps}.safetensors"
    l2p("merge", "--trained", part, "--base", model, "-o", whole)
    for number, scene in enumerate(chosen):
        output = folder / f"{number}.png"
        l2p(
            *("generate", scene.caption(), "--checkpoint", whole, *common, "-o", output),
            *("--height", SIDE, "--width", SIDE, "--cfg-scale", 1, "--seed", 7 + number),
            *("--dtype", "float32", "--overwrite", "--device", "cpu"),
        )
        found, wanted = (
            np.asarray(Image.open(file).convert("RGB")).astype(float)
            for file in (output, data / f"{number}.png")
        )
        error = np.square(found - wanted).mean()
        print(f"PSNR {10 * np.log10(255**2 / error):5.1f} dB  {scene.caption()}", flush=True)


def tensors_of(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape), in BF16."""
    for name, shape in shapes.items():
        yield name, "BF16", shape


def convert(folder: Path) -> None:
    """Convert a full-size file, and print time and memory."""
    from files import run
    from load import make

    folder.mkdir(parents=True, exist_ok=True)
    source, output = folder / "klein.safetensors", folder / "pixel.safetensors"
    shapes = klein_shapes()
    if not source.exists():
        make(source, list(tensors_of(shapes)))
    program = [sys.executable, "-m", "comfyui_l2p.l2p_core.cli"]
    command = [*program, "convert", source, "-o", output]
    seconds, peak, status = run(command, [source], output)
    numbers = sum(int(np.prod(shape)) for shape in shapes.values())
    print(
        f"{numbers / 1e9:.2f} B parameters, {source.stat().st_size / 1e9:.2f} GB: {seconds:.0f} s,"
        f" {peak:.2f} GB of private memory at the peak, exit status {status}"
    )
    subprocess.run(
        [sys.executable, "-m", "comfyui_l2p.l2p_core.cli", "inspect", output], check=True
    )


def cards() -> None:
    """Print what generating at 1024 takes, for cards of two sizes."""
    with tempfile.TemporaryDirectory() as folder:
        model, encoder = Path(folder, "model.safetensors"), Path(folder, "encoder.safetensors")
        write_sparse(model, tensors_of(expected_shapes(klein_config())))
        write_sparse(encoder, text_encoder_tensors())
        for card in (16, 24):
            print(row_of("FLUX.2-klein, BF16", model, encoder, 1024, card), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("overfit", "convert", "cards"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "l2p-backbones"))
    parser.add_argument("--steps", type=int, default=1500, help="of overfit (default 1500)")
    parser.add_argument("--backbone", choices=BACKBONES, default=FLUX2_KLEIN.name)
    args = parser.parse_args()
    if args.what == "overfit":
        overfit(args.folder, args.steps, BACKBONES[args.backbone])
    elif args.what == "convert":
        convert(args.folder)
    else:
        cards()


if __name__ == "__main__":
    main()
