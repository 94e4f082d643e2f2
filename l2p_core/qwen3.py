"""Qwen3, the language model that is the text encoder: token ids in, features out.

Qwen3 Technical Report (arXiv 2505.09388): RMSNorm before attention and before a SwiGLU
feed-forward, grouped queries, queries and keys normed per head, RoPE over halves of a head, no
biases. Modules have the names of the published checkpoint.

Letters in shapes: B batch, L tokens, D width, H query heads, E head size."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Qwen3Config:
    """The sizes, under the names of config.json. The defaults are Qwen3-4B."""

    vocab_size: int = 151_936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6


class Qwen3(nn.Module):
    """The model but for its output layer."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        # no initial values, which come from a file: on meta, drawing them imports torch._dynamo
        embeddings = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    def forward(
        self, ids: Tensor, hidden_states: tuple[int, ...] = (-2,), length: int | None = None
    ) -> Tensor:
        """Return hidden states, joined along the width: (B, L, D * their number). The final norm
        does not run, nor do layers after the last one that is asked for.

        ids: (B, L). hidden_states: as transformers numbers them, 0 the embedding; the last one,
        which that norms, is not among them. length: tokens before the padding, which no token
        attends to. Attention is causal: without it, a shorter row is filled up on the right with
        any ids, and its own tokens do not see them."""
        count = len(self.layers) + 1
        wanted = [number % count for number in hidden_states]
        assert max(wanted) < len(self.layers)
        mask = None
        if length is not None and length < ids.shape[1]:
            every = torch.arange(ids.shape[1], device=ids.device)
            mask = ((every <= every[:, None]) & (every < length))[None, None]  # (1, 1, L, L)
        x = self.embed_tokens(ids)
        rope = rope_table(ids.shape[1], self.config, x)
        states = {0: x}
        for number, block in enumerate(self.layers[: max(wanted)], 1):
            x = block(x, rope, None, mask)
            if number in wanted:
                states[number] = x
        return torch.cat([states[number] for number in wanted], -1)

    def continued(self, ids: Tensor, past: "list[Past]", mask: Tensor) -> Tensor:
        """Return the scores of each word of the vocabulary to come next, (B, V).

        ids: (B, L), the tokens that follow those in `past`, which takes them too. mask:
        (B, 1, L, all), true where a token sees another. The output layer is the embedding."""
        x = self.embed_tokens(ids)
        rows = slice(mask.shape[-1] - ids.shape[1], None)
        cos, sin = rope_table(mask.shape[-1], self.config, x)
        for block, its in zip(self.layers, past):
            x = block(x, (cos[rows], sin[rows]), its, mask)
        return self.norm(x[:, -1]) @ self.embed_tokens.weight.T


class Past:
    """The keys and values of one layer, (B, H, L, E) each, of the tokens so far."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def add(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take those of further tokens; return all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        self.keys, self.values = keys, values
        return keys, values


class Block(nn.Module):
    """One layer: attention, then the feed-forward network."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Past | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, past, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention in which groups of query heads share a key and a value head."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.head_dim = head
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)
        self.q_norm = RMSNorm(head, config.rms_norm_eps)
        self.k_norm = RMSNorm(head, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Past | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Map (B, L, D) to (B, L, D).

        past, mask: see `Qwen3.continued`; without them attention is causal."""
        q = self.q_norm(self.heads(self.q_proj(x)))
        k = self.k_norm(self.heads(self.k_proj(x)))
        v = self.heads(self.v_proj(x))

        q, k = rotate(q, rope), rotate(k, rope)
        if past is not None:
            k, v = past.add(k, v)
        shared_by = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared_by, 1), v.repeat_interleave(shared_by, 1)

        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)  # (B, H, L, E)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """Split (B, L, H * E) into (B, H, L, E)."""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last dimension. The gain multiplies what is cast back already."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_table(length: int, config: Qwen3Config, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the positions' angles, (L, E) each, computed in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=like.device).float() / config.head_dim
    frequencies = 1 / config.rope_theta**exponents
    positions = torch.arange(length, device=like.device).float()
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs of numbers, one from each half of a head. x: (B, H, L, E)."""
    cos, sin = rope
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
