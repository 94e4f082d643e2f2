"""The L2P transformer: a Z-Image backbone that reads patches of 16 to 160 pixels, and a decoder
that writes pixels.

Letters in shapes: B batch, H W image size, h w patch grid, N image tokens (h * w padded to 32), M
prompt tokens (padded to 32), S = N + M, D width. Time t runs from 0 (noise) to 1 (image). The
output predicts image - noise.

The same modules run in ComfyUI: every constructor takes the `operations` that its linears and norms
come from, with their device and dtype, and what ComfyUI does in its own way is handed to each pass
as `Hooks`."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AUTO, attend_by_parts, attention, attention_by
from .config import L2PConfig, PixelConfig
from .decoder import LocalDecoder
from .files.quantization import apply_linears
from .kernels import fused_rotation

TOKEN_MULTIPLE = 32  # image and prompt tokens are each padded to a multiple of this
NORM_EPS = 1e-5
ROPE_THETA = 256.0
# more than a 64 x 64 grid with its prompt has, so those are computed in one piece
TOKENS_AT_ONCE = 8192


class Hooks:
    """What one forward pass does in its own way. This class runs the network as published.

    A pass gets its hooks as an argument, so the network itself keeps no state. The step cache and
    ComfyUI's attention, patches and RoPE options are subclasses."""

    def __init__(
        self,
        rope_scale: tuple[float, float] = (1.0, 1.0),
        rope_shift: tuple[float, float] = (0.0, 0.0),
        decoder_tile: int | None = None,
        same_prompts: bool = False,
        neighbourhood: int = 0,
        attention: str = AUTO,
    ):
        """rope_scale: RoPE interpolation of rows and columns, below 1 for images above the trained
        resolution. rope_shift: added to the scaled rows and columns. decoder_tile: as
        `LocalDecoder.forward` takes it. same_prompts: all passes with these hooks have the same
        prompts and weights, so that prompts are refined once. neighbourhood: side in tokens of the
        windows that image tokens attend within, see `neighbourhoods`; 0 for the whole image.
        attention: the kernel, one of `attention.BACKENDS`."""
        self.rope_scale = rope_scale
        self.rope_shift = rope_shift
        self.decoder_tile = decoder_tile
        self.same_prompts = same_prompts
        self.neighbourhood = neighbourhood
        self.attention = attention
        self.grid = 0, 0  # rows and columns of image tokens in this pass
        self.windows: Tensor | None = None  # of the block that runs; a tensor compiles once
        self._refined: Tensor | None = None
        self._matrices: tuple[Tensor, Tensor] | None = None  # rope, and what is made of it

    def run_block(
        self,
        stack: str,
        index: int,
        block: "Block",
        x: Tensor,
        rope: Tensor,
        lengths: Tensor | None,
        time: Tensor | None,
    ) -> Tensor:
        """Run one block of a stack: noise_refiner, context_refiner or layers. Returns the new x,
        (B, S, D)."""
        side = 0 if stack == "context_refiner" else self.neighbourhood
        local = 0 < side < max(self.grid)
        where = *self.grid, side, index % 2 * side // 2  # as `Neighbourhoods` takes them
        self.windows = torch.tensor(where) if local else None
        return block(x, rope, lengths, time, self)

    def refine_prompts(self, refine: Callable[[], Tensor]) -> Tensor:
        """Return what `refine` does, (B, M, D), or what it did for the same prompts before."""
        if not self.same_prompts:
            return refine()
        if self._refined is None:
            self._refined = refine()
        return self._refined

    def project(self, x: Tensor, layers: tuple[nn.Module, ...]) -> list[Tensor]:
        """Apply several linear layers to the same input."""
        return apply_linears(x, layers)

    def normalize(self, norm: nn.RMSNorm, x: Tensor, factor: Tensor | None) -> Tensor:
        """Normalize x, (B, S, D), and multiply it by a factor, (B, 1, D), or None for 1."""
        if factor is None:
            return norm(x)
        if len(factor) > 1 or torch.is_grad_enabled():
            return norm(x) * factor
        return self.scaled_norm(norm, x, factor)

    def scaled_norm(self, norm: nn.RMSNorm, x: Tensor, factor: Tensor) -> Tensor:
        """`normalize` for one image."""
        if norm.weight.dtype != x.dtype:  # samples during mixed-precision training
            return norm(x) * factor
        return scaled_norm(x, norm.weight, factor)

    def norm_and_rotate(
        self, attention: "Attention", q: Tensor, k: Tensor, rope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalize queries and keys, each (B, S, heads, head), and rotate them by their
        positions."""
        fused = fused_rotation(q)
        if fused is None:
            return norm_and_rotate(attention, q, k, rope)
        weights = attention.norm_q.weight, attention.norm_k.weight
        return fused(q, k, self.matrices(rope), *weights, NORM_EPS)

    def matrices(self, rope: Tensor) -> Tensor:
        """`rotation_matrices`, made once for all blocks that get the same rope."""
        kept = self._matrices
        if kept is None or kept[0] is not rope:
            kept = self._matrices = rope, rotation_matrices(rope)
        return kept[1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """Attention over (B, heads, S, head) → (B, S, D), within the block's windows. lengths: see
        `member_lengths`."""
        if not torch.compiler.is_compiling():
            attend = attention_by(self.attention)
            return attend_by_parts(attend, q, k, v, lengths, self.windows)
        if self.attention == AUTO and lengths is None and self.windows is None:
            return attention(q, k, v)
        if not torch.is_grad_enabled():  # an operator: one graph for all lengths and windows
            parts = lengths, self.windows
            return torch.ops.comfyui_l2p.attend(q, k, v, *parts, self.attention)
        assert lengths is not None  # training has no windows, and torch's own choice of kernel
        own = torch.arange(k.shape[2]) < lengths[:, None]  # (B, S)
        return attention(q, k, v, own[:, None, None].to(q.device))


PUBLISHED = Hooks()


class L2PTransformer(nn.Module):
    """Predicts image - noise from a noisy image, its time and its prompt. Parameter names are the
    checkpoint's."""

    def __init__(self, config: L2PConfig, operations=nn, **factory):
        """operations: the namespace of Linear, RMSNorm and Conv2d, torch's or ComfyUI's. factory:
        device and dtype."""
        super().__init__()
        self.config = config
        dim = config.dim

        def pad_token() -> nn.Parameter:
            token = torch.empty(1, dim, **factory)
            if operations is nn and not token.is_meta:  # on meta, normal_ imports torch._dynamo
                token.normal_(std=0.02)
            return nn.Parameter(token)

        def blocks(count: int, modulated: bool = True) -> nn.ModuleList:
            return nn.ModuleList(
                Block(config, modulated, operations, **factory) for _ in range(count)
            )

        self.all_x_embedder = nn.ModuleDict(
            {f"{config.patch_size}-1": operations.Linear(3 * config.patch_size**2, dim, **factory)}
        )
        self.x_pad_token = pad_token()
        self.t_embedder = TimeEmbedder(config, operations, **factory)
        self.cap_embedder = nn.Sequential(
            operations.RMSNorm(config.cap_feat_dim, NORM_EPS, **factory),
            operations.Linear(config.cap_feat_dim, dim, **factory),
        )
        self.cap_pad_token = pad_token()
        self.noise_refiner = blocks(config.n_refiner_layers)
        self.context_refiner = blocks(config.n_refiner_layers, modulated=False)
        self.layers = blocks(config.n_layers)
        self.local_decoder = LocalDecoder(config, operations, **factory)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `forward` computes in; INT8 weights are scaled to it."""
        return self.x_pad_token.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.x_pad_token.device

    @property
    def main_blocks(self) -> list[nn.Module]:
        """The blocks that `freeze` counts and LoRAs change."""
        return [*self.layers]

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they run."""
        return [*self.noise_refiner, *self.context_refiner, *self.layers]

    @property
    def shared_parts(self) -> list[nn.Module]:
        """Parts that the blocks share, which stay frozen where any block does."""
        return []

    def forward(
        self,
        image: Tensor,
        t: Tensor,
        prompt_embeds: list[Tensor],
        hooks: Hooks = PUBLISHED,
        others: Sequence[tuple[list[Tensor], Hooks]] = (),
    ) -> Tensor | list[Tensor]:
        """Predict image - noise.

        image: (B, 3, H, W) in about [-1, 1], H and W multiples of `config.size_multiple`. t: (B,)
        in 0..1, 0 = noise. prompt_embeds: B tensors (L_i, cap_feat_dim), L_i at least 1. Returns
        (B, 3, H, W) in the model's dtype. others: further prompts for the same images, each with
        its hooks, such as negative ones; then a list of predictions is returned, and what does not
        depend on the prompt is computed once. Raises ValueError where these do not fit each other
        or the model."""
        for each in (prompt_embeds, *(prompts for prompts, _ in others)):
            check_inputs(self.config, image, t, each)
        prompts = ((prompt_embeds, hooks), *others)
        predicted = self.predict_each(image.to(self.dtype), t, prompts)
        return predicted if others else predicted[0]

    def predict(
        self, image: Tensor, t: Tensor, prompt_embeds: list[Tensor], hooks: Hooks = PUBLISHED
    ) -> Tensor:
        """`forward` without its checks, in the image's own dtype."""
        return self.predict_each(image, t, ((prompt_embeds, hooks),))[0]

    def predict_each(
        self, image: Tensor, t: Tensor, prompts: Sequence[tuple[list[Tensor], Hooks]]
    ) -> list[Tensor]:
        """`predict` for each of several prompts. Their hooks agree in all but the prompts."""
        features = self.features_each(image, t, prompts)
        return self.local_decoder(image, features, prompts[0][1].decoder_tile)

    def features(
        self, image: Tensor, t: Tensor, prompt_embeds: list[Tensor], hooks: Hooks = PUBLISHED
    ) -> Tensor:
        """Run the transformer without its decoder: (B, D, h, w)."""
        return self.features_each(image, t, ((prompt_embeds, hooks),))[0]

    def features_each(
        self, image: Tensor, t: Tensor, prompts: Sequence[tuple[list[Tensor], Hooks]]
    ) -> list[Tensor]:
        """`features` for each of several prompts.

        The noise refiner runs once where it can: a prompt's length moves all image tokens alike
        along the first axis of RoPE, which changes nothing between them (3e-7 in float32). Only
        tokens that pad the image stay where they are."""
        device, patch = image.device, self.config.patch_size
        h, w = image.shape[-2] // patch, image.shape[-1] // patch
        unpadded = h * w == padded(h * w)
        time = self.t_embedder(t, image.dtype)  # (B, t_dim)
        features: list[Tensor] = []
        x: Tensor | None = None  # image tokens, refined
        refined_with: list[int] = []
        for number, (prompt_embeds, hooks) in enumerate(prompts):
            lengths = [padded(len(embeds)) for embeds in prompt_embeds]
            hooks.grid = h, w
            rope_x, rope_prompt = self._rope(h, w, lengths, hooks, device)

            prompt = hooks.refine_prompts(
                partial(self._refine_prompts, prompt_embeds, rope_prompt, image, hooks)
            )  # (B, M, D)
            if x is None or not unpadded and lengths != refined_with:
                x, refined_with = self._embed_image(image), lengths  # (B, N, D)
                rope = torch.stack([rope_x[0]]) if unpadded else rope_x
                for index, block in enumerate(self.noise_refiner):
                    x = hooks.run_block("noise_refiner", index, block, x, rope, None, time)

            tokens = torch.cat([x, prompt], dim=1)  # (B, S, D)
            if number == len(prompts) - 1:
                x = None
            rope = torch.cat([rope_x, rope_prompt.expand(len(rope_x), -1, -1, -1)], dim=1)
            own = member_lengths(lengths, padded(h * w))
            for index, block in enumerate(self.layers):
                tokens = hooks.run_block("layers", index, block, tokens, rope, own, time)
            features.append(tokens[:, : h * w].transpose(1, 2).unflatten(2, (h, w)))
        return features

    def _embed_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, N, D)."""
        patch = self.config.patch_size
        x = F.pixel_unshuffle(image, patch)  # (B, 3 * p * p, h, w), channel slowest
        x = (
            x.unflatten(1, (image.shape[1], -1)).permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)
        )  # (B, h * w, p * p * 3)
        return pad_tokens(self.all_x_embedder[f"{patch}-1"](x), self.x_pad_token)

    def _refine_prompts(
        self, prompt_embeds: list[Tensor], rope: Tensor, image: Tensor, hooks: Hooks
    ) -> Tensor:
        """B tensors (L_i, cap_feat_dim) → (B, M, D), in the image's dtype."""
        lengths = torch.tensor([len(embeds) for embeds in prompt_embeds], device=image.device)
        prompt = self.cap_embedder(
            nn.utils.rnn.pad_sequence(prompt_embeds, batch_first=True).to(image.dtype)
        )
        prompt = pad_tokens(prompt, self.cap_pad_token)
        real = torch.arange(prompt.shape[1], device=image.device) < lengths[:, None]  # (B, M)
        prompt = torch.where(real[..., None], prompt, self.cap_pad_token.to(prompt))
        own = member_lengths([padded(len(embeds)) for embeds in prompt_embeds])
        for index, block in enumerate(self.context_refiner):
            prompt = hooks.run_block("context_refiner", index, block, prompt, rope, own, None)
        return prompt

    def _rope(
        self, h: int, w: int, lengths: list[int], hooks: Hooks, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Rotations of image and prompt tokens: (B or 1, N, head/2, 2) and (1, M, head/2, 2).

        lengths: of each prompt, padded. B is 1 where all are the same."""
        axes = self.config.axes_dims
        grid = h, w, hooks.rope_scale, hooks.rope_shift
        # stacked, not views of the tables: torch.compile makes another graph for a view
        of_prompt = torch.stack([rope_of_prompt(max(lengths), axes, device)])
        different = lengths[:1] if len(set(lengths)) == 1 else lengths
        of_image = [rope_of_image(*grid, length, axes, device) for length in different]
        return torch.stack(of_image), of_prompt


class Block(nn.Module):
    """Attention and feed-forward, each between two norms; scaled and gated by the time where
    modulated."""

    def __init__(self, config: L2PConfig, modulated: bool = True, operations=nn, **factory):
        super().__init__()
        dim = config.dim
        self.attention = Attention(config, operations, **factory)
        self.feed_forward = FeedForward(dim, config.ffn_dim, operations, **factory)
        self.attention_norm1 = operations.RMSNorm(dim, NORM_EPS, **factory)
        self.attention_norm2 = operations.RMSNorm(dim, NORM_EPS, **factory)
        self.ffn_norm1 = operations.RMSNorm(dim, NORM_EPS, **factory)
        self.ffn_norm2 = operations.RMSNorm(dim, NORM_EPS, **factory)
        if modulated:
            self.adaLN_modulation = nn.Sequential(
                operations.Linear(config.t_dim, 4 * dim, **factory)
            )

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        lengths: Tensor | None,
        time: Tensor | None = None,
        hooks: Hooks = PUBLISHED,
    ) -> Tensor:
        """x: (B, S, D). rope: (B or 1, S, head/2, 2). lengths: see `member_lengths`. time: (B,
        t_dim) where modulated."""
        scale_a = gate_a = scale_f = gate_f = None
        if time is not None:
            scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(time)[:, None].chunk(
                4, dim=-1
            )  # each (B, 1, D)
            scale_a, gate_a, scale_f, gate_f = (
                1 + scale_a,
                gate_a.tanh(),
                1 + scale_f,
                gate_f.tanh(),
            )
        normalize = hooks.normalize

        def before(x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = normalize(self.attention_norm1, x, scale_a)
            return self.attention.project(x, rope, hooks)

        def after(x: Tensor, attended: Tensor) -> Tensor:
            attended = self.attention.to_out[0](attended)
            x = x + normalize(self.attention_norm2, attended, gate_a)
            forwarded = self.feed_forward(normalize(self.ffn_norm1, x, scale_f), hooks)
            return x + normalize(self.ffn_norm2, forwarded, gate_f)

        q, k, v = by_tokens(before, x, rope)  # each (B, S, heads, head)
        attended = hooks.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lengths)
        del q, k, v
        return by_tokens(after, x, attended)


class Attention(nn.Module):
    """The weights of attention, and what each token takes from itself: its query, key and value."""

    def __init__(self, config: L2PConfig, operations=nn, **factory):
        super().__init__()
        dim, self.n_heads = config.dim, config.n_heads
        self.to_q = operations.Linear(dim, dim, bias=False, **factory)
        self.to_k = operations.Linear(dim, dim, bias=False, **factory)
        self.to_v = operations.Linear(dim, dim, bias=False, **factory)
        self.to_out = nn.ModuleList([operations.Linear(dim, dim, bias=False, **factory)])
        self.norm_q = operations.RMSNorm(config.head_dim, NORM_EPS, **factory)
        self.norm_k = operations.RMSNorm(config.head_dim, NORM_EPS, **factory)

    def project(
        self, x: Tensor, rope: Tensor, hooks: Hooks = PUBLISHED
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) → q, k and v, each (B, S, heads, head), q and k rotated by their positions."""
        projected = hooks.project(x, (self.to_q, self.to_k, self.to_v))
        q, k, v = (each.unflatten(-1, (self.n_heads, -1)) for each in projected)
        q, k = hooks.norm_and_rotate(self, q, k, rope)
        return q.to(v.dtype), k.to(v.dtype), v


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden_dim: int, operations=nn, **factory):
        super().__init__()
        self.w1 = operations.Linear(dim, hidden_dim, bias=False, **factory)
        self.w2 = operations.Linear(hidden_dim, dim, bias=False, **factory)
        self.w3 = operations.Linear(dim, hidden_dim, bias=False, **factory)

    def forward(self, x: Tensor, hooks: Hooks = PUBLISHED) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        gate, value = hooks.project(x, (self.w1, self.w3))
        gate = F.silu(gate)
        hidden = gate * value
        del gate, value  # not held during the last product
        return self.w2(hidden)


class TimeEmbedder(nn.Module):
    """Sinusoids of the time, and an MLP."""

    FREQUENCIES = 128

    def __init__(self, config: L2PConfig, operations=nn, **factory):
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(2 * self.FREQUENCIES, config.t_hidden_dim, **factory),
            nn.SiLU(),
            operations.Linear(config.t_hidden_dim, config.t_dim, **factory),
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) → (B, t_dim) in `dtype`. Exact in float32; a bfloat16 t is scaled in bfloat16, as
        published."""
        k = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=t.device)
        angle = (1000 * t).float()[:, None] * torch.exp(-math.log(10000) * k / self.FREQUENCIES)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype))


def by_tokens(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
) -> Tensor | tuple[Tensor, ...]:
    """Apply a function that takes each token of (B, S, ...) inputs by itself: where there are many
    tokens and no gradient is wanted, in runs, so that what it holds in between does not grow with
    the image."""
    tokens = inputs[0].shape[1]
    if tokens <= TOKENS_AT_ONCE or torch.is_grad_enabled():
        return function(*inputs)
    outputs: tuple[Tensor, ...] = ()
    for start in range(0, tokens, TOKENS_AT_ONCE):
        run = slice(start, start + TOKENS_AT_ONCE)
        parts = function(*(each[:, run] for each in inputs))
        parts = parts if isinstance(parts, tuple) else (parts,)
        outputs = outputs or tuple(
            part.new_empty(part.shape[0], tokens, *part.shape[2:]) for part in parts
        )
        for output, part in zip(outputs, parts):
            output[:, run] = part
    return outputs if len(outputs) > 1 else outputs[0]


def check_inputs(
    config: PixelConfig, image: Tensor, t: Tensor, prompt_embeds: list[Tensor]
) -> None:
    """Raise ValueError where what a pass takes does not fit each other or the model."""
    multiple, width = config.size_multiple, config.cap_feat_dim
    odd_sides = image.shape[-2] % multiple or image.shape[-1] % multiple
    if image.dim() != 4 or image.shape[1] != 3 or odd_sides:
        raise ValueError(
            f"image is {tuple(image.shape)}; expected (batch, 3, height, width) with height and"
            f" width multiples of {multiple}"
        )
    if t.shape != image.shape[:1] or len(prompt_embeds) != len(image):
        raise ValueError(
            f"{len(image)} images came with t of shape {tuple(t.shape)} and"
            f" {len(prompt_embeds)} prompts; expected one of each per image"
        )
    for embeds in prompt_embeds:
        if embeds.dim() != 2 or len(embeds) == 0 or embeds.shape[1] != width:
            raise ValueError(
                f"the embeddings of a prompt are {tuple(embeds.shape)}; expected (length,"
                f" {width}), at least one row. Encode the prompt with the text encoder this"
                " checkpoint was trained with"
            )


def padded(length: int) -> int:
    """The number of tokens that so many are padded to."""
    return -(-length // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def pad_tokens(x: Tensor, pad_token: Tensor) -> Tensor:
    """(B, L, D) → (B, padded(L), D), new rows being the learned pad token."""
    missing = padded(x.shape[1]) - x.shape[1]
    return torch.cat([x, pad_token.to(x).expand(len(x), missing, -1)], dim=1)


def member_lengths(lengths: list[int], image_tokens: int = 0) -> Tensor | None:
    """How many tokens each member of a batch has, (B,) on the CPU; None where all have the same.

    lengths: of each prompt, padded to 32, which is attended to whole, padding included. A member
    gets what it gets alone: beyond its own tokens are only rows that fill it up to the batch's
    longest."""
    if len(set(lengths)) == 1:
        return None
    return torch.tensor(lengths) + image_tokens


def scaled_norm(x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """Return the RMSNorm of x, (1, S, D), times a factor, (1, 1, D), in one kernel: the factor is
    multiplied into the weight."""
    weight = (weight * factor[0, 0]).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, NORM_EPS)


def norm_and_rotate(
    attention: "Attention", q: Tensor, k: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor]:
    """`Hooks.norm_and_rotate` by torch."""
    rotated = rotate(attention.norm_q(q), rope).to(q.dtype)
    return rotated, rotate(attention.norm_k(k), rope).to(k.dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs of (B, S, heads, head) by the angles of rope (B or 1, S, head/2,
    2), in float32. Returns x's dtype."""
    rope = rope[:, :, None]
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Inductor has no complex kernels; in eager mode these are 6 to 9 times as fast as the below
        real, imaginary = pairs.unbind(-1)
        cos, sin = rope.unbind(-1)
        turned = (
            (real * cos - imaginary * sin).to(x.dtype),
            (real * sin + imaginary * cos).to(x.dtype),
        )
        return torch.stack(turned, dim=-1).flatten(-2)
    product = torch.view_as_complex(pairs) * torch.view_as_complex(rope)
    return torch.view_as_real(product).flatten(-2).to(x.dtype)


def rotation_matrices(rope: Tensor) -> Tensor:
    """Cosine and sine per pair, (B, S, head/2, 2) → (B, S, 1, head/2, 2, 2), the form that
    comfy-kitchen's and ComfyUI's functions take."""
    cos, sin = rope.unbind(-1)
    return torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[:, :, None]


@lru_cache(maxsize=16)
def rope_of_prompt(length: int, axes_dims: tuple[int, int, int], device: torch.device) -> Tensor:
    """(length, head/2, 2). Prompt token i sits at (1 + i, 0, 0), padding included."""
    positions = torch.zeros(length, 3, dtype=torch.float64)
    positions[:, 0] = torch.arange(1, length + 1)
    return rope_of(positions, axes_dims, device)


@lru_cache(maxsize=4)  # 34 MB each at 4096 pixels in patches of 16
def rope_of_image(
    h: int,
    w: int,
    scale: tuple[float, float],
    shift: tuple[float, float],
    prompt_length: int,
    axes_dims: tuple[int, int, int],
    device: torch.device,
) -> Tensor:
    """(padded(h * w), head/2, 2). Row r, column c sit at (padded prompt length + 1, r, c), rows and
    columns scaled and then shifted; padding at (0, 0, 0)."""
    positions = torch.zeros(padded(h * w), 3, dtype=torch.float64)
    positions[: h * w, 0] = prompt_length + 1
    grid = torch.cartesian_prod(
        torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64)
    )
    positions[: h * w, 1:] = grid * torch.tensor(scale, dtype=torch.float64) + torch.tensor(
        shift, dtype=torch.float64
    )
    return rope_of(positions, axes_dims, device)


@torch.inference_mode(False)  # cached tables serve inference and training alike
def rope_of(positions: Tensor, axes_dims: tuple[int, int, int], device: torch.device) -> Tensor:
    """Cosine and sine per rotated pair: (S, 3) → (S, head/2, 2). Angles in float64, rounded
    once."""
    angles = [
        positions[:, axis, None]
        * ROPE_THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    angles = torch.cat(angles, dim=-1).float()
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(device)
