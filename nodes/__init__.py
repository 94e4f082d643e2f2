"""ComfyUI nodes, thin adapters over `l2p_core` and `quant`; the only floor that imports ComfyUI."""

import logging

from comfy_api.latest import ComfyExtension, io
from comfyui_version import __version__ as comfyui_version

OLDEST_COMFYUI = (0, 16)


class L2PExtension(ComfyExtension):
    """The nodes that ComfyUI gets."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        if tuple(map(int, comfyui_version.split(".")[:2])) < OLDEST_COMFYUI:
            logging.error(
                f"ComfyUI-L2P needs ComfyUI v{'.'.join(map(str, OLDEST_COMFYUI))} or newer, this is"
                f" v{comfyui_version}: its nodes are left out. Update ComfyUI"
            )
            return []
        from . import comfy_model, files, load, prompt, sample

        comfy_model.install()
        return [*load.NODES, *prompt.NODES, *sample.NODES, *files.NODES]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls when it imports the pack."""
    return L2PExtension()
