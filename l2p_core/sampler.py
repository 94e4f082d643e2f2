"""From noise to pixels.

Sigma runs from 1 (noise) to 0 (picture): x = (1 - sigma) * picture + sigma * noise, kept in float32. The model's time
is t = 1 - sigma, and the velocity dx/dsigma = noise - picture is minus what it returns.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .model import Hooks, L2PTransformer
from .step_cache import StepCache

Velocity = Callable[[Tensor, float], Tensor]  # (x, sigma) → dx/dsigma, float32
Callback = Callable[[int, int, Tensor], None]  # (steps done, steps in all, the picture as it now looks to come out)


def schedule(steps: int, strength: float = 1.0, shift: float = 3.0) -> Tensor:
    """`steps` noise levels and a last 0: (steps + 1,) float32, falling from `strength` shifted towards noise.

    Raises ValueError for steps below 1, a strength outside (0, 1] or a shift of 0 or less."""
    if steps < 1 or not 0 < strength <= 1 or not 0 < shift < math.inf:
        raise ValueError(f"a schedule of {steps} steps, strength {strength} and shift {shift} is none; expected at least "
                         "1 step, a strength above 0 and up to 1, and a shift above 0")
    return shifted(torch.linspace(strength, 0, steps + 1), shift)


def shifted(even: Tensor, shift: float | Tensor) -> Tensor:
    """Evenly spaced levels moved towards noise, or away from it below 1 (Stable Diffusion 3, arXiv 2403.03206, section 5.3.2)."""
    return shift * even / (1 + (shift - 1) * even)


def guided_velocity(model: L2PTransformer, captions: list[Tensor], negatives: list[Tensor], scale: float,
                    bf16_rounding: bool = False, cfg_truncation: float = 1.0, batch_guidance: bool = False,
                    cache_threshold: float = 0.0, rope_scale: float = 1.0, decoder_tile: int | None = None) -> Velocity:
    """The model's velocity with classifier-free guidance: negative + scale * (positive - negative), computed in its own
    dtype and given in float32.

    captions, negatives: one (L, cap_feat_dim) for each picture. scale: 1 leaves the negatives out and takes one pass a
    step. bf16_rounding: round the time as the published bfloat16 pipeline does, which moves it by up to 0.003.
    cfg_truncation: see `is_guided`. batch_guidance: both passes as one of twice the batch.
    cache_threshold: above 0, skip layers as `StepCache` says; such a velocity is of one sampling. rope_scale: RoPE
    interpolation of rows and columns. decoder_tile: as `LocalDecoder.forward` takes it."""
    options = {"rope_scale": (rope_scale, rope_scale), "decoder_tile": decoder_tile}

    def hooks() -> Hooks:
        return StepCache(cache_threshold, model.config.n_layers, **options) if cache_threshold else Hooks(**options)

    of_positive, of_negative, of_both = hooks(), hooks(), hooks()

    def velocity(x: Tensor, sigma: float) -> Tensor:
        if bf16_rounding:
            t = (1000 - torch.tensor(1000 * sigma).bfloat16()) / 1000
        else:
            t = torch.tensor(1 - sigma, dtype=torch.float32)
        t = t.to(x.device).expand(len(x))
        image = x.to(model.dtype)
        if not is_guided(sigma, scale, cfg_truncation):
            return -model(image, t, captions, of_positive).float()
        if batch_guidance:
            positive, negative = model(image.repeat(2, 1, 1, 1), t.repeat(2), [*captions, *negatives], of_both).chunk(2)
        else:
            positive = model(image, t, captions, of_positive)
            negative = model(image, t, negatives, of_negative)
        return -(negative + scale * (positive - negative)).float()
    return velocity


def is_guided(sigma: float, scale: float, truncation: float) -> bool:
    """Whether a step has guidance: not at scale 1, nor where 1 - sigma is above the truncation."""
    return scale != 1 and 1 - sigma <= truncation


def check_shortcuts(cfg_truncation: float, cache_threshold: float) -> None:
    """Raise ValueError for a truncation outside 0..1 or a threshold below 0."""
    if not 0 <= cfg_truncation <= 1 or not 0 <= cache_threshold < math.inf:
        raise ValueError(f"cfg_truncation is {cfg_truncation} and cache_threshold {cache_threshold}; expected a share from 0 to 1, and 0 or more")


def keeping(velocity: Velocity, mask: Tensor, picture: Tensor, noise: Tensor) -> Velocity:
    """A velocity that leads back to `picture` where mask (1, 1, H, W) is 0: there the way is known, noise - picture.

    Start from (1 - sigma) * picture + sigma * noise; a solver then keeps those pixels on that line."""
    return lambda x, sigma: mask * velocity(x, sigma) + (1 - mask) * (noise - picture)


@torch.no_grad()
def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Walk x (B, 3, H, W) along sigmas (n + 1,) in n evaluations of first order, as published."""
    sigmas = sigmas.tolist()
    for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        v = velocity(x, sigma)
        if callback:
            callback(step, len(sigmas) - 1, x - sigma * v)
        x = x + v * (after - sigma)
    return x


@torch.no_grad()
def ab2(velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Adams-Bashforth of second order for uneven steps: one evaluation a step, and the memory of the one before.

    Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, section III.5."""
    sigmas = sigmas.tolist()
    before = v_before = None
    for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        v = velocity(x, sigma)
        if callback:
            callback(step, len(sigmas) - 1, x - sigma * v)
        slope = 0 if v_before is None else (v - v_before) / (sigma - before)
        x = x + v * (after - sigma) + slope * ((after - sigma) ** 2 / 2)
        before, v_before = sigma, v
    return x


SAMPLERS = {"euler": euler, "ab2": ab2}


def solver(name: str) -> Callable[..., Tensor]:
    """The function of that name. Raises ValueError, naming those there are."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}; expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
