"""Tensor names: the published ones, ComfyUI's, and those of LoRA files."""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

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
PARTS = (*STACKS, "t_embedder", "cap_embedder", "x_embedder", "all_x_embedder", "local_decoder")
LAYER = re.compile(rf"(?:^|\.)((?:{'|'.join(PARTS)})\..+)")

# A LoRA file's layer that changes q, k and v at once, in names with dots or underscores.
PACKED_LORA = re.compile(r"(.*attention[._])qkv\.(.+)")
# Parts of a change whose rows are the layer's.
LORA_ROWS = re.compile(
    r"lora_(?:B|up)(?:\.default)?(?:\.weight)?|lora(?:_linear_layer)?\.up\.weight"
    r"|hada_w[12]_a|diff|set_weight"
)
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

    weights: published names. Packed q, k and v are no layer: see `split_packed_lora`."""
    targets: dict[str, str] = {}
    for weight in weights:
        if weight.endswith(".weight"):
            names = {weight, name_in("comfyui", weight)[0]}
            layers = [name.removesuffix(".weight") for name in sorted(names)]
            for layer in layers:
                if not layer.endswith(".qkv"):
                    targets |= dict.fromkeys(lora_names(layer), weight)
    return targets


def split_packed_lora(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the changes of packed q, k and v into one change for each, named in the file's own
    dialect.

    Takes LoRA, LoHa, LoKr (with DoRA scales) and full differences; what acts on all rows at once,
    such as OFT, stays as it is."""
    out: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for key, tensor in lora.items():
        if found := PACKED_LORA.fullmatch(key):
            packed.setdefault(found[1], {})[found[2]] = tensor
        else:
            out[key] = tensor
    for attention, parts in packed.items():
        thirds = _thirds(parts)
        if thirds is None:
            out |= {f"{attention}qkv.{part}": tensor for part, tensor in parts.items()}
            continue
        for name, third in zip(("to_q", "to_k", "to_v"), thirds):
            out |= {f"{attention}{name}.{part}": tensor for part, tensor in third.items()}
    return out


def _thirds(parts: Mapping[str, Tensor]) -> list[dict[str, Tensor]] | None:
    """The parts of a change of three times N rows, for each N rows. None where it can't be
    split."""
    if any(part.startswith("lokr_") for part in parts):
        rows = next((parts[part].shape[0] for part in ("lokr_w1", "lokr_w1_a") if part in parts), 0)
        if not rows:
            return None
        if rows % 3:
            return (
                None
                if "dora_scale" in parts
                else [{"diff": change} for change in _lokr_change(parts).chunk(3)]
            )
    elif not any(LORA_ROWS.fullmatch(part) for part in parts):
        return None
    thirds: list[dict[str, Tensor]] = [{}, {}, {}]
    for part, tensor in parts.items():
        of_rows = (
            LORA_ROWS.fullmatch(part)
            or part in ("lokr_w1", "lokr_w1_a")
            or part == "dora_scale"
            and tensor.shape[0] > 1
        )
        pieces = tensor.chunk(3) if of_rows else [tensor] * 3
        if len(pieces) != 3 or pieces[0].shape != pieces[2].shape:
            return None
        for third, piece in zip(thirds, pieces):
            third[part] = piece
    return thirds


def _lokr_change(parts: Mapping[str, Tensor]) -> Tensor:
    """The difference that a LoKr makes, (rows, inputs), float32: alpha / rank * kron(w1, w2)
    (LyCORIS, arXiv 2309.14859, section 3)."""
    rank = None
    factors = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            factors.append(parts[name].float())
        else:
            rank = parts[f"{name}_b"].shape[0]
            factors.append(parts[f"{name}_a"].float() @ parts[f"{name}_b"].float())
    scale = float(parts["alpha"]) / rank if rank and "alpha" in parts else 1.0
    return scale * torch.kron(*factors)
