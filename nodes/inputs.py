"""Inputs of nodes that are settings of a generation, as `l2p_core.settings` has them."""

import math

from comfy_api.latest import io

from ..l2p_core.settings import FIELDS, expected, kind

MAX_SIZE = 10240
BATCH = io.Int.Input(
    "batch_size", default=1, min=1, max=4096, tooltip="Number of images generated at a time."
)


def setting(name: str, input_name: str | None = None, **options):
    """A node input of one of `settings.Settings`: its type, default, range, choices and help.

    input_name: where the node calls it otherwise. options: what the node says otherwise, such as a
    default."""
    field = FIELDS[name]
    about = field.metadata
    help = about["help"][0].upper() + about["help"][1:]
    given = {"default": field.default, "tooltip": f"{help}.", **options}
    if "choices" in about:
        return io.Combo.Input(input_name or name, **{"options": list(about["choices"]), **given})
    ranges = {"min": about.get("low", about.get("above")), "max": about["high"]}
    if kind(name) is int:
        return io.Int.Input(input_name or name, **{**ranges, **given})
    if "above" in about:
        ranges["min"] = 0.01
    return io.Float.Input(input_name or name, **{**ranges, "step": 0.01, **given})


def side(name: str, default: int = 1024, **options):
    """The input of a height or width."""
    return setting(name, default=default, max=MAX_SIZE, step=16, **options)


def check_numbers(**numbers: float) -> None:
    """Raise ValueError for NaN, which ComfyUI lets through. numbers: by the names of `Settings`."""
    for name, value in numbers.items():
        if math.isnan(value):
            field = FIELDS[name].metadata
            node_input = field.get("inputs", (name,))[0]
            raise ValueError(f"{node_input} is NaN; expected {expected(name)}. Type it again")
