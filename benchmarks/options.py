"""What each option that saves time gains, what those that save memory cost in time, and all of them
in images, on the bundled model.

    python benchmarks/options.py --count 100          (a quarter of an hour on two CPU cores)

Times are of one image, drawn in turns with the plain one; "right" is the score's over `count`
images, drawn 25 at a time, PSNR theirs against the plain ones, with 255 as the peak. The bundled
model is small: see the docs for which gains carry over."""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from comfyui_l2p.l2p_core import L2PPipeline, flow, model
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.shapes.scenes import test_scenes
from comfyui_l2p.l2p_core.shapes.score import generate, score
from comfyui_l2p.l2p_core.step_cache import StepCache
from comfyui_l2p.quant.quantize import Options, quantize
from quantization import psnr

CHECKPOINT = BUNDLED_MODEL / "transformer.safetensors"
TOKENS, TOKENS_AT_ONCE = 16, model.TOKENS_AT_ONCE  # the image has 36, or 64 with the padding
# Name → what the pipeline is opened with, what an image is drawn with.
OPTIONS: dict[str, tuple[dict, dict]] = {
    "plain": ({}, {}),
    "ab2, 18 steps, shift 2": ({}, {"sampler": "ab2", "num_inference_steps": 18, "shift": 2.0}),
    "batch_guidance": ({"batch_guidance": True}, {}),
    "compile_blocks": ({"compile_blocks": True}, {}),
    "INT8 weights": ({"format": "int8_tensorwise"}, {}),
    "FP8 weights": ({"format": "float8_e4m3fn"}, {}),
    **{f"cfg_truncation {share}": ({}, {"cfg_truncation": share}) for share in (0.75, 0.5, 0.25)},
    **{
        f"cache_threshold {share}": ({}, {"cache_threshold": share})
        for share in (0.02, 0.05, 0.1, 0.2)
    },
    "decoder_tile 32": ({"decoder_tile": 32}, {}),
    f"tokens in runs of {TOKENS}": ({}, {"tokens": TOKENS}),
    "offload": ({"offload": True}, {}),
}


def open_pipe(folder: Path, format: str = "", **settings: object) -> L2PPipeline:
    """format: that the weights are quantized to."""
    checkpoint = CHECKPOINT
    if format:
        checkpoint = folder / f"{format}.safetensors"
        quantize(CHECKPOINT, checkpoint, Options(format=format, preset="small"))
    return L2PPipeline.from_pretrained(checkpoint, BUNDLED_MODEL / "text_encoder", **settings)


def seconds(pipe: L2PPipeline, caption: str, drawn: dict) -> float:
    settings, started = settle(drawn), time.perf_counter()
    pipe(caption, seed=0, **settings)
    return time.perf_counter() - started


def settle(drawn: dict) -> dict:
    """Set how many tokens blocks compute at once, and return what an image takes."""
    model.TOKENS_AT_ONCE = drawn.get("tokens", TOKENS_AT_ONCE)
    return {name: value for name, value in drawn.items() if name != "tokens"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="images to score (default 100)")
    parser.add_argument("--rounds", type=int, default=5, help="images to time (default 5)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=OPTIONS,
        default=list(OPTIONS),
        metavar="NAME",
        help="these options, by name",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32"
    )
    args = parser.parse_args()
    scenes = test_scenes(args.count)
    captions = [scene.caption() for scene in scenes]
    dtype = getattr(torch, args.dtype)
    plain, wanted = L2PPipeline.from_pretrained(torch_dtype=dtype), None
    print(
        f"{torch.get_num_threads()} threads, {args.dtype}, {args.count} images\n"
        "| option | time | PSNR | right | passes cut short |\n|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(["plain", *args.only]):
            opened, drawn = OPTIONS[name]
            pipe = open_pipe(Path(folder), torch_dtype=dtype, **opened)
            caches = []
            with patch.object(
                flow,
                "StepCache",
                lambda *args, **kw: caches.append(StepCache(*args, **kw)) or caches[-1],
            ):
                images = generate(pipe, captions, **settle(drawn))
            left_out = sum(cache.skipped for cache in caches) / max(
                1, sum(cache.skipped + cache.ran for cache in caches)
            )
            wanted = wanted or images
            times = [
                (seconds(pipe, captions[0], drawn), seconds(plain, captions[0], {}))
                for _ in range(args.rounds + 1)
            ][1:]
            ratio = median(one / other for one, other in times)
            print(
                f"| {name} | {ratio:.2f} |"
                f" {'' if name == 'plain' else f'{psnr(images, wanted):.1f} dB'} |"
                f" {score(images, scenes)['right']} | {f'{left_out:.0%}' if caches else ''} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
