"""How ComfyUI's loaders, LoRA nodes and samplers recognise L2P models."""

from ..l2p_core.files.header import CheckpointError
from ..l2p_core.files.layout import Layout, find_prefix
from ..l2p_core.files.load import check
from . import comfyui
from .comfy_model import L2P, L2PModel, dequantize_in_place, layout_of
from .flux2 import FLUX2_KLEIN, L2PFlux2

LANDMARK = "local_decoder.enc1.0.weight"  # in every L2P model, in no other
# Core's description of a model, by its backbone; None for Z-Image.
DESCRIPTIONS: dict[str | None, type[L2P]] = {None: L2P, FLUX2_KLEIN.name: L2PFlux2}


def install() -> None:
    """Make ComfyUI's loaders and LoRA nodes recognise L2P models, once."""

    def prefix_of(state_dict: dict) -> str | None:
        return (
            find_prefix(state_dict) if any(key.endswith(LANDMARK) for key in state_dict) else None
        )

    def detect(state_dict: dict, prefix: str, metadata: dict[str, str] | None) -> dict | None:
        return (
            unet_config(state_dict, prefix, metadata) if prefix + LANDMARK in state_dict else None
        )

    def lora_keys(model) -> dict | None:
        if not isinstance(model, L2PModel):
            return None
        return model.model_config.lora_keys(model.diffusion_model.config)

    def area_unit(model) -> int:
        return comfyui.AREA_UNIT if isinstance(model, L2PModel) else 1

    comfyui.install(DESCRIPTIONS.values(), prefix_of, detect, lora_keys, area_unit)


def check_whole(layout: Layout) -> None:
    """Raise CheckpointError, saying what the file is, unless it is a whole model that this pack
    runs."""
    description = DESCRIPTIONS.get(layout.backbone and layout.backbone.name)
    if description is None and layout.kind == "model":
        raise CheckpointError(
            f"{layout.path.name} is an L2P model on {layout.model}; this pack runs those on"
            f" Z-Image and {FLUX2_KLEIN.title}. Generate with it in a terminal: l2p generate"
        )
    check(layout, description and description.expected_shapes)


def unet_config(state_dict: dict, prefix: str, metadata: dict[str, str] | None) -> dict:
    """What ComfyUI keeps of a model before it is built. Raises CheckpointError, with the reason,
    for a file that can't be used, and in a ComfyUI that can't run the network."""
    layout = layout_of(state_dict, prefix, metadata)
    description = DESCRIPTIONS.get(layout.backbone and layout.backbone.name, L2P)
    if failure := description.self_test():
        raise CheckpointError(failure)
    check_whole(layout)
    config = layout.config
    formats = {source.format for source in layout.tensors.values() if source.format}
    quantized = bool(formats)
    if quantized and not comfyui.has_kernels(formats):
        dequantize_in_place(state_dict, layout.tensors.values())
        quantized = False
    return {
        **description.unet_config,
        "in_channels": 3,
        "patch_size": config.patch_size,
        "dim": config.dim,
        "n_layers": config.n_layers,
        "l2p_config": config,
        "trained_size": layout.trained_size,
        "quantized": quantized,
    }
