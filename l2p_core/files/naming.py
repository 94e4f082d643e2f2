"""Tensor names: the published ones, ComfyUI's, and those of LoRA files."""

import re
from collections.abc import Iterable

from ..backbones import BACKBONES

# ComfyUI's names for what T2I-L2P calls otherwise; q, k and v lie packed in `qkv`, in this order.
COMFYUI_NAMES = {
    ".attention.out.": ".attention.to_out.0.",
    ".attention.q_norm.": ".attention.norm_q.",
    ".attention.k_norm.": ".attention.norm_k.",
}
PACKED = (
    ".attention.qkv.weight",
    (".attention.to_q.weight", ".attention.to_k.weight", ".attention.to_v.weight"),
)
STACKS = ("layers", "noise_refiner", "context_refiner")
ALL_STACKS = (*STACKS, *(stack for row in BACKBONES.values() for stack in row.stacks))
PARTS = (*STACKS, "t_embedder", "cap_embedder", "x_embedder", "all_x_embedder", "local_decoder")
# The same of other backbones. `dit.` stands before them in some files.
OTHER_PARTS = {stem.removesuffix(".") for row in BACKBONES.values() for stem in row.stems}
LAYER = re.compile(rf"(?:^|\.)((?:{'|'.join(sorted({*PARTS, *OTHER_PARTS}))})\..+)")

# What only an adapter's tensors are called: LoRA, LoHa, LoKr, OFT, GLoRA, DoRA, a difference.
ADAPTER = re.compile(
    r"[._]lora[._]|lora_(?:A|B|up|down)\b|\.(?:lokr_|hada_|b?oft_|glora|[ab][12]\.weight)"
    r"|\.(?:diff|diff_b|dora_scale|set_weight)$"
)


def layer_name(key: str) -> str:
    """A layer's name without any key prefix."""
    found = LAYER.search(key)
    return found[1] if found else key


def name_in(naming: str, name: str) -> tuple[str, int]:
    """A published name as that naming has it, and its place among the tensors that are packed under
    it."""
    if naming == "published":
        return name, 0
    packed, parts = PACKED
    for place, part in enumerate(parts):
        if name.endswith(part):
            return name.removesuffix(part) + packed, place
    for theirs, ours in COMFYUI_NAMES.items():
        name = name.replace(ours, theirs)
    return re.sub(r"^all_x_embedder\.\d+-1\.", "x_embedder.", name), 0


def lora_names(layer: str) -> list[str]:
    """How LoRA files name a layer of the model.

    With dots behind nothing (DiffSynth), `diffusion_model.` (ai-toolkit), `transformer.`
    (diffusers), `pipe.dit.` (T2I-L2P's trainer) and `base_model.model.` (peft); with underscores
    behind `lora_unet_` (kohya), `lycoris_` and `lora_transformer_`."""
    dotted = ("", "diffusion_model.", "transformer.", "pipe.dit.", "base_model.model.")
    underscored = ("lora_unet_", "lycoris_", "lora_transformer_")
    return [
        *(prefix + layer for prefix in dotted),
        *(prefix + layer.replace(".", "_") for prefix in underscored),
    ]


def lora_targets(weights: Iterable[str]) -> dict[str, str]:
    """Return the weights that adapters change, by every name that files have for their layers.

    weights: published names. Packed q, k and v are no layer: see `lora.split_packed_lora`."""
    targets: dict[str, str] = {}
    for weight in weights:
        if weight.endswith(".weight"):
            names = {weight, name_in("comfyui", weight)[0]}
            layers = [name.removesuffix(".weight") for name in sorted(names)]
            for layer in layers:
                if not layer.endswith(".qkv"):
                    targets |= dict.fromkeys(lora_names(layer), weight)
    return targets
