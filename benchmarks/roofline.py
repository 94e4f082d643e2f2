"""The time that the counted work of a guided step implies on cards that nobody here has: a
roofline, not a measurement.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --patch 64 --size 4096

Each operation takes the longer of two times: its operations at the card's pace, and its bytes at
the card's bandwidth. Peak figures are the makers'. What share of the peak is reached is an
assumption: 90 % of the bandwidth, and for products and attention what is commonly reported for
large ones."""

import argparse
from typing import NamedTuple

from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS
from count import KINDS, NEGATIVE_PROMPT, PROMPT, Counter, Work, ours, published_config

BANDWIDTH_SHARE = 0.9


class Card(NamedTuple):
    """Peak figures, and the shares of them that are assumed to be reached."""

    bf16: float  # TFLOP/s, dense, accumulated in float32
    int8: float  # TOP/s, dense
    bandwidth: float  # GB/s
    matmul_share: float
    attention_share: float
    source: str


CARDS = {
    "H100 SXM": Card(989.4, 1978.9, 3350, 0.70, 0.40, "NVIDIA H100 data sheet, without sparsity"),
    "A100 80 GB SXM": Card(312, 624, 2039, 0.80, 0.60, "NVIDIA A100 data sheet"),
    "RTX 4090": Card(165.2, 660.6, 1008, 0.88, 0.85, "NVIDIA Ada architecture, appendix A"),
    "RTX 3090": Card(71, 284, 936, 0.90, 0.85, "NVIDIA Ampere GA102 architecture, table 9"),
    "RTX 3060": Card(25.4, 102, 360, 0.90, 0.85, "the 3090's per SM and clock: 28 SMs, 1.78 GHz"),
}


def seconds(card: Card, kind: str, work: Work, eight_bits: bool = False) -> float:
    """The time of one kind of operations. eight_bits: products at the card's INT8 pace."""
    share = card.attention_share if kind == "attention" else card.matmul_share
    pace = card.int8 if eight_bits and kind == "matmul" else card.bf16
    compute = work.flops / (share * pace * 1e12)
    return max(compute, work.bytes / (BANDWIDTH_SHARE * card.bandwidth * 1e9))


def times(card: Card, counted: Counter, eight_bits: bool = False) -> dict[str, float]:
    """Seconds by kind of operation, the decoder's apart. eight_bits: in the main layers."""
    out = dict.fromkeys([*KINDS, "decoder"], 0.0)
    for (part, kind, _), work in counted.by.items():
        where = "decoder" if part == "decoder" else kind
        out[where] += seconds(card, kind, work, eight_bits and part == "main layers")
    return {kind: time for kind, time in out.items() if time}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patch", type=int, choices=PUBLISHED_DECODERS, default=16)
    parser.add_argument("--size", type=int, default=1024, help="side in pixels")
    args = parser.parse_args()
    counted = ours(published_config(args.patch), args.size, (PROMPT, NEGATIVE_PROMPT))
    total = counted.total()
    print(
        f"A guided step, patch {args.patch}, {args.size} pixels: {total.flops / 1e12:.1f} TFLOP,"
        f" {total.bytes / 1e9:.0f} GB"
    )
    kinds = list(times(CARDS["H100 SXM"], counted))
    print("| card | ms |", " | ".join(kinds), "| share of peak FLOPS | ms, main layers in INT8 |")
    print("|---" * (len(kinds) + 4) + "|")
    for name, card in CARDS.items():
        by_kind = times(card, counted)
        whole = sum(by_kind.values())
        shares = " | ".join(f"{time / whole:.0%}" for time in by_kind.values())
        of_peak = total.flops / whole / (card.bf16 * 1e12)
        in_8_bits = sum(times(card, counted, eight_bits=True).values())
        print(
            f"| {name} | {1e3 * whole:.0f} | {shares} | {of_peak:.0%} | {1e3 * in_8_bits:.0f} |",
        )
    print("\n" + "\n".join(f"{name}: {card.source}" for name, card in CARDS.items()))


if __name__ == "__main__":
    main()
