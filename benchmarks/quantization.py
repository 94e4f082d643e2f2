"""What quantizing costs in images: the small model in each format against bfloat16, with the same
prompts and noise.

    python benchmarks/quantization.py --count 300          (a quarter of an hour on two CPU cores)

All linears of the blocks are quantized. PSNR is over all images, with 255 as the peak; "right" is
the score's."""

import argparse
import tempfile
from pathlib import Path

import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.evaluate.metrics import psnr_of, squared_error
from comfyui_l2p.l2p_core.files.quantization import FORMATS
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.shapes.scenes import test_scenes
from comfyui_l2p.l2p_core.shapes.score import generate, score
from comfyui_l2p.quant.quantize import Options, quantize
from PIL import Image

CHECKPOINT = BUNDLED_MODEL / "transformer.safetensors"
KINDS = [(name, kind) for name, about in FORMATS.items() for kind in about.granularities]


def psnr(images: list[Image.Image], wanted: list[Image.Image]) -> float:
    errors = [squared_error(*pair) for pair in zip(images, wanted, strict=True)]
    return psnr_of(sum(errors) / len(errors))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=60, help="images (default 60)")
    scenes = test_scenes(parser.parse_args().count)
    captions = [scene.caption() for scene in scenes]
    wanted = generate(L2PPipeline.from_pretrained(torch_dtype=torch.bfloat16), captions)
    print(
        "| format | granularity | PSNR | right |\n|---|---|---|---|\n| bfloat16 | | |"
        f" {score(wanted, scenes)['right']} |",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for kind, granularity in KINDS:
            file = Path(folder) / f"{kind}-{granularity}.safetensors"
            quantize(
                CHECKPOINT, file, Options(format=kind, granularity=granularity, preset="small")
            )
            pipe = L2PPipeline.from_pretrained(
                file, BUNDLED_MODEL / "text_encoder", torch_dtype=torch.bfloat16
            )
            images = generate(pipe, captions)
            print(
                f"| {kind} | {granularity} | {psnr(images, wanted):.1f} dB |"
                f" {score(images, scenes)['right']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
