"""ComfyUI-L2P: L2P checkpoints as a library, the command `l2p`, and ComfyUI nodes.

Where ComfyUI is absent, importing it does nothing."""

import sys

__version__ = "0.1.0"

if "folder_paths" in sys.modules:  # ComfyUI is importing its packs
    from .nodes import comfy_entrypoint as comfy_entrypoint

    WEB_DIRECTORY = "./web"
