"""What is trained beside frozen weights: LoRA, DoRA and LoKr, by peft, and their files."""

import re

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..files.header import CheckpointError
from ..files.layout import Layout, read_layout
from ..files.lora import Change, read_lora
from ..model import L2PTransformer
from .config import TrainConfig

# The linears of the main layers of Z-Image, by what `lora_targets` calls them.
LINEARS = {
    "attention": r"layers\.\d+\.attention\.(to_[qkv]|to_out\.0)",
    "feed_forward": r"layers\.\d+\.feed_forward\.w[123]",
    "adaLN": r"layers\.\d+\.adaLN_modulation\.0",
}


def targets_of(config: TrainConfig, row: Backbone | None = None) -> str:
    """Return a pattern of the layers that get an adapter. row: of the model's backbone; None for
    Z-Image.

    Raises ValueError where the model has none of `lora_targets`."""
    known = row.lora if row else LINEARS
    linears = "|".join(known[name] for name in config.lora_targets if name in known)
    if not linears:
        raise ValueError(
            f"lora_targets is {' '.join(config.lora_targets)}, and this model's blocks have"
            f" {' and '.join(known)}; name some of those"
        )
    return f"({linears})"


def scale_of(config: TrainConfig) -> float:
    """Return what the adapter's product is multiplied by: alpha / rank."""
    return (config.lora_alpha or config.lora_rank) / config.lora_rank


def add_adapter(model: L2PTransformer, config: TrainConfig) -> None:
    """Put an adapter beside linears of the main layers, and freeze all else."""
    try:
        from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("training a LoRA needs peft: pip install 'comfyui-l2p[train]'") from None
    model.requires_grad_(False)
    rank, alpha = config.lora_rank, config.lora_alpha or config.lora_rank
    targets = targets_of(config, getattr(model.config, "row", None))
    if config.lora_kind == "lokr":
        adapter = LoKrConfig(r=rank, alpha=alpha, target_modules=targets)
    else:
        dora = config.lora_kind == "dora"
        adapter = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=dora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(adapter, model)


def saved_name(name: str) -> str:
    """A trained tensor's name in a step file: the published one; an adapter's as ai-toolkit and
    ComfyUI have it."""
    if not (".lora_" in name or ".lokr_" in name):
        return name
    name = name.replace(".lora_magnitude_vector.default.weight", ".dora_scale")
    return f"diffusion_model.{name.replace('.default', '')}"


def saved(name: str, tensor: Tensor, config: TrainConfig) -> Tensor:
    """A trained tensor as a step file has it: an adapter's scale is in one of its factors, so that
    every program takes it at strength 1; DoRA's lengths of rows are a column."""
    if not config.lora_rank:
        return tensor
    if ".lora_magnitude_vector." in name:
        return tensor[:, None]
    scaled = ".lora_B." in name or ".lokr_w1" in name
    return tensor * scale_of(config) if scaled else tensor


def read_first_lora(config: TrainConfig, base: Layout) -> tuple[Layout, dict[str, Change]]:
    """Return the LoRA that a run starts from, and what it changes, by the published names of
    weights.

    Raises CheckpointError where the run can't train it."""
    lora = read_layout(config.resume_lora)
    changes = read_lora(lora, base, 1.0)
    for weight, change in changes.items():
        if not change.low_rank:
            kind = ", ".join(change.parts)
            raise CheckpointError(
                f"{lora.path.name} holds {kind} for {weight}, which is no LoRA; only a LoRA can be"
                " trained further. Merge it into the checkpoint: l2p merge"
            )
        if not re.fullmatch(targets_of(config, base.backbone), weight.removesuffix(".weight")):
            raise CheckpointError(
                f"{lora.path.name} changes {weight}, which a LoRA run does not train. Merge it into"
                " the checkpoint: l2p merge"
            )
        if (rank := len(change.parts["down"])) != config.lora_rank:
            raise CheckpointError(
                f"{lora.path.name} has rank {rank} for {weight}, and lora_rank is"
                f" {config.lora_rank}; give lora_rank {rank}"
            )
    return lora, changes


@torch.no_grad()
def start_from_lora(
    trained: dict[str, nn.Parameter], changes: dict[str, Change], config: TrainConfig
) -> None:
    """Give the LoRA of `add_adapter` the factors of another; alpha goes into the second factor."""
    for weight, change in changes.items():
        layer = weight.removesuffix(".weight")
        up = change.factor(1.0) / scale_of(config) * change.parts["up"].float()
        trained[f"{layer}.lora_A.default.weight"].copy_(change.parts["down"])
        trained[f"{layer}.lora_B.default.weight"].copy_(up)
