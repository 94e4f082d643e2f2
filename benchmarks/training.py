"""What `l2p train --estimate` says a step holds against what training really holds, setting by
setting.

    python benchmarks/training.py --folder /tmp/l2p (8 GB of memory, some minutes on two CPU cores)
    python benchmarks/training.py --folder /tmp/l2p --scale wide --size 256 \\
        --only "as published" "the same, adamw8bit" (18 GB)

Random weights of 1024 numbers wide with 8 main layers, or of the published width with one, and the
published decoder. Each training runs in a process of its own for three steps; "measured" is the
most private memory (RssAnon), polled, beyond that of the same process after a step of the bundled
small model, when libraries that come in at first use are there. The file is float32, so that no
weights stay in its mapped pages, and what is freed goes back at once (MALLOC_MMAP_THRESHOLD_)."""

import argparse
import csv
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from comfyui_l2p.l2p_core.train.config import TrainConfig, read_config, to_toml
from comfyui_l2p.l2p_core.train.estimate import estimate
from comfyui_l2p.quant.export import export
from load import private_bytes
from PIL import Image
from speed import BUNDLED_MODEL, make

STEPS = 3
SETTINGS = {
    "as published": {},
    "float32 throughout": {"mixed_precision": "no"},
    "without checkpointing": {"checkpointing": False},
    "frozen layers in int8": {"quantize_frozen": "int8"},
    "weights in bfloat16, step in backward": {
        "stochastic_rounding": True,
        "step_in_backward": True,
    },
    "the same, adamw8bit": {
        "stochastic_rounding": True,
        "step_in_backward": True,
        "optimizer": "adamw8bit",
    },
    "LoRA of rank 16": {"lora_rank": 16},
    "ema": {"ema": 0.999},
    "two images at once": {"batch": 2},
}


def make_data(folder: Path, size: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file_name", "text"])
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(
                folder / f"{number}.png"
            )
            rows.writerow([f"{number}.png", "word " * 500])  # captions are counted at 512 tokens
    return folder


def measure(config: TrainConfig, toml: Path) -> int:
    """Bytes at the peak of three steps, beyond the program."""
    toml.write_text(to_toml(config))
    process = subprocess.Popen(
        [sys.executable, __file__, "--folder", ".", "--run", toml],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    assert process.stdout.readline() == "ready\n"
    before = peak = private_bytes(process.pid)
    process.stdin.write("go\n")
    process.stdin.flush()
    log = Path(config.output) / "log.csv"
    while not log.exists() or log.read_text().count("\n") <= STEPS:
        peak = max(peak, private_bytes(process.pid))
        if process.poll() is not None:
            raise SystemExit(
                f"training ended with status {process.returncode}; to see why: l2p train {toml}"
            )
        time.sleep(0.005)
    process.kill()
    return peak - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the model is made, and the runs"
    )
    parser.add_argument("--scale", choices=("quarter", "wide"), default="quarter")
    parser.add_argument(
        "--size", type=int, default=512, help="side of the images in pixels (default 512)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SETTINGS,
        default=list(SETTINGS),
        metavar="NAME",
        help="these settings, by name",
    )
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        from comfyui_l2p.l2p_core.train.run import train

        config = read_config(args.run, {})
        train(
            replace(
                config,
                checkpoint=str(BUNDLED_MODEL / "transformer.safetensors"),
                height=96,
                width=96,
                steps=1,
                freeze="1:-1",
                output=f"{config.output}-small",
            ),
            progress=False,
        )
        print("ready", flush=True)
        sys.stdin.readline()
        train(config, progress=False)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoint, drawn = (
        args.folder / f"{args.scale}-float32.safetensors",
        args.folder / f"{args.scale}.safetensors",
    )
    if not checkpoint.exists():
        make(drawn, args.scale)
        export(drawn, checkpoint, "published", dtype="fp32")
    data = make_data(args.folder / f"images-{args.size}", args.size)
    print(
        "| settings | estimated | measured | estimated / measured |\n|---|---|---|---|", flush=True
    )
    for name in args.only:
        output = args.folder / f"run-{time.time_ns()}"
        config = TrainConfig(
            **{
                "checkpoint": str(checkpoint),
                "data": str(data),
                "output": str(output),
                "text_encoder": str(BUNDLED_MODEL / "text_encoder"),
                "height": args.size,
                "width": args.size,
                "freeze": "2:-2",
                "device": "cpu",
                "sample_every": 0,
                "save_every": 1000,
                **SETTINGS[name],
            }
        )
        estimated, measured = (
            estimate(config)["total"],
            measure(config, output.with_suffix(".toml")),
        )
        print(
            f"| {name} | {estimated / 1e9:.2f} GB | {measured / 1e9:.2f} GB |"
            f" {estimated / measured:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
