"""The L2P transformer: a Z-Image backbone that reads patches of 16 to 160 pixels and hands its features to a pixel decoder.

Letters: B batch, H W picture size, h w patch grid, N image tokens (h * w padded to 32), M caption tokens (padded to
32), S = N + M, D width. Time t runs from 0 (noise) to 1 (picture). The output approximates picture - noise.
"""
import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import L2PConfig
from .decoder import LocalDecoder
from .step_cache import StepCache

TOKEN_MULTIPLE = 32  # image and caption tokens are each padded to a multiple of this
NORM_EPS = 1e-5
ROPE_THETA = 256.0
TOKENS_AT_ONCE = 8192  # above any 64 x 64 picture with its caption, so those are computed whole


class L2PTransformer(nn.Module):
    """Predicts picture - noise from a noisy picture, its time and its captions. Parameter names are the checkpoint's."""

    def __init__(self, config: L2PConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.all_x_embedder = nn.ModuleDict({
            f"{config.patch_size}-1": nn.Linear(3 * config.patch_size**2, dim)})
        self.x_pad_token = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
        self.t_embedder = TimeEmbedder(config)
        self.cap_embedder = nn.Sequential(nn.RMSNorm(config.cap_feat_dim, NORM_EPS), nn.Linear(config.cap_feat_dim, dim))
        self.cap_pad_token = nn.Parameter(torch.empty(1, dim).normal_(std=0.02))
        self.noise_refiner = nn.ModuleList(Block(config) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.local_decoder = LocalDecoder(config)
        self.decoder_tile: int | None = None  # as `LocalDecoder.forward` takes it
        self.rope_scale = 1.0  # of rows and columns; below 1 brings a large picture's within those that were trained

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the model computes in; INT8 weights are scaled to it."""
        return self.x_pad_token.dtype

    @property
    def device(self) -> torch.device:
        return self.x_pad_token.device

    def forward(self, image: Tensor, t: Tensor, captions: list[Tensor], cache: StepCache | None = None) -> Tensor:
        """Predict picture - noise.

        image: (B, 3, H, W) in about [-1, 1], H and W multiples of `config.size_multiple`. t: (B,) in 0..1, 0 = noise.
        captions: B tensors (L_i, cap_feat_dim), L_i at least 1. cache: of the steps before, on the same batch.
        Returns (B, 3, H, W) in the model's dtype.
        Raises ValueError where these do not fit each other or the model."""
        self._check(image, t, captions)
        image = image.to(self.dtype)
        return self.local_decoder(image, self.features(image, t, captions, cache), self.decoder_tile)

    def features(self, image: Tensor, t: Tensor, captions: list[Tensor], cache: StepCache | None = None) -> Tensor:
        """The transformer without its decoder: (B, D, h, w)."""
        patch = self.config.patch_size
        h, w = image.shape[-2] // patch, image.shape[-1] // patch
        time = self.t_embedder(t)  # (B, t_dim)

        x = F.pixel_unshuffle(image, patch)  # (B, 3 * p * p, h, w), channel slowest
        x = x.unflatten(1, (image.shape[1], -1)).permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)  # (B, h * w, p * p * 3)
        x = pad_tokens(self.all_x_embedder[f"{patch}-1"](x), self.x_pad_token)  # (B, N, D)

        lengths = torch.tensor([len(caption) for caption in captions], device=x.device)
        caption = self.cap_embedder(nn.utils.rnn.pad_sequence(captions, batch_first=True).to(self.dtype))
        caption = pad_tokens(caption, self.cap_pad_token)  # (B, M, D)
        real = torch.arange(caption.shape[1], device=x.device) < lengths[:, None]  # (B, M)
        caption = torch.where(real[..., None], caption, self.cap_pad_token.to(caption.dtype))

        rope_x, rope_caption, x_mask, caption_mask = self._rope_and_masks(h, w, [padded(len(c)) for c in captions])
        for block in self.noise_refiner:
            x = block(x, rope_x, None, time)
        for block in self.context_refiner:
            caption = block(caption, rope_caption, caption_mask)
        x = torch.cat([x, caption], dim=1)  # (B, S, D)
        rope = torch.cat([rope_x, rope_caption], dim=1)
        before = x if cache else None
        for block in self.layers:
            x = block(x, rope, x_mask, time)
            if cache and block is self.layers[0]:
                known, before = cache.recall(before, x), None
                if known is not None:
                    x = known
                    break
        else:
            if cache:
                cache.note(x)
        return x[:, :h * w].transpose(1, 2).unflatten(2, (h, w))

    def _rope_and_masks(self, h: int, w: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Rotations (B or 1, N, head/2, 2) and (B or 1, M, head/2, 2), and what may be attended to: None for all.

        A caption padded to 32 is attended to whole, padding included. Only the rows that fill a shorter caption up
        to the batch's longest are masked, so that each member gets what it gets alone."""
        axes, device, longest = self.config.axes_dims, self.device, max(lengths)
        rope_caption = rope_of_caption(longest, axes, device)[None]
        if len(set(lengths)) == 1:
            return rope_of_image(h, w, longest, self.rope_scale, axes, device)[None], rope_caption, None, None
        rope_x = torch.stack([rope_of_image(h, w, length, self.rope_scale, axes, device) for length in lengths])
        mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]  # (B, M)
        image_mask = mask.new_ones(len(lengths), padded(h * w))
        return (rope_x, rope_caption.expand(len(lengths), -1, -1, -1),
                torch.cat([image_mask, mask], dim=1)[:, None, None], mask[:, None, None])

    def _check(self, image: Tensor, t: Tensor, captions: list[Tensor]) -> None:
        multiple, width = self.config.size_multiple, self.config.cap_feat_dim
        if image.dim() != 4 or image.shape[1] != 3 or image.shape[-2] % multiple or image.shape[-1] % multiple:
            raise ValueError(f"image is {tuple(image.shape)}; expected (batch, 3, height, width) with height and width "
                             f"multiples of {multiple}")
        if t.shape != image.shape[:1] or len(captions) != len(image):
            raise ValueError(f"{len(image)} images came with t of shape {tuple(t.shape)} and {len(captions)} captions; "
                             "expected one of each per image")
        for caption in captions:
            if caption.dim() != 2 or len(caption) == 0 or caption.shape[1] != width:
                raise ValueError(f"a caption is {tuple(caption.shape)}; expected (length, {width}), at least one row. "
                                 "Encode the prompt with the text encoder this checkpoint was trained with")


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; scaled and gated by the time where modulated."""

    def __init__(self, config: L2PConfig, modulated: bool = True):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm1 = nn.RMSNorm(config.dim, NORM_EPS)
        self.attention_norm2 = nn.RMSNorm(config.dim, NORM_EPS)
        self.ffn_norm1 = nn.RMSNorm(config.dim, NORM_EPS)
        self.ffn_norm2 = nn.RMSNorm(config.dim, NORM_EPS)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(config.t_dim, 4 * config.dim))

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None, time: Tensor | None = None) -> Tensor:
        scale_a = gate_a = scale_f = gate_f = 1
        if time is not None:
            scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(time)[:, None].chunk(4, dim=-1)  # each (B, 1, D)
            scale_a, gate_a, scale_f, gate_f = 1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()

        def before(x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.attention.project(self.attention_norm1(x) * scale_a, rope)

        def after(x: Tensor, attended: Tensor) -> Tensor:
            x = x + gate_a * self.attention_norm2(self.attention.to_out[0](attended))
            return x + gate_f * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * scale_f))

        attended = self.attention.mix(*by_tokens(before, x, rope), mask)
        return by_tokens(after, x, attended)


class Attention(nn.Module):
    def __init__(self, config: L2PConfig):
        super().__init__()
        dim, self.n_heads = config.dim, config.n_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = nn.RMSNorm(config.head_dim, NORM_EPS)
        self.norm_k = nn.RMSNorm(config.head_dim, NORM_EPS)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) → q, k and v, each (B, S, heads, head), q and k turned by their positions."""
        q, k, v = (project(x).unflatten(-1, (self.n_heads, -1)) for project in (self.to_q, self.to_k, self.to_v))
        return rotate(self.norm_q(q), rope).to(v.dtype), rotate(self.norm_k(k), rope).to(v.dtype), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What each token takes from all others: (B, S, D), before `to_out`."""
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, S, head)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TimeEmbedder(nn.Module):
    FREQUENCIES = 128

    def __init__(self, config: L2PConfig):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * self.FREQUENCIES, config.t_hidden_dim), nn.SiLU(),
                                 nn.Linear(config.t_hidden_dim, config.t_dim))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) → (B, t_dim). Exact in float32; a bfloat16 t is scaled in bfloat16, as the published pipeline does."""
        k = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=t.device)
        angle = (1000 * t).float()[:, None] * torch.exp(-math.log(10000) * k / self.FREQUENCIES)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].bias.dtype))


def by_tokens(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
    """`function` of (B, S, ...) inputs that takes each token by itself: in runs where there are many and no gradient is wanted,
    so that what it holds in between does not grow with the picture."""
    tokens = inputs[0].shape[1]
    if tokens <= TOKENS_AT_ONCE or torch.is_grad_enabled():
        return function(*inputs)
    outputs: tuple[Tensor, ...] = ()
    for start in range(0, tokens, TOKENS_AT_ONCE):
        run = slice(start, start + TOKENS_AT_ONCE)
        parts = function(*(each[:, run] for each in inputs))
        parts = parts if isinstance(parts, tuple) else (parts,)
        outputs = outputs or tuple(part.new_empty(part.shape[0], tokens, *part.shape[2:]) for part in parts)
        for output, part in zip(outputs, parts):
            output[:, run] = part
    return outputs if len(outputs) > 1 else outputs[0]


def padded(length: int) -> int:
    return -(-length // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def pad_tokens(x: Tensor, pad_token: Tensor) -> Tensor:
    """(B, L, D) → (B, padded(L), D), new rows being the learned pad token."""
    missing = padded(x.shape[1]) - x.shape[1]
    return torch.cat([x, pad_token.to(x.dtype).expand(len(x), missing, -1)], dim=1)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring pairs of (B, S, heads, head) by the angles of rope (B or 1, S, head/2, 2), in float32."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.view_as_complex(rope)[:, :, None]
    return torch.view_as_real(turned).flatten(-2)


@lru_cache(maxsize=16)
def rope_of_caption(length: int, axes_dims: tuple[int, int, int], device: torch.device) -> Tensor:
    """(length, head/2, 2). Caption token i sits at (1 + i, 0, 0), padding included."""
    positions = torch.zeros(length, 3, dtype=torch.float64)
    positions[:, 0] = torch.arange(1, length + 1)
    return rope_of(positions, axes_dims, device)


@lru_cache(maxsize=4)  # 34 MB each at 4096 pixels in patches of 16
def rope_of_image(h: int, w: int, caption_length: int, scale: float, axes_dims: tuple[int, int, int],
                  device: torch.device) -> Tensor:
    """(padded(h * w), head/2, 2). Row r, column c sit at (padded caption length + 1, scale * r, scale * c); padding at (0, 0, 0)."""
    positions = torch.zeros(padded(h * w), 3, dtype=torch.float64)
    positions[:h * w, 0] = caption_length + 1
    positions[:h * w, 1:] = scale * torch.cartesian_prod(torch.arange(h), torch.arange(w))
    return rope_of(positions, axes_dims, device)


@torch.inference_mode(False)  # cached tables serve inference and training alike
def rope_of(positions: Tensor, axes_dims: tuple[int, int, int], device: torch.device) -> Tensor:
    """Cosine and sine per rotated pair: (S, 3) → (S, head/2, 2). Angles in float64, rounded once."""
    angles = [positions[:, axis, None] * ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
              for axis, dim in enumerate(axes_dims)]
    angles = torch.cat(angles, dim=-1).float()
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(device)
