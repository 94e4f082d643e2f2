"""Qwen3 as the language model that it is: instructions in, answers out.

The text encoder of Z-Image is a whole Qwen3-4B whose output layer is its embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files.header import CheckpointError
from ..qwen3 import Past

if TYPE_CHECKING:
    from ..text import TextEncoder

# What Qwen3's own chat template gives for one user turn without thinking.
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
END = "<|im_end|>"
MAX_NEW_TOKENS = 128
# Sampling without thinking, as Qwen3-4B's model card recommends it.
TEMPERATURE, TOP_K, TOP_P = 0.7, 20, 0.8


@torch.no_grad()
def answer(encoder: TextEncoder, instructions: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Return the language model's answer to each instruction; its seed decides what is sampled.

    Raises CheckpointError where the tokenizer is of another model, or the model gives NaN."""
    model, tokenizer = encoder.model, encoder.tokenizer
    end = tokenizer.token_to_id(END)
    if end is None:
        raise CheckpointError(
            f"the tokenizer has no token {END}, so its model writes no answers. Give the tokenizer/"
            " folder of Tongyi-MAI/Z-Image-Turbo or Qwen/Qwen3-4B"
        )
    texts = [CHAT.format(instruction) for instruction in instructions]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    # Rows are filled up on the left, so that the next token of all has the same place. RoPE tells
    # differences of places alone.
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(each)) + each for each in prompts])  # (B, L)
    real = torch.tensor([[False] * (longest - len(each)) + [True] * len(each) for each in prompts])
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = causal & real[:, None] | torch.eye(longest, dtype=torch.bool)  # (B, L, L)

    past = [Past() for _ in model.layers]
    written = torch.empty(len(prompts), 0, dtype=torch.long)
    for _ in range(MAX_NEW_TOKENS):
        logits = model.continued(ids.to(model.device), past, mask[:, None].to(model.device))
        if not logits.isfinite().all():
            raise CheckpointError(
                f"the language model gives NaN in {logits.dtype}: its file is damaged, or its"
                " numbers overflow; bfloat16 has the range of float32"
            )
        ids = sample(logits.float().cpu(), generators)[:, None]
        written = torch.cat([written, ids], 1)
        if (written == end).any(1).all():
            break
        real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
        mask = real[:, None]
    return [tokenizer.decode(until(row, end)) for row in written.tolist()]


def until(tokens: list[int], end: int) -> list[int]:
    """Return the tokens before the end of an answer."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


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
