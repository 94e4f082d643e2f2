"""Prompts to features: the text encoder, a Qwen3 language model, with its tokenizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .config import Z_IMAGE_PROMPTS, PromptFormat
from .files.content import left_by_system
from .files.header import CheckpointError, find_files, read_header, reject_zeros
from .files.layout import FLOATS, UNSCALED
from .files.quantization import BESIDE_WEIGHTS, dequantize_all
from .qwen3 import Qwen3, Qwen3Config
from .tokenizer import find_tokenizer, load_tokenizer, read_json
from .transformers_encoder import TransformersEncoder, load_encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEMPLATE, (LAYER,), *_ = Z_IMAGE_PROMPTS
PADDING = "<|endoftext|>"  # Qwen3's token of it
# of the whole templated prompt; the published pipeline cuts the rest off, and so do we
MAX_TOKENS = 512
UNUSED = ("lm_head.weight", "rotary_emb.inv_freq")  # tensors that may lie in a file
MAX_SIZES = {  # far above Qwen3-4B's; a hostile file may say anything
    "vocab_size": 1_000_000,
    "hidden_size": 32_768,
    "head_dim": 4096,
    "num_hidden_layers": 500,
    "intermediate_size": 262_144,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
}


class TextEncoder:
    """Turns prompts into the features that an L2P model was trained on."""

    def __init__(
        self,
        model: Qwen3 | TransformersEncoder,
        tokenizer: Tokenizer,
        prompts: PromptFormat = Z_IMAGE_PROMPTS,
    ):
        """prompts: template, hidden states and padding of the model that takes the features.

        Raises CheckpointError where the text encoder lacks one of the hidden states."""
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        check_layers(model.config.num_hidden_layers, prompts)

    @classmethod
    def load(
        cls,
        encoder: str | Path,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        prompts: PromptFormat = Z_IMAGE_PROMPTS,
    ) -> TextEncoder:
        """encoder: a Hugging Face folder, a folder that holds one as `text_encoder/`, or ComfyUI's
        single file. tokenizer: its folder; by default `tokenizer/` in or beside the encoder.
        prompts: see `__init__`. Raises CheckpointError."""
        encoder = find_encoder(encoder)
        for file in encoder_files(encoder):
            reject_zeros(file)
        words = load_tokenizer(find_tokenizer(encoder, tokenizer))
        model: Qwen3 | TransformersEncoder
        if prompts.model_type == Z_IMAGE_PROMPTS.model_type:
            model = load_qwen3(encoder, dtype)
        else:
            model = load_encoder(encoder, prompts.model_type, dtype)
        return cls(model.to(device).eval(), words, prompts)

    def token_ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt in its template, all of them."""
        templated = self.prompts.template.replace("{prompt}", prompt)
        return self.tokenizer.encode(templated, add_special_tokens=False).ids

    def encode(self, prompt: str) -> Tensor:
        """(L, width) features of one prompt, L its number of tokens with the template's, at most
        512, or padded to that where the model takes padding; without the tokens that its format
        drops. Warns if cut."""
        ids = self.token_ids(prompt)
        if len(ids) > MAX_TOKENS:
            warnings.warn(
                f"the prompt takes {len(ids)} tokens with its template, {MAX_TOKENS} are read: the"
                f" last {len(ids) - MAX_TOKENS} are left out (it begins {prompt[:40]!r})",
                stacklevel=2,
            )
        if max(ids) >= self.model.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer gives token {max(ids)}, and the text encoder knows"
                f" {self.model.config.vocab_size}. Give the tokenizer that belongs to it"
            )
        ids = ids[:MAX_TOKENS]
        length = len(ids)
        if self.prompts.pad_to:
            padding = padding_id(self.tokenizer, self.model.config.vocab_size)
            ids += [padding] * (self.prompts.pad_to - length)
        with torch.no_grad():
            tokens = torch.tensor([ids], device=self.model.device)
            features = self.model(tokens, self.prompts.hidden_states, length)[0]
        if not features.isfinite().all():
            raise CheckpointError(
                f"the text encoder gives NaN in {features.dtype}: its file is damaged, or its"
                " numbers overflow; bfloat16 has the range of float32"
            )
        return features[self.prompts.drop :]


def check_layers(layers: int, prompts: PromptFormat) -> None:
    """Raise CheckpointError where a text encoder of so many layers lacks one of the hidden
    states."""
    if max(prompts.hidden_states) >= layers:
        raise CheckpointError(
            f"the text encoder has {layers} layers; this checkpoint takes the hidden state"
            f" {max(prompts.hidden_states)}. Give the text encoder it was trained with"
        )


def padding_id(tokenizer: Tokenizer, vocab_size: int) -> int:
    """The id of the token that prompts are padded with. Raises CheckpointError."""
    found = tokenizer.token_to_id(PADDING)
    if found is None or found >= vocab_size:
        raise CheckpointError(
            f"the tokenizer has no {PADDING}, with which this checkpoint's prompts are padded."
            " Give the tokenizer of its text encoder"
        )
    return found


def find_encoder(path: str | Path) -> Path:
    """The encoder itself: `text_encoder/` where the path is a folder that holds one, else the
    path."""
    inside = Path(path) / "text_encoder"
    return inside if inside.is_dir() else Path(path)


def encoder_files(encoder: Path) -> list[Path]:
    """The files of a text encoder's weights. Raises CheckpointError where it does not exist."""
    if not encoder.exists():
        raise CheckpointError(
            f"the text encoder {encoder} does not exist. Give the text_encoder/ folder of "
            "Tongyi-MAI/Z-Image-Turbo, or qwen_3_4b.safetensors"
        )
    if not encoder.is_dir():
        return [encoder]
    return sorted(file for file in encoder.glob("*.safetensors") if not left_by_system(file))


def check_sizes(sizes: Mapping[str, object], name: str) -> None:
    """Raise CheckpointError where a Qwen3's configuration is of no size that a model has, before it
    is built."""
    for key, most in MAX_SIZES.items():
        value = sizes.get(key, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise CheckpointError(
                f"{name} is no Qwen3 text encoder: its {key} is {str(value)[:40]}; expected a whole"
                f" number from 1 to {most}. Give the text_encoder/ folder of"
                " Tongyi-MAI/Z-Image-Turbo"
            )


def load_qwen3(encoder: Path, dtype: torch.dtype) -> Qwen3:
    """Return the model of a Hugging Face folder, sharded or not, or of ComfyUI's single file.

    Raises CheckpointError."""
    settings = read_config(encoder) if encoder.is_dir() else {}
    whole = encoder / "model.safetensors"  # other files may lie beside it
    files = [whole] if whole.is_file() else find_files(encoder)[0]
    entries = {key: entry for file in files for key, entry in read_header(file)[0].items()}
    for key, entry in entries.items():
        if entry.dtype not in (*FLOATS, *UNSCALED) and not key.endswith(BESIDE_WEIGHTS):
            raise CheckpointError(
                f"{encoder.name} is quantized ({key} is {entry.dtype}); give the BF16"
                " qwen_3_4b.safetensors"
            )
    shapes = {key.removeprefix("model."): entry.shape for key, entry in entries.items()}
    config = config_of(shapes, settings, encoder)

    with torch.device("meta"):
        model = Qwen3(config)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if lacking := [key for key in expected if shapes.get(key) != expected[key]]:
        raise CheckpointError(
            f"{encoder.name} is not a whole Qwen3 text encoder: it lacks {len(lacking)} of the"
            f" {len(expected)} tensors, or has them in another shape (first: {lacking[0]}). Get it"
            " again"
        )
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    try:
        kept = dequantize_all(stored, dtype)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{encoder.name} is quantized in a way that is not supported here ({error}); give the"
            " BF16 qwen_3_4b.safetensors"
        ) from None
    tensors = {key.removeprefix("model."): tensor for key, tensor in kept.items()}
    if other := [key for key in tensors if key not in expected and not key.endswith(UNUSED)]:
        raise CheckpointError(
            f"{encoder.name} has {len(other)} tensors that a Qwen3 text encoder lacks (first:"
            f" {other[0]}). Give the text_encoder/ folder of Tongyi-MAI/Z-Image-Turbo"
        )
    model.load_state_dict({key: tensors[key] for key in expected}, assign=True)
    return model


def read_config(folder: Path) -> dict:
    """Return a folder's config.json. Raises CheckpointError unless its model is a Qwen3 that
    computes as the published one does."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json. Give the text_encoder/ folder of"
            " Tongyi-MAI/Z-Image-Turbo"
        )
    settings = read_json(folder / "config.json")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        rope = {"rope_type": rope}
    settings.setdefault("rope_theta", rope.get("rope_theta", 1e6))
    for what, found, usual in (
        ("type", settings.get("model_type"), "qwen3"),
        ("activation", settings.get("hidden_act", "silu"), "silu"),
        ("RoPE type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("sliding window", settings.get("use_sliding_window", False), False),
    ):
        if found != usual:
            raise CheckpointError(
                f"{folder} holds a model of {what} {str(found)[:40]}, expected {usual}. Give the"
                " text_encoder/ folder of Tongyi-MAI/Z-Image-Turbo"
            )
    return settings


def config_of(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping, encoder: Path
) -> Qwen3Config:
    """Return the configuration by the tensors' shapes, named without `model.`, and by settings of
    config.json where there are any. Raises CheckpointError where they disagree."""
    if "embed_tokens.weight" not in shapes or "layers.0.self_attn.q_norm.weight" not in shapes:
        raise CheckpointError(
            f"{encoder.name} is no Qwen3 text encoder: it lacks embed_tokens or q_norm. Give "
            "qwen_3_4b.safetensors, or the text_encoder/ folder of Tongyi-MAI/Z-Image-Turbo"
        )
    try:
        sizes = qwen3_sizes(shapes)
    except KeyError as missing:
        raise CheckpointError(
            f"{encoder.name} is not a whole Qwen3 text encoder: it lacks {missing.args[0]}. Get it"
            " again"
        ) from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise CheckpointError(
            f"{encoder.name} is no Qwen3 text encoder: its tensors have other shapes. Get it again"
        ) from None
    check_sizes(sizes, encoder.name)
    for key in MAX_SIZES:
        if settings.get(key, sizes[key]) != sizes[key]:
            raise CheckpointError(
                f"{encoder} is damaged or mixes models: in config.json its {key} is"
                f" {str(settings[key])[:40]}; expected {sizes[key]}, as in its tensors. Get it"
                " again"
            )
    for key in ("rms_norm_eps", "rope_theta"):
        sizes[key] = value = settings.get(key, sizes[key])
        if not isinstance(value, (int, float)) or not 0 < value < 1e12:
            raise CheckpointError(
                f"{encoder} is damaged: in config.json its {key} is {str(value)[:40]}; expected a"
                " positive number. Get it again"
            )
    return Qwen3Config(**sizes)


def qwen3_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration of a Qwen3 by the shapes of its tensors, named without `model.`. Raises
    KeyError."""
    (head_dim,) = shapes["layers.0.self_attn.q_norm.weight"]
    vocab_size, hidden_size = shapes["embed_tokens.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "head_dim": head_dim,
        "num_hidden_layers": (
            1
            + max(
                int(key.split(".")[1]) for key in shapes if re.match(r"layers\.[0-9]{1,4}\.", key)
            )
        ),
        "intermediate_size": shapes["layers.0.mlp.gate_proj.weight"][0],
        "num_attention_heads": shapes["layers.0.self_attn.q_proj.weight"][0] // head_dim,
        "num_key_value_heads": shapes["layers.0.self_attn.k_proj.weight"][0] // head_dim,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }
