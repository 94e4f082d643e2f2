"""Prompts to features: Z-Image's text encoder, a Qwen3 language model, through transformers."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from .files.content import left_by_system
from .files.header import CheckpointError, read_header, refuse_zeros
from .files.layout import FLOATS, UNSCALED
from .files.quantization import BESIDE_WEIGHTS, multiplied_out

if TYPE_CHECKING:  # it takes seconds to import, so not before it is needed
    import transformers

# What Qwen3's own chat template gives for one user turn with thinking enabled. The prompt goes in
# as it is.
TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
# of the whole templated prompt; the published pipeline cuts the rest off, and so do we
MAX_TOKENS = 512
MAX_SIZES = {  # far above Qwen3-4B's; a hostile file may say anything
    "vocab_size": 1_000_000,
    "hidden_size": 32_768,
    "head_dim": 4096,
    "num_hidden_layers": 500,
    "intermediate_size": 262_144,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
}
LAYER = -2  # the features are what the last layer takes in: no final norm


class TextEncoder:
    """Turns prompts into the features that an L2P model was trained on."""

    def __init__(
        self, model: transformers.Qwen3Model, tokenizer: transformers.PreTrainedTokenizerBase
    ):
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(
        cls,
        encoder: str | Path,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> TextEncoder:
        """encoder: a Hugging Face folder, a folder that holds one as `text_encoder/`, or ComfyUI's
        single file. tokenizer: its folder; by default `tokenizer/` in or beside the encoder. Raises
        CheckpointError."""
        from transformers import AutoTokenizer

        encoder = find_encoder(encoder)
        for file in encoder_files(encoder):
            refuse_zeros(file)
        tokenizer_folder = find_tokenizer(encoder, tokenizer)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                tokenizer_folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever transformers makes of a damaged file
            refuse_code(tokenizer_folder)
            raise CheckpointError(
                f"{tokenizer_folder} holds no tokenizer that transformers can read: {error}"
            ) from None
        model = (
            load_folder(encoder, dtype) if encoder.is_dir() else load_single_file(encoder, dtype)
        )
        return cls(model.to(device).eval(), tokenizer)

    def encode(self, prompt: str) -> Tensor:
        """(L, width) features of one prompt, L its number of tokens with the template's, at most
        512. Warns if cut."""
        ids = self.tokenizer(TEMPLATE.replace("{prompt}", prompt), add_special_tokens=False)[
            "input_ids"
        ]
        if len(ids) > MAX_TOKENS:
            warnings.warn(
                f"the prompt takes {len(ids)} tokens with its template, {MAX_TOKENS} are read: the"
                f" last {len(ids) - MAX_TOKENS} are left out (it begins {prompt[:40]!r})",
                stacklevel=2,
            )
        ids = torch.tensor([ids[:MAX_TOKENS]], device=self.model.device)
        with torch.no_grad():
            features = self.model(ids, output_hidden_states=True, use_cache=False).hidden_states[
                LAYER
            ][0]
        if not features.isfinite().all():
            raise CheckpointError(
                f"the text encoder gives NaN in {features.dtype}: its file is damaged, or its"
                " numbers overflow; bfloat16 has the range of float32"
            )
        return features


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


def find_tokenizer(encoder: Path, tokenizer: str | Path | None) -> Path:
    """The tokenizer's folder: the one given, else `tokenizer/` in or beside the encoder. Raises
    CheckpointError."""
    candidates = (
        [Path(tokenizer)]
        if tokenizer
        else [encoder, encoder / "tokenizer", encoder.parent / "tokenizer"]
    )
    for folder in candidates:
        if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
            return folder
    raise CheckpointError(
        f"no tokenizer in {' or '.join(map(str, candidates))}: expected a folder with"
        " tokenizer.json. Give the tokenizer/ folder of Tongyi-MAI/Z-Image-Turbo or Qwen/Qwen3-4B"
    )


def refuse_code(folder: Path) -> None:
    """Raise CheckpointError where a folder's settings name Python code that comes with it
    (`auto_map`)."""
    for name in ("tokenizer_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        try:
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(settings, dict) and "auto_map" in settings:
            raise CheckpointError(
                f"{folder / name} names Python code of its own (auto_map), which this program never"
                " runs. Use the tokenizer/ and text_encoder/ folders of Tongyi-MAI/Z-Image-Turbo"
            )


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


def load_folder(folder: Path, dtype: torch.dtype) -> transformers.Qwen3Model:
    """A Hugging Face folder: config.json with one or more .safetensors files."""
    from transformers import Qwen3Config, Qwen3Model
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it would warn of is an error here
    try:
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} has no config.json. Give the text_encoder/ folder of"
                " Tongyi-MAI/Z-Image-Turbo"
            )
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings.get("model_type")
        if kind != "qwen3":
            raise CheckpointError(
                f"{folder} holds a model of type {kind}, expected qwen3. Give the text_encoder/"
                " folder of Tongyi-MAI/Z-Image-Turbo"
            )
        check_sizes(settings, str(folder))
        config = Qwen3Config.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, loaded = (
            # attn_implementation: else config.json may name a kernel to download
            Qwen3Model.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                attn_implementation="sdpa",
            )
        )
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers makes of a damaged file
        raise CheckpointError(
            f"{folder} holds no Qwen3 text encoder that transformers can read: {error}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if lacking := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
        raise CheckpointError(
            f"{folder} lacks {len(lacking)} of the text encoder's tensors, or has them in another"
            f" shape (first: {lacking[0]}). Get it again"
        )
    return model


def load_single_file(file: Path, dtype: torch.dtype) -> transformers.Qwen3Model:
    """ComfyUI's qwen_3_4b.safetensors: the tensors alone, so the configuration is read off their
    shapes."""
    from transformers import Qwen3Config, Qwen3Model

    entries, _ = read_header(file)
    shapes = {key.removeprefix("model."): entry.shape for key, entry in entries.items()}
    if "embed_tokens.weight" not in shapes or "layers.0.self_attn.q_norm.weight" not in shapes:
        raise CheckpointError(
            f"{file.name} is no Qwen3 text encoder: it lacks embed_tokens or q_norm. Give "
            "qwen_3_4b.safetensors, or the text_encoder/ folder of Tongyi-MAI/Z-Image-Turbo"
        )
    for key, entry in entries.items():
        if entry.dtype not in (*FLOATS, *UNSCALED) and not key.endswith(BESIDE_WEIGHTS):
            raise CheckpointError(
                f"{file.name} is quantized ({key} is {entry.dtype}); give the BF16"
                " qwen_3_4b.safetensors"
            )
    try:
        sizes = qwen3_sizes(shapes)
    except KeyError as missing:
        raise CheckpointError(
            f"{file.name} is not a whole Qwen3 text encoder: it lacks {missing.args[0]}. Get it"
            " again"
        ) from None
    except (ValueError, IndexError, ZeroDivisionError):
        raise CheckpointError(
            f"{file.name} is no Qwen3 text encoder: its tensors have other shapes. Get it again"
        ) from None
    check_sizes(sizes, file.name)
    config = Qwen3Config(**sizes)
    with torch.device("meta"):
        model = Qwen3Model(config)
    model.rotary_emb = type(model.rotary_emb)(model.config)  # its table is computed, not loaded
    try:
        kept = multiplied_out(load_file(file), dtype)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file.name} is quantized in a way that is not supported here ({error}); give the BF16"
            " qwen_3_4b.safetensors"
        ) from None
    tensors = {key.removeprefix("model."): tensor for key, tensor in kept.items()}
    tensors.pop("lm_head.weight", None)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{file.name} is not a whole Qwen3 text encoder: {str(error).splitlines()[-1].strip()}"
        ) from None
    return model


def qwen3_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | float]:
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
