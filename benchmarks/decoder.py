"""What cutting the local decoder into tiles saves and costs: peak memory and time, uncut and cut,
for all four patches.

    python benchmarks/decoder.py --patch 64 128 160 --size 4096 10240 (six minutes on two CPU cores)
    python benchmarks/decoder.py --patch 16 --size 2048 4096

Memory is what lives at the peak beside image, features, output and weights. Uncut is left out where
a map would have 2^31 numbers or more: beyond that torch's convolutions on a CPU are many times
slower."""

import argparse
import time

import torch
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS, L2PConfig
from comfyui_l2p.l2p_core.decoder import LocalDecoder, decoder_bytes, tile_side
from comfyui_l2p.l2p_core.meter import peak_bytes
from torch import Tensor


def measure(
    decoder: LocalDecoder, image: Tensor, features: Tensor, tile: int
) -> tuple[int, float, Tensor]:
    """Peak bytes, seconds and output of one pass."""
    start = time.perf_counter()
    peak, output = peak_bytes(lambda: decoder(image, features, tile))
    if image.is_cuda:
        torch.cuda.synchronize()
    return peak, time.perf_counter() - start, output


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--size", type=int, nargs="+", default=[2048], help="sides in pixels (default 2048)"
    )
    parser.add_argument("--patch", type=int, nargs="+", default=list(PUBLISHED_DECODERS))
    parser.add_argument(
        "--tile",
        type=int,
        nargs="+",
        help="default: the decoder's choice, half the side where that is uncut",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    columns = (
        "patch",
        "image",
        "tile",
        "peak, GiB",
        "estimate, GiB",
        "untiled, GiB",
        "seconds",
        "time relative to untiled",
        "largest difference",
    )
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for patch in args.patch:
        torch.manual_seed(0)
        config = L2PConfig(patch, decoder=PUBLISHED_DECODERS[patch])
        decoder = LocalDecoder(config, device=args.device, dtype=dtype).eval()
        for size in args.size:
            size -= size % config.size_multiple
            image = torch.randn(1, 3, size, size, device=args.device, dtype=dtype)
            features = torch.randn(
                1, config.dim, size // patch, size // patch, device=args.device, dtype=dtype
            )
            uncut = None
            if (config.decoder[0].up + config.decoder[0].enc) * size**2 < 2**31:
                uncut_peak, uncut_seconds, uncut = measure(decoder, image, features, 0)
            for tile in args.tile or [tile_side(config, size, size, dtype) or size // 2]:
                peak, seconds, output = measure(decoder, image, features, tile)
                print(
                    f"| {patch} | {size} | {tile} | {peak / 2**30:.2f} "
                    f"| {decoder_bytes(config, size, size, dtype, tile=tile) / 2**30:.2f} | "
                    + (
                        f"{uncut_peak / 2**30:.2f} | {seconds:.1f} | {seconds / uncut_seconds:.2f} "
                        f"| {(output - uncut).abs().max():.1e} |"
                        if uncut is not None
                        else f"- | {seconds:.1f} | - | - |"
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
