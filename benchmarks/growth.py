"""How time and memory of one pass grow with the image's size and with the batch, for the 1K model
and for those of larger patches.

    pip install matplotlib
    python benchmarks/growth.py --plot docs/growth.png
        (14 GB of memory, ten minutes on two CPU cores)

The published widths and depths, bfloat16, a caption of 100 tokens. Memory is what lives at a pass's
peak beside the weights, counted on tensors that have only a shape. Seconds are measured up to
`--up-to` TFLOP, on weights of one value; beyond, they are the pass's operations at the pace of the
largest one measured of the same model ("computed")."""

import argparse
import json
import time
from pathlib import Path

import torch
from comfyui_l2p.l2p_core import L2PConfig, L2PTransformer
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS
from comfyui_l2p.l2p_core.meter import Meter, shapes_only
from torch.utils.flop_counter import FlopCounterMode

SIZES = {
    16: (256, 512, 1024, 2048, 4096, 10240),
    64: (1024, 2048, 4096, 8192),
    160: (2560, 5120, 10240),
}  # by patch
BATCHES, BATCH_SIZE = (1, 2, 4, 8), {16: 512, 64: 2048}  # and the pixels they are drawn at
CAPTION = 100


def attention_flops(query: tuple, key: tuple, value: tuple, *_, **__) -> int:
    """Of two products of each query with each key: torch counts none for the CPU's kernel."""
    batch, heads, tokens, width = query
    return 2 * 2 * batch * heads * tokens * key[2] * width


def inputs(config: L2PConfig, size: int, batch: int) -> tuple:
    caption = torch.zeros(CAPTION, config.cap_feat_dim, dtype=torch.bfloat16)
    return (
        torch.zeros(batch, 3, size, size, dtype=torch.bfloat16),
        torch.full((batch,), 0.5),
        [caption] * batch,
    )


def count(config: L2PConfig, size: int, batch: int) -> tuple[float, float]:
    """(TFLOP, GB) of a pass."""
    with torch.device("meta"):
        model = L2PTransformer(config).bfloat16().requires_grad_(False)
    with shapes_only(model), torch.no_grad():
        given = inputs(config, size, batch)
        with Meter() as meter:
            model(*given)
        with FlopCounterMode(
            display=False,
            custom_mapping={
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops
            },
        ) as flops:
            model(*given)
    return flops.get_total_flops() / 1e12, meter.peak() / 1e9


def build(config: L2PConfig) -> L2PTransformer:
    with torch.device("meta"):
        model = L2PTransformer(config).bfloat16().requires_grad_(False)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.fill_(0.01)
    return model


@torch.inference_mode()
def seconds(model: L2PTransformer, size: int, batch: int) -> float:
    given = inputs(model.config, size, batch)
    started = time.perf_counter()
    model(*given)
    return time.perf_counter() - started


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 7), layout="constrained")
    batches = "batch, " + ", ".join(
        f"{side} pixels at patch {patch}" for patch, side in BATCH_SIZE.items()
    )
    for row_of_axes, what, unit in zip(
        axes, ("seconds", "memory"), ("seconds of a pass", "GB beside the weights")
    ):
        for axis, along, label in zip(row_of_axes, ("size", "batch"), ("side in pixels", batches)):
            for patch in SIZES:
                drawn = [row for row in rows if row["patch"] == patch and row["along"] == along]
                if drawn:
                    (line,) = axis.plot(
                        [row[along] for row in drawn],
                        [row[what] for row in drawn],
                        label=f"patch {patch}",
                    )
                    for row in drawn:
                        measured = what == "seconds" and row["measured"]
                        axis.plot(
                            row[along],
                            row[what],
                            "o",
                            color=line.get_color(),
                            fillstyle="full" if measured else "none",
                        )
            axis.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
            ticks = [row[along] for row in rows if row["along"] == along and row["patch"] == 16]
            axis.set_xticks(ticks, map(str, ticks))
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle("full: measured; hollow: computed")
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--up-to",
        type=float,
        default=20,
        metavar="TFLOP",
        help="of a pass that is measured (default 20)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves here")
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="keep the figures here as JSON; where it exists, only plot them",
    )
    args = parser.parse_args()
    rows = json.loads(args.rows.read_text()) if args.rows and args.rows.exists() else []
    if not rows:
        print(
            f"{torch.get_num_threads()} threads\n| patch | image | batch | TFLOP | memory |"
            " seconds |\n|---|---|---|---|---|---|",
            flush=True,
        )
        for patch, sizes in SIZES.items():
            config = L2PConfig(patch, decoder=PUBLISHED_DECODERS[patch])
            model, pace = build(config), None
            wanted = [("size", size, 1) for size in sizes] + [
                ("batch", BATCH_SIZE[patch], batch) for batch in BATCHES if patch in BATCH_SIZE
            ]
            for along, size, batch in wanted:
                flops, memory = count(config, size, batch)
                measured = flops <= args.up_to or pace is None
                if measured:
                    took = seconds(model, size, batch)
                    pace = took / flops if along == "size" else pace
                else:
                    took = flops * pace
                rows.append(
                    {
                        "along": along,
                        "patch": patch,
                        "size": size,
                        "batch": batch,
                        "flops": flops,
                        "memory": memory,
                        "seconds": took,
                        "measured": measured,
                    }
                )
                print(
                    f"| {patch} | {size} | {batch} | {flops:.1f} | {memory:.2f} GB |"
                    f" {took:.1f}{'' if measured else ', computed'} |",
                    flush=True,
                )
            del model
        if args.rows:
            args.rows.write_text(json.dumps(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
