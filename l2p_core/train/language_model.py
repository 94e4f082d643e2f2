"""Qwen3 as the language model that it is: instructions in, answers out.

The text encoder of Z-Image is a whole Qwen3-4B whose output layer is its embedding. Through
transformers, which comes with the extra `synthesize`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files.header import CheckpointError, refuse_zeros
from ..text import check_sizes, encoder_files, find_encoder
from ..tokenizer import find_tokenizer

if TYPE_CHECKING:
    import transformers

# What Qwen3's own chat template gives for one user turn without thinking.
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
END = "<|im_end|>"
MAX_NEW_TOKENS = 128
# Sampling without thinking, as Qwen3-4B's model card recommends it.
TEMPERATURE, TOP_K, TOP_P = 0.7, 20, 0.8


class LanguageModel:
    """Answers instructions, several at a time."""

    def __init__(
        self, model: transformers.Qwen3Model, tokenizer: transformers.PreTrainedTokenizerBase
    ):
        self.model, self.tokenizer = model, tokenizer
        self.end = tokenizer.convert_tokens_to_ids(END)

    @classmethod
    def load(
        cls,
        encoder: str | Path,
        tokenizer: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> LanguageModel:
        """Load a Hugging Face folder of a Qwen3, or one that holds it as `text_encoder/`.

        tokenizer: its folder; by default `tokenizer/` in or beside the encoder. Raises
        CheckpointError, and ImportError where transformers is not installed."""
        try:
            from transformers import AutoTokenizer, Qwen3Model
        except ImportError:
            raise ImportError(
                "writing prompts needs transformers: pip install 'comfyui-l2p[synthesize]'"
            ) from None
        folder = find_encoder(encoder)
        files = encoder_files(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder.name} is a single file; writing prompts takes the text_encoder/ folder of"
                " Tongyi-MAI/Z-Image-Turbo, or Qwen/Qwen3-4B"
            )
        for file in files:
            refuse_zeros(file)
        offline = {"local_files_only": True, "trust_remote_code": False}
        try:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if settings.get("model_type") != "qwen3":
                raise ValueError(f"its model_type is {str(settings.get('model_type'))[:40]}")
            check_sizes(settings, str(folder))
            words = AutoTokenizer.from_pretrained(find_tokenizer(folder, tokenizer), **offline)
            model, loaded = Qwen3Model.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="sdpa",  # else config.json may name a kernel to download
                output_loading_info=True,
                **offline,
            )
            if lacking := [*loaded["missing_keys"], *loaded["mismatched_keys"]]:
                raise ValueError(f"it lacks {len(lacking)} tensors (first: {lacking[0]})")
        except CheckpointError:
            raise
        except Exception as error:  # whatever transformers makes of a damaged folder
            raise CheckpointError(
                f"{folder} holds no Qwen3 language model that can be read: {error}. Give the"
                " text_encoder/ folder of Tongyi-MAI/Z-Image-Turbo, or Qwen/Qwen3-4B"
            ) from None
        return cls(model.to(device).eval(), words)

    @torch.no_grad()
    def answer(self, instructions: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Return an answer to each instruction; its seed decides what is sampled."""
        texts = [CHAT.format(instruction) for instruction in instructions]
        prompts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(each)) + each for each in prompts])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
        positions = (mask.cumsum(1) - 1).clamp_min(0)  # (B, L), padded on the left
        device = self.model.device
        cache, written = None, []
        for _ in range(MAX_NEW_TOKENS):
            out = self.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            logits = out.last_hidden_state[:, -1] @ self.model.embed_tokens.weight.T  # (B, V)
            if not logits.isfinite().all():
                raise CheckpointError(
                    f"the language model gives NaN in {logits.dtype}: its file is damaged, or its"
                    " numbers overflow; --device cpu computes in bfloat16, with the range of"
                    " float32"
                )
            ids = sample(logits.float().cpu(), generators)[:, None]
            written.append(ids)
            tokens = torch.cat(written, 1)  # (B, L)
            if (tokens == self.end).any(1).all():
                break
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
        return [self.text_of(row) for row in tokens.tolist()]

    def text_of(self, tokens: list[int]) -> str:
        """Return the text of an answer up to its end."""
        until = tokens.index(self.end) if self.end in tokens else len(tokens)
        return self.tokenizer.decode(tokens[:until], skip_special_tokens=True)


def sample(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return a token for each row of logits, (B, V) → (B,).

    It is drawn from the likeliest `TOP_K`, of those from the likeliest that make up `TOP_P`."""
    values, tokens = logits.topk(min(TOP_K, logits.shape[1]))
    likely = (values / TEMPERATURE).softmax(1)
    likely[likely.cumsum(1) - likely >= TOP_P] = 0  # the sum of those before it
    places = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(likely, generators, strict=True)
    ]
    return tokens.gather(1, torch.stack(places))[:, 0]
