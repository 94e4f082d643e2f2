"""A text encoder that transformers runs, with the interface of `Qwen3`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .files.header import CheckpointError
from .tokenizer import read_json


class TransformersEncoder(nn.Module):
    """The language model of a folder of transformers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def config(self):
        """The sizes, under the names of config.json."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device

    def forward(self, ids: Tensor, hidden_states: tuple[int, ...], length: int) -> Tensor:
        """Return hidden states, numbered as transformers numbers them and joined along the width:
        (B, L, D * their number). length: tokens before the padding, which no token attends to."""
        real = torch.arange(ids.shape[1], device=ids.device) < length
        mask = real.expand(ids.shape).long()
        states = self.model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.cat([states[number] for number in hidden_states], -1)


def load_encoder(folder: Path, model_type: str, dtype: torch.dtype) -> TransformersEncoder:
    """Load the language model of a folder; vision towers are left out.

    Raises CheckpointError where the folder holds no model of that type, and ImportError without
    transformers."""
    config = folder / "config.json"
    found = read_json(config).get("model_type") if config.is_file() else "no config.json"
    if found != model_type:
        raise CheckpointError(
            f"{folder} holds a text encoder of type {str(found)[:40]}; expected {model_type}. Give"
            " the text_encoder/ folder of the latent model"
        )
    try:
        from transformers import AutoModel
    except ImportError:
        raise ImportError(
            f"a text encoder of type {model_type} needs transformers:"
            " pip install 'comfyui-l2p[backbones]'"
        ) from None
    try:
        model, info = AutoModel.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise CheckpointError(
            f"transformers can't load the text encoder {folder} ({reason}). Get it again"
        ) from None
    if missing := sorted(info["missing_keys"]):  # transformers would make them up
        raise CheckpointError(
            f"the text encoder {folder} lacks {len(missing)} tensors (first: {missing[0]}). Get it"
            " again"
        )
    return TransformersEncoder(getattr(model, "language_model", model))
