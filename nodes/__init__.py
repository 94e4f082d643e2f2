"""ComfyUI nodes: thin adapters over `l2p_core` and `quant`. The only layer that imports ComfyUI."""

import logging

from comfy_api.latest import ComfyExtension, io

from . import versions


class L2PExtension(ComfyExtension):
    """The nodes that ComfyUI gets."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Import the nodes; none, with one line in the log, where this ComfyUI can't run them."""
        if tuple(map(int, versions.VERSION.split(".")[:2])) < versions.OLDEST:
            oldest = ".".join(map(str, versions.OLDEST))
            logging.error(
                f"ComfyUI-L2P needs ComfyUI v{oldest} or newer, this is v{versions.VERSION}: its"
                " nodes are left out. Update ComfyUI"
            )
            return []
        try:
            from . import check, detection, files, latents, load, prompt, sample, stages, train
        except (ImportError, AttributeError) as error:  # something private is gone
            versions.log_unsupported(error)
            return []
        detection.install()
        return [
            *load.NODES,
            *prompt.NODES,
            *sample.NODES,
            *latents.NODES,
            *stages.NODES,
            *files.NODES,
            *train.NODES,
            *check.NODES,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls when it imports the pack."""
    return L2PExtension()
