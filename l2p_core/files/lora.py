"""Adapters and the weights that they change: LoRA, LoHa, LoKr, differences, and their DoRA forms.

LoRA (arXiv 2106.09685) adds strength * alpha / rank * B A, LoHa and LoKr (LyCORIS, arXiv
2309.14859) the Hadamard and the Kronecker product of two such products. DoRA (arXiv 2402.09353)
then gives each row of the sum a length of its own.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ..model import L2PTransformer
from .header import CheckpointError
from .layout import Layout
from .naming import lora_targets
from .quantization import Int8Linear

# How files call the two factors of a LoRA, behind the layer's name.
FACTOR = re.compile(
    r"(.+?)[._](?:lora_(?:(A|down)|(?:B|up))(?:\.default)?(?:\.weight)?"
    r"|lora(?:_linear_layer)?\.(?:(down)|up)\.weight)"
)
PARTS = re.compile(r"(.+)\.(alpha|diff|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|dora_scale)")
# DoRA's lengths as peft calls them.
LENGTHS = re.compile(r"(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
# A LoRA file's layer that changes q, k and v at once, in names with dots or underscores.
PACKED_LORA = re.compile(r"(.*attention[._])qkv\.(.+)")
# Parts of a change whose rows are the layer's.
LORA_ROWS = re.compile(
    r"lora_(?:B|up)(?:\.default)?(?:\.weight)?|lora(?:_linear_layer)?\.up\.weight"
    r"|hada_w[12]_a|diff|set_weight"
)


class Change(NamedTuple):
    """What an adapter holds for one weight."""

    parts: Mapping[str, Tensor]  # down and up; or hada_w1_a ...; or lokr_w1 ...; or diff
    alpha: float | None  # None for the rank, a factor of 1

    def rows(self, strength: float, weight: Tensor) -> Tensor:
        """What is added to a weight: (N, K), float32, where K is what one row of it holds.

        DoRA's row or column of lengths replaces those of the sum; strength goes from the weight as
        it is, at 0, to that, at 1. Raises RuntimeError, KeyError or IndexError where the parts do
        not fit one another."""
        if "dora_scale" not in self.parts:
            return self.product(strength)
        product, lengths = self.product(1.0), self.parts["dora_scale"].float()
        before = weight.to(product.device, torch.float32).flatten(1)
        changed = before + product
        of_rows = len(lengths) == len(changed)
        norms = changed.norm(dim=1 if of_rows else 0, keepdim=True).clamp_min(1e-30)
        return strength * (lengths.view(norms.shape) / norms * changed - before)

    def product(self, strength: float) -> Tensor:
        """What LoRA, LoHa, LoKr or a difference adds: (N, K), float32."""
        parts = {name: tensor.float() for name, tensor in self.parts.items()}
        if "diff" in parts:
            return strength * parts["diff"].flatten(1)
        if "up" in parts or "down" in parts:
            return self.factor(strength) * parts["up"].flatten(1) @ parts["down"].flatten(1)
        if "hada_w1_a" in parts:
            first, second = (parts[f"hada_w{n}_a"] @ parts[f"hada_w{n}_b"] for n in (1, 2))
            return self.factor(strength) * first * second
        factors = []
        for name in ("lokr_w1", "lokr_w2"):
            if name not in parts:
                parts[name] = parts[f"{name}_a"] @ parts[f"{name}_b"]
            factors.append(parts[name])
        return self.factor(strength) * torch.kron(*factors)

    @property
    def low_rank(self) -> bool:
        """Whether it is a LoRA, two factors and no more: down (R, K) and up (N, R)."""
        return self.parts.keys() == {"down", "up"}

    def factor(self, strength: float) -> float:
        """strength * alpha / rank; a product of whole matrices has no rank, and no alpha."""
        ranked = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        rank = next((len(self.parts[name]) for name in ranked if name in self.parts), None)
        return strength if rank is None or self.alpha is None else strength * self.alpha / rank


class Recorded(NamedTuple):
    """The alpha of all layers, and those of layers by pattern, as peft records them."""

    alpha: float | None
    patterns: Mapping[str, float]

    def of(self, weight: str) -> float | None:
        """The alpha of a weight; None where none is recorded."""
        layer = weight.removesuffix(".weight")
        for pattern, alpha in self.patterns.items():
            if f".{layer}".endswith(f".{pattern}"):
                return float(alpha)
        return self.alpha


def split_packed_lora(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the changes of packed q, k and v into one change for each, under the file's own
    tensor names.

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
    if "dora_scale" in parts and parts["dora_scale"].shape[0] == 1:
        return None  # lengths of columns, which go through q, k and v
    if any(part.startswith("lokr_") for part in parts):
        rows = next((parts[part].shape[0] for part in ("lokr_w1", "lokr_w1_a") if part in parts), 0)
        if not rows:
            return None
        if rows % 3:
            if "dora_scale" in parts:
                return None
            factors = {part: tensor for part, tensor in parts.items() if part != "alpha"}
            alpha = float(parts["alpha"]) if "alpha" in parts else None
            try:
                change = Change(factors, alpha).product(1.0)
            except (KeyError, RuntimeError):  # a damaged file, which `changes` names
                return None
            return [{"diff": third} for third in change.chunk(3)]
    elif not any(LORA_ROWS.fullmatch(part) for part in parts):
        return None
    thirds: list[dict[str, Tensor]] = [{}, {}, {}]
    for part, tensor in parts.items():
        of_rows = LORA_ROWS.fullmatch(part) or part in ("lokr_w1", "lokr_w1_a", "dora_scale")
        pieces = tensor.chunk(3) if of_rows else [tensor] * 3
        if len(pieces) != 3 or pieces[0].shape != pieces[2].shape:
            return None
        for third, piece in zip(thirds, pieces):
            third[part] = piece
    return thirds


def changes(lora: Layout, base: Layout) -> dict[str, Change]:
    """Return what the adapter adds to which weight of the base, by published name.

    Raises CheckpointError where something has no place."""
    weights = lora_targets(base.tensors)
    tensors: dict[str, Tensor] = {}
    for file in lora.files:
        tensors |= load_file(file)
    recorded = recorded_alphas(lora)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in split_packed_lora(tensors).items():
        if factor := FACTOR.fullmatch(key):
            layer, part = factor[1], "down" if factor[2] or factor[3] else "up"
        elif other := PARTS.fullmatch(key):
            layer, part = other[1], other[2]
        elif lengths := LENGTHS.fullmatch(key):
            layer, part = lengths[1], "dora_scale"
        else:
            layer, part = key, ""
        if layer not in weights or not part:
            raise CheckpointError(
                f"{lora.path.name}: {key} belongs to nothing in {base.path.name}. Merging takes"
                " LoRA, DoRA, LoHa, LoKr and differences of L2P's layers; others load in ComfyUI"
            )
        its = parts.setdefault(weights[layer], {})
        if part in its:
            raise CheckpointError(
                f"{lora.path.name} has {weights[layer]} under two names, of which one is {key}"
            )
        its[part] = tensor
    return {
        weight: checked_change(lora, base, weight, its, recorded) for weight, its in parts.items()
    }


def checked_change(
    lora: Layout,
    base: Layout,
    weight: str,
    parts: dict[str, Tensor],
    recorded: Recorded,
) -> Change:
    """Return the change of one weight. Raises CheckpointError where it does not fit the weight."""
    source = base.tensors[weight]
    alpha = parts.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise CheckpointError(
            f"{lora.path.name}: the alpha for {weight} is {tuple(alpha.shape)}; expected one number"
        )
    change = Change(parts, recorded.of(weight) if alpha is None else float(alpha))
    wanted = source.shape[0], math.prod(source.shape[1:])
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    try:
        on_meta = Change({name: tensor.to("meta") for name, tensor in parts.items()}, change.alpha)
        found = tuple(on_meta.rows(1.0, torch.empty(wanted, device="meta")).shape)
    except KeyError as missing:
        raise CheckpointError(
            f"{lora.path.name} has {', '.join(shapes) or 'an alpha alone'} for {weight}, but no"
            f" {missing.args[0]}. The file is damaged"
        ) from None
    except (RuntimeError, IndexError):
        found = None
    if found != wanted:
        raise CheckpointError(
            f"{lora.path.name}: what it has for {weight} is {shapes}, which makes no"
            f" {source.shape}. Give the model it was trained on"
        )
    return change


def recorded_alphas(lora: Layout) -> Recorded:
    """Return the alphas of a file that has no tensors for them.

    From the metadata that diffusers writes, or the adapter_config.json that peft writes beside."""
    try:
        facts = json.loads(lora.metadata.get("lora_adapter_metadata", "{}"))
        facts = {key.removeprefix("transformer."): value for key, value in facts.items()}
        config = Path(lora.files[0]).with_name("adapter_config.json")
        if not facts and config.is_file():
            facts = json.loads(config.read_text(encoding="utf-8"))
        alpha, rank = facts.get("lora_alpha"), facts.get("r")
        if facts.get("use_rslora") and alpha is not None:
            alpha = alpha * math.sqrt(rank)  # its factor is alpha / sqrt(rank)
        return Recorded(None if alpha is None else float(alpha), facts.get("alpha_pattern") or {})
    except (OSError, ValueError, TypeError, AttributeError):
        raise CheckpointError(
            f"{lora.path.name}: its alpha can't be read from its metadata or from"
            " adapter_config.json, which is no JSON of peft. Correct or remove it"
        ) from None


class AddedLinear(nn.Module):
    """An INT8 layer, and beside it what adapters add: y = layer(x) + up (down x) + change x.

    layer: (K) → (N). down: (R, K) and up: (N, R), of all LoRAs together, strength and alpha in
    `up`. change: (N, K), of other adapters. Either may be None."""

    down: Tensor | None
    up: Tensor | None
    change: Tensor | None

    def __init__(
        self, layer: nn.Module, down: Tensor | None, up: Tensor | None, change: Tensor | None
    ):
        super().__init__()
        self.layer = layer
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.register_buffer("change", change)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N), in the input's dtype."""
        y = self.layer(x)
        if self.down is not None and self.up is not None:
            y = y + functional.linear(functional.linear(x, self.down), self.up)
        if self.change is not None:
            y = y + functional.linear(x, self.change)
        return y


def read_lora(lora: Layout, base: Layout, strength: float) -> dict[str, Change]:
    """Return what a LoRA file changes in a model, by the published names of weights.

    Raises CheckpointError where the file is no LoRA or does not fit the model, and ValueError for a
    strength that is no number."""
    if lora.kind != "lora":
        raise CheckpointError(
            f"{lora.path.name} is no LoRA. Give a LoRA of this model here, and a model as the"
            " checkpoint"
        )
    if not math.isfinite(strength):
        raise ValueError(f"the strength of {lora.path.name} is {strength}; expected a number")
    return changes(lora, base)


@torch.no_grad()
def add_changes(
    model: L2PTransformer, adapters: Sequence[tuple[Mapping[str, Change], float]]
) -> None:
    """Change a loaded model by adapters, each with its strength.

    A floating-point weight becomes the sum, rounded once. An INT8 weight stays as it is, and what
    is added to it is computed beside it, in the dtype of the model. Raises CheckpointError where a
    weight gets NaN or infinite numbers."""
    by_weight: dict[str, list[tuple[Change, float]]] = {}
    for changed, strength in adapters:
        for name, change in changed.items():
            by_weight.setdefault(name, []).append((change, strength))
    dtype = model.dtype
    for name, added in by_weight.items():
        layer_name = name.removesuffix(".weight")
        layer = model.get_submodule(layer_name)
        if isinstance(layer, Int8Linear):
            model.set_submodule(layer_name, beside(layer, added, dtype))
            continue
        weight = layer.weight
        rows = sum(change.rows(strength, weight) for change, strength in added)
        changed_weight = (weight.float() + rows.to(weight.device).view_as(weight)).to(weight.dtype)
        if not changed_weight.isfinite().all():
            raise CheckpointError(
                f"{name} with the LoRA holds NaN or infinite numbers. A file is damaged, or the"
                " strength is too high"
            )
        layer.weight = nn.Parameter(changed_weight, requires_grad=False)


def beside(
    layer: Int8Linear, added: Sequence[tuple[Change, float]], dtype: torch.dtype
) -> AddedLinear:
    """Return an INT8 layer with what adapters add to it, kept in that dtype."""
    device = layer.weight.device
    downs, ups, rest = [], [], []
    for change, strength in added:
        if change.low_rank:
            downs.append(change.parts["down"].float())
            ups.append(change.factor(strength) * change.parts["up"].float())
        else:
            rest.append(change.rows(strength, layer.dequantized()))
    return AddedLinear(
        layer,
        torch.cat(downs).to(device, dtype) if downs else None,
        torch.cat(ups, 1).to(device, dtype) if ups else None,
        torch.stack(rest).sum(0).to(device, dtype) if rest else None,
    )
