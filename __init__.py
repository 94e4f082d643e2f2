"""ComfyUI-L2P: L2P checkpoints as a library, the command `l2p`, and ComfyUI nodes. Does nothing
where ComfyUI is absent."""

import sys

if "folder_paths" in sys.modules:  # ComfyUI is importing its packs
    from .nodes import comfy_entrypoint as comfy_entrypoint

    WEB_DIRECTORY = "./web"
