"""Which versions of ComfyUI the pack works with, and what it says to others."""

import logging

from comfyui_version import __version__ as VERSION

OLDEST = (0, 16)
TESTED = "v0.16 to v0.33"


def log_unsupported(error: Exception) -> str:
    """Log that this ComfyUI does not run the pack, and return the sentence."""
    sentence = (
        f"ComfyUI-L2P does not work with ComfyUI v{VERSION}: {type(error).__name__}: {error}. It"
        f" was tested with {TESTED}. Update the node pack, or use one of these versions"
    )
    logging.error(sentence)
    return sentence
