"""How long and how much memory `l2p convert`, `merge` and `quantize` take at full size, against
`cp` of the same bytes.

    python benchmarks/files.py --folder /tmp/l2p
        (45 GB of disk, 2 GB of memory, a quarter of an hour)
    python benchmarks/files.py --folder /tmp/l2p --published T2I-L2P
        (also its own two scripts, where memory allows)
    python benchmarks/files.py --folder /tmp/l2p --only quantize
        (the rows that have this in their name)

Inputs have random weights with outliers under the real names, shapes and dtypes, in the order in
which safetensors writes them: a latent Z-Image (BF16), a pixel initialisation (BF16, main layers
5..24 in FP32) and the part that training makes of it. Each is made when a row needs it and removed
when one does not. Each command runs in a process of its own, its inputs not in the cache, and is
done when its output is on the disk; `cp` then copies as many bytes under the same conditions.
Private memory is the process's anonymous pages (RssAnon), polled."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from load import drop_from_cache, make, private_bytes, published_tensors

LATENT_EMBEDDER, LATENT_LAST = (3840, 64), (64, 3840)


def latent_tensors() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of Z-Image-Turbo's transformer."""
    for name, _, shape in published_tensors():
        if not name.startswith(("local_decoder.", "all_x_embedder.")):
            yield name, "BF16", shape
    yield "all_x_embedder.2-1.weight", "BF16", LATENT_EMBEDDER
    yield "all_x_embedder.2-1.bias", "BF16", LATENT_EMBEDDER[:1]
    yield "all_final_layer.2-1.linear.weight", "BF16", LATENT_LAST
    yield "all_final_layer.2-1.linear.bias", "BF16", LATENT_LAST[:1]
    yield "all_final_layer.2-1.adaLN_modulation.1.weight", "BF16", (3840, 256)
    yield "all_final_layer.2-1.adaLN_modulation.1.bias", "BF16", (3840,)


def part_tensors() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of what training saves: all but main layers 5..24."""
    return (row for row in published_tensors() if row[1] == "BF16")


def run(
    command: list[str], inputs: list[Path], output: Path, **environment: str
) -> tuple[float, float, int]:
    """(seconds until the output is on the disk, peak private GB, exit status)."""
    for file in inputs:
        drop_from_cache(file)
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    )
    while process.poll() is None:
        peak = max(peak, private_bytes(process.pid))
        time.sleep(0.02)
    if output.exists():
        with output.open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - started, peak / 1e9, process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="where the inputs are made; those of the last row stay",
    )
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="of the names of the rows to run"
    )
    parser.add_argument(
        "--published", type=Path, metavar="CHECKOUT", help="of T2I-L2P, to run its scripts beside"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    latent, base, part, out, copy = (
        args.folder / f"{name}.safetensors"
        for name in ("z-image", "model-1k-merge", "part", "out", "copy")
    )
    makers = {latent: latent_tensors, base: published_tensors, part: part_tensors}
    l2p = [sys.executable, "-m", "comfyui_l2p.l2p_core.cli"]
    published = args.published and args.published.resolve()
    commands = [
        ("l2p convert", [*l2p, "convert", latent, "-o", out], [latent]),
        (
            "published convert",
            published
            and [
                sys.executable,
                published / "examples/z_image/L2P_convert_weight.py",
                "--latent_ckpt_files",
                latent,
                "--output_path",
                out,
            ],
            [latent],
        ),
        ("l2p merge", [*l2p, "merge", "--trained", part, "--base", base, "-o", out], [part, base]),
        (
            "published merge",
            published
            and [
                sys.executable,
                published / "merge_weights.py",
                "--file_a",
                part,
                "--file_b",
                base,
                "--file_out",
                out,
            ],
            [part, base],
        ),
        *(
            (
                " ".join(["l2p quantize", *options]),
                [*l2p, "quantize", base, "-o", out, *options],
                [base],
            )
            for options in (
                [],
                ["--granularity", "convrot"],
                ["--format", "float8_e4m3fn"],
                ["--format", "nvfp4"],
            )
        ),
        ("l2p quantize --verify", [*l2p, "quantize", base, "-o", out, "--verify"], [base]),
        ("l2p export --naming comfyui", [*l2p, "export", base, "-o", out], [base]),
    ]
    for name, command, inputs in commands:
        if not command or args.only not in name:
            continue
        for file, tensors in makers.items():
            if file not in inputs:
                file.unlink(missing_ok=True)
            elif not file.exists():
                make(file, sorted(tensors(), key=lambda row: (row[1] != "F32", row[0])))
        seconds, peak, status = run(
            command,
            inputs,
            out,
            **({"PYTHONPATH": str(published)} if name.startswith("published") else {}),
        )
        if status:
            print(
                f"{name}: ended with status {status} after {seconds:.0f} s, peak private memory"
                f" {peak:.2f} GB",
                flush=True,
            )
            out.unlink(missing_ok=True)
            continue
        copied = out
        if (
            size := out.stat().st_size
        ) > 15e9:  # as large as the base, and there may be no room for a third file of that size
            out.unlink()
            copied = base
        copying, _, _ = run(["cp", copied, copy], [copied], copy)
        print(
            f"{name}: {size / 1e9:.2f} GB in {seconds:.1f} s, {seconds / copying:.2f} x cp"
            f" ({copying:.1f} s), peak private memory {peak:.2f} GB",
            flush=True,
        )
        out.unlink(missing_ok=True)
        copy.unlink()


if __name__ == "__main__":
    main()
