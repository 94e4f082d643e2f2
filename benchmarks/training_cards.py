"""What training holds in memory on which card, with the settings that `l2p train --memory` chooses,
and whether a tenth of the card stays free. Counted on the header of a full-size pixel
initialisation, at 1024 x 1024 pixels and batch 1; nothing is run on a card.

    python benchmarks/training_cards.py (10 minutes on one CPU core)
    python benchmarks/training_cards.py --backbone flux2-klein --cards 24gb 16gb

Ends with status 1 where a preset does not fit. A card of N GB counts as N GiB, as in cards.py."""

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path

from cards import klein_config, write_sparse
from comfyui_l2p.l2p_core import L2PConfig
from comfyui_l2p.l2p_core.backbones import FLUX2_KLEIN
from comfyui_l2p.l2p_core.files.load import expected_shapes
from comfyui_l2p.l2p_core.train.config import read_config
from comfyui_l2p.l2p_core.train.estimate import estimate
from comfyui_l2p.l2p_core.train.presets import CARDS, PRESETS

KINDS = {"layers": {}, "everything": {"freeze": ""}, "LoRA": {"lora_rank": 16}}
NAMES = {
    "layers": "the published layers",
    "everything": 'all weights (`freeze = ""`)',
    "LoRA": "a LoRA of rank 16",
}
FREE = 0.1  # of a card: its driver, a desktop, the kernels' workspace


def told(settings: dict) -> str:
    """Return settings as a reader would write them."""
    parts = [
        name if value is True else f"{name} = {json.dumps(value)}"
        for name, value in settings.items()
    ]
    return ", ".join(f"`{part}`" for part in parts) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=CARDS, metavar="CARD")
    parser.add_argument(
        "--backbone",
        choices=("z-image", FLUX2_KLEIN.name),
        default="z-image",
        help="default z-image",
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    full, known = [], {}
    print(
        "| what is trained | card | settings chosen | weights | gradients, state |"
        " activations, buffers | total | offloaded to the CPU |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "pixel-init.safetensors"
        of_klein = args.backbone == FLUX2_KLEIN.name
        shapes = expected_shapes(klein_config() if of_klein else L2PConfig())
        write_sparse(checkpoint, ((name, "BF16", shape) for name, shape in shapes.items()))
        common = {"checkpoint": str(checkpoint), "data": "none", "output": "none"}
        for kind in args.only:
            for card, chosen in PRESETS[kind].items():
                if card not in args.cards:
                    continue
                config = read_config(None, {**common, **KINDS[kind], "memory": card})
                if config not in known:
                    known[config] = estimate(config)
                parts = known[config]
                weights = parts["weights that are trained"] + parts["frozen weights"]
                state = parts["gradients"] + parts["optimizer state"]
                columns = (
                    weights,
                    state,
                    parts["activations and buffers"],
                    parts["total"],
                    parts.get("in the CPU's memory", 0),
                )
                cells = " | ".join(f"{size / 1e9:.2f} GB" for size in columns)
                gigabytes = int(card.removesuffix("gb"))
                print(f"| {NAMES[kind]} | {gigabytes} GB | {told(chosen)} | {cells} |", flush=True)
                if parts["total"] > (1 - FREE) * 2**30 * gigabytes:
                    full.append(f"{kind} on {card}")
    if full:
        sys.exit(f"too much: {', '.join(full)}")


if __name__ == "__main__":
    main()
