"""Which settings make training fit a GPU: `l2p train --memory 16gb`.

`python benchmarks/training_cards.py` counts what each takes; a tenth of the card stays free."""

from collections.abc import Mapping
from typing import Any

CARDS = ("80gb", "24gb", "16gb", "12gb", "8gb")

# Weights in bfloat16, each updated as soon as its gradient is there: no gradients, and with
# Adafactor next to no state.
FRUGAL = {"stochastic_rounding": True, "step_in_backward": True}
ADAFACTOR: dict[str, Any] = {**FRUGAL, "optimizer": "adafactor"}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "layers": {
        "80gb": {},
        "24gb": {**FRUGAL, "optimizer": "adamw8bit", "quantize_frozen": "int8"},
        "16gb": {**ADAFACTOR, "quantize_frozen": "int8"},
        "12gb": {**ADAFACTOR, "quantize_frozen": "int8", "swap_blocks": 0.5},
        "8gb": {
            **ADAFACTOR,
            "quantize_frozen": "int8",
            "swap_blocks": 1.0,
            "offload_activations": True,
        },
    },
    "everything": {
        "80gb": {**FRUGAL, "optimizer": "adamw8bit"},
        "24gb": ADAFACTOR,
    },
    "LoRA": {
        "80gb": {},
        "24gb": {},
        "16gb": {"quantize_frozen": "int8"},
        "12gb": {"quantize_frozen": "int8"},
        "8gb": {"quantize_frozen": "int8", "swap_blocks": 0.5},
    },
}


def preset(memory: str, given: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings for a card, by what the given ones train. Raises ValueError."""
    if memory not in CARDS:
        raise ValueError(f"memory is {memory!r}; expected one of {', '.join(CARDS)}")
    kind = "LoRA" if given.get("lora_rank") else "layers"
    if kind == "layers" and given.get("freeze") == "":
        kind = "everything"
    cards = PRESETS[kind]
    if memory not in cards:
        raise ValueError(
            f"memory is {memory}, and freeze '' trains all weights, for which there are"
            f" {', '.join(cards)}. Take one, or train the published layers (freeze '5:-5') or a"
            " LoRA (lora_rank 16)"
        )
    return dict(cards[memory])
