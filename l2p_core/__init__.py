"""The L2P model, its checkpoints, its sampler and its training. Never imports ComfyUI."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import L2PConfig
    from .files.header import CheckpointError
    from .files.layout import read_layout
    from .files.load import load_model
    from .model import L2PTransformer
    from .pipeline import L2PPipeline

__all__ = [
    "CheckpointError",
    "L2PConfig",
    "L2PPipeline",
    "L2PTransformer",
    "load_model",
    "read_layout",
]

MODULES = {
    "CheckpointError": "files.header",
    "L2PConfig": "config",
    "L2PPipeline": "pipeline",
    "L2PTransformer": "model",
    "load_model": "files.load",
    "read_layout": "files.layout",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: torch takes seconds, in which the command line
    answers an interrupt."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    value = getattr(import_module(f".{MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
