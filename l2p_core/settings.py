"""Every setting that changes an image, once: default, range, help and choices.

The arguments of `L2PPipeline`, the flags of `l2p generate` and `l2p queue`, the columns of prompt
files, the record in each PNG and the inputs of the nodes are derived from `Settings`. A new setting
is a field here and its effect."""

import math
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any, get_args

MAX_SIDE = 16384  # pixels; the largest published model generates 10240
MAX_BATCH = 4096  # images at a time
MAX_COUNT = 1_000_000  # images of one run
HALF_A_CHARACTER = ", which holds an unpaired surrogate, half of a character such as an emoji"
# How an image above the trained resolution is refined; the first is the default.
REFINEMENTS = INTERPOLATED, TILED, EXTRAPOLATED = "interpolated", "tiled", "extrapolated"
# What image tokens attend to there; the first is the default.
ATTENTIONS = WHOLE, LOCAL = "whole", "local"
# Attention kernels; the first is the default, torch's choice.
BACKENDS = AUTO, FLASH, CUDNN, EFFICIENT, MATH, SAGE = (
    "auto",
    "flash",
    "cudnn",
    "efficient",
    "math",
    "sage",
)


def setting(default: object, help: str, **about: object) -> Any:
    """A field of `Settings`; for a type checker a value of any type, as `dataclasses.field` is.

    help: one line for flags, tooltips and docs, without the default. low, high: bounds, included.
    above: a bound that is not included. choices: the words it may be. aliases: older words for
    them. flag: its flag, where that is not the name. metavar: of the flag. inputs: the inputs of a
    ComfyUI graph that it fills, INPUT or CLASS.INPUT; by default of its own name. unset: what takes
    its place in words where the default is None."""
    return field(default=default, metadata={"help": help, **about})


@dataclass(frozen=True)
class Settings:
    """What to generate and how. The same settings, checkpoint and dtype give the same image."""

    prompt: str = setting("", "what to generate", inputs=("prompt", "text"))
    negative_prompt: str = setting(
        "", "what to avoid; it has no effect at guidance scale 1", metavar="TEXT"
    )
    seed: int = setting(
        42, "seed of the noise", low=0, high=2**64 - 1, inputs=("seed", "noise_seed")
    )
    height: int | None = setting(
        None,
        "height in pixels: a multiple of 16, and of 64, 128 or 320 for the 4K, 8K and 10K models",
        low=1,
        high=MAX_SIDE,
        metavar="PIXELS",
        unset="the trained resolution",
    )
    width: int | None = setting(
        None,
        "width in pixels, with the same rules as for the height",
        low=1,
        high=MAX_SIDE,
        metavar="PIXELS",
        unset="the trained resolution",
    )
    num_inference_steps: int | None = setting(
        None,
        "number of steps, each one or two evaluations of the model",
        low=1,
        high=1000,
        flag="--steps",
        inputs=("steps",),
        unset="30, and 50 for the 4K and larger models",
    )
    cfg_scale: float | None = setting(
        None,
        "guidance scale (CFG); 1 turns guidance off and halves the time",
        low=0.0,
        high=100.0,
        inputs=("cfg",),
        unset="2, and 4 for the 4K and larger models",
    )
    shift: float = setting(
        3.0,
        "shift of the sigma schedule; above 3 spends more steps on the composition",
        above=0.0,
        high=100.0,
    )
    sampler: str = setting(
        "euler",
        "euler, as published; or ab2, a second-order method that needs fewer steps",
        choices=("euler", "ab2"),
        inputs=("sampler_name",),
    )
    input_image: str = setting(
        "", "image to start from", metavar="FILE", inputs=("LoadImage.image",)
    )
    denoising_strength: float = setting(
        1.0,
        "how much noise the input image gets: 1 keeps nothing of it",
        above=0.0,
        high=1.0,
        metavar="0..1",
        inputs=("denoise",),
    )
    inpaint_mask: str = setting(
        "",
        "mask for the input image: white is generated, black keeps its pixels exactly",
        metavar="FILE",
        inputs=("LoadImageMask.image",),
    )
    stages: int = setting(
        1,
        "number of stages, for sizes above the trained resolution; each stage doubles the size of"
        " the previous image and refines it",
        low=1,
        high=8,
        metavar="N",
    )
    stage_strength: float = setting(
        0.2,
        "denoising strength of every stage after the first",
        above=0.0,
        high=1.0,
        metavar="0..1",
        inputs=("stage_denoise",),
    )
    stage_cfg_scale: float = setting(
        0.0,
        "guidance scale of every stage after the first; 1 turns guidance off and halves their"
        " time, 0 means the guidance scale of the first stage",
        low=0.0,
        high=100.0,
        inputs=("stage_cfg",),
    )
    redraw: str = setting(
        INTERPOLATED,
        "how a stage, or an input image, above the trained resolution is refined. interpolated: in"
        " one pass, with RoPE positions interpolated to the trained range; tiled: in overlapping"
        " tiles of the trained resolution; extrapolated: in one pass, with positions beyond the"
        " trained range",
        choices=REFINEMENTS,
        aliases={"squeezed": INTERPOLATED, "windows": TILED, "whole": EXTRAPOLATED},
    )
    stage_attention: str = setting(
        WHOLE,
        "what patches attend to where an image above the trained resolution is refined in one pass."
        " whole: all of the image; local: a neighbourhood of the trained size, in a fraction of the"
        " time",
        choices=ATTENTIONS,
    )
    rand_device: str = setting(
        "cpu", "where the noise is generated; a GPU gives other noise for the same seed", inputs=()
    )
    cfg_truncation: float = setting(
        1.0,
        "apply guidance until 1 - sigma exceeds this value; later steps skip it and take half the"
        " time",
        low=0.0,
        high=1.0,
        metavar="0..1",
        inputs=(),
    )
    cfg_normalization: float = setting(
        0.0,
        "limit the norm of the guided velocity to this many times that of the velocity with the"
        " prompt, against artifacts of high guidance scales; 0 means no limit",
        low=0.0,
        high=100.0,
        inputs=(),
    )
    cache_threshold: float = setting(
        0.0,
        "skip most layers at steps where the output of the first layer changes by no more than"
        " this share; 0 never skips",
        low=0.0,
        high=math.inf,
        metavar="SHARE",
        inputs=(),
    )


@dataclass(frozen=True)
class CompleteSettings(Settings):
    """Settings of which none is left to the checkpoint, as `L2PPipeline.complete` returns them."""

    height: int = field(kw_only=True)
    width: int = field(kw_only=True)
    num_inference_steps: int = field(kw_only=True)
    cfg_scale: float = field(kw_only=True)


FIELDS: MappingProxyType[str, Field] = MappingProxyType(
    {each.name: each for each in fields(Settings)}
)


def reject_hooks(settings: Settings, model: str) -> None:
    """Raise ValueError for settings that change how blocks run, which a model of that name does not
    support."""
    for name, needed in (("cache_threshold", 0.0), ("stage_attention", WHOLE)):
        if (found := getattr(settings, name)) != needed:
            raise ValueError(
                f"{name} is {found}, which {model} does not support. Set it to {needed}"
            )


def kind(name: str) -> type:
    """The type of a setting's value: str, int or float."""
    annotation = FIELDS[name].type
    return annotation if isinstance(annotation, type) else get_args(annotation)[0]


def checked(name: str, value: object) -> str | int | float:
    """Return a setting's value in its type, from Python, a flag, a table or JSON.

    Numbers may come as text, and whole numbers with a point (42.0). Raises ValueError for anything
    else, such as true, NaN, a list, half an emoji, or what is out of bounds."""
    about = FIELDS[name].metadata
    try:
        result = _converted(kind(name), value)
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {value!r}{HALF_A_CHARACTER}") from None
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}; expected {expected(name)}") from None
    if "choices" in about:
        result = current_word(name, result)
        if result not in about["choices"]:
            raise ValueError(f"{name} is {value!r}; expected {expected(name)}")
    if kind(name) is not str:
        too_low = result < about.get("low", -math.inf) or result <= about.get("above", -math.inf)
        if too_low or result > about["high"]:
            raise ValueError(f"{name} is {value}; expected {expected(name)}")
    return result


def checked_text(name: str, value: object) -> str:
    """Return a text that is no setting, such as a file's name, by the same rules as `checked`."""
    try:
        return str(_converted(str, value))
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {value!r}{HALF_A_CHARACTER}") from None
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; expected text") from None


def current_word(name: str, value: object) -> Any:
    """Return a setting's value, an older word for one of its choices as today's."""
    aliases = FIELDS[name].metadata.get("aliases", {}) if name in FIELDS else {}
    return aliases.get(value, value) if isinstance(value, str) else value


def graph_inputs(name: str) -> tuple[str, ...]:
    """The inputs of a ComfyUI graph that a setting fills, INPUT or CLASS.INPUT; none where it has
    none there."""
    return FIELDS[name].metadata.get("inputs", (name,))


def expected(name: str) -> str:
    """What a setting may be, in words: "a whole number from 1 to 8"."""
    about = FIELDS[name].metadata
    if "choices" in about:
        return f"one of {', '.join(about['choices'])}"
    if kind(name) is str:
        return "text"
    words = "a whole number" if kind(name) is int else "a number"
    low = f"above {about['above']:g}" if "above" in about else f"from {about['low']:g}"
    high = {2**64 - 1: " to 2^64 - 1", math.inf: ""}.get(about["high"], f" to {about['high']:g}")
    return f"{words} {low}{high}"


def describe(name: str) -> str:
    """The help of a setting with its default."""
    each = FIELDS[name]
    default = each.metadata.get("unset") if each.default is None else each.default
    return (
        f"{each.metadata['help']} (default {default})"
        if default not in ("", None)
        else each.metadata["help"]
    )


def _converted(kind: type, value: object) -> str | int | float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError  # as text it would be a word, "nan"
    if kind is str:
        text = str(value)
        text.encode()  # half an emoji has no UTF-8
        return text
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    if kind is float:
        return number
    if number != int(number):
        raise ValueError
    return (
        int(value)
        if isinstance(value, (int, float)) or value.strip().lstrip("+-").isdecimal()
        else int(number)
    )
