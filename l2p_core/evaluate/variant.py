"""A checkpoint with the settings it generates with, as `l2p evaluate compare` names it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..settings import FIELDS, checked
from .layout import CARD

BUNDLED = "bundled"
FLAGS = {
    str(each.metadata.get("flag", ""))[2:].replace("-", "_"): name for name, each in FIELDS.items()
}
OPTIONS = (
    "dtype",
    "convrot",
    "decoder_tile",
    "offload",
    "batch_guidance",
    "compile_blocks",
    "attention",
    "fp8",
)
SWITCHES = {"true": True, "false": False}


@dataclass(frozen=True)
class Variant:
    """What makes one of the folders that are compared.

    checkpoint: None for the bundled model. options: those of OPTIONS that are given. folder: of
    images that exist already; then nothing else counts."""

    name: str
    checkpoint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def folder_name(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"[^\w.=-]+", "-", Path(self.name).name)[:80].strip("-.") or "model"


def read_variant(text: str) -> Variant:
    """Return what CHECKPOINT[:NAME=VALUE,...] says, or a folder of images.

    NAME: a setting, by its name or flag, or one of OPTIONS. Raises ValueError."""
    if (Path(text) / CARD).is_file():
        return Variant(text, folder=Path(text))
    checkpoint, given = text, ""
    if match := re.fullmatch(r"(.*?):([\w-]+=.*)", text):
        checkpoint, given = match.groups()
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        name = FLAGS.get(name, name)
        if equals and name in FIELDS and name != "prompt":
            settings[name] = checked(name, value)
        elif equals and name in OPTIONS:
            options[name] = _option(name, value)
        else:
            raise ValueError(
                f"{text}: {part!r} is no setting; expected NAME=VALUE with a setting of l2p"
                f" generate, or one of {', '.join(OPTIONS)}"
            )
    return Variant(text, None if checkpoint in ("", BUNDLED) else checkpoint, settings, options)


def _option(name: str, value: str) -> str | int | bool:
    if name == "dtype":
        if value not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype is {value!r}; expected bfloat16, float16 or float32")
        return value
    if name == "attention":  # its values are those of --attention, checked when the model is loaded
        return value
    if name in ("convrot", "decoder_tile"):
        if not value.isdecimal():
            raise ValueError(f"{name} is {value!r}; expected a whole number")
        return int(value)
    if value not in SWITCHES:
        raise ValueError(f"{name} is {value!r}; expected true or false")
    return SWITCHES[value]
