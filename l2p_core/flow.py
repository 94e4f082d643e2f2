"""Flow matching: the convention, the sigma schedule, guidance, solvers and the training loss.

Sigma goes from 1 (noise) to 0 (image), and x = (1 - sigma) * image + sigma * noise (`interpolate`),
in float32. The velocity dx/dsigma = noise - image is what solvers follow and training fits. The
model takes the time t = 1 - sigma and predicts image - noise, the negative velocity."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention import AUTO
from .model import Hooks, L2PTransformer
from .settings import Settings
from .step_cache import StepCache

Velocity = Callable[[Tensor, float], Tensor]  # (x, sigma) → dx/dsigma, float32
Callback = Callable[[int, int, Tensor], None]  # (steps done, steps in all, x0 prediction)
DEFAULTS = Settings()


def interpolate(image: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the noisy image x at sigma. All are of one shape, or sigma is a number."""
    return (1 - sigma) * image + sigma * noise


def schedule(steps: int, strength: float = 1.0, shift: float = 3.0) -> Tensor:
    """Return the sigma schedule: (steps + 1,) float32, from the shifted denoising strength down to
    0.

    steps: at least 1. strength: above 0 and up to 1. shift: above 0. Raises ValueError outside of
    these."""
    if steps < 1 or not 0 < strength <= 1 or not 0 < shift < math.inf:
        raise ValueError(
            f"invalid schedule of {steps} steps, strength {strength} and shift {shift}; expected at"
            " least 1 step, a strength above 0 and up to 1, and a shift above 0"
        )
    return shifted(torch.linspace(strength, 0, steps + 1), shift)


def shifted(even: Tensor, shift: float | Tensor) -> Tensor:
    """Shift evenly spaced sigmas towards noise, or away from it below 1.

    Stable Diffusion 3, arXiv 2403.03206, section 5.3.2."""
    return shift * even / (1 + (shift - 1) * even)


def guided_velocity(
    model: L2PTransformer,
    prompt_embeds: list[Tensor],
    negative_prompt_embeds: list[Tensor],
    scale: float,
    settings: Settings = DEFAULTS,
    bf16_rounding: bool = False,
    batch_guidance: bool = False,
    rope_scale: float = 1.0,
    decoder_tile: int | None = None,
    neighbourhood: int = 0,
    attention: str = AUTO,
) -> Velocity:
    """Return the model's velocity with classifier-free guidance: negative + scale * (positive -
    negative).

    The model computes in its own dtype; the velocity is float32. prompt_embeds,
    negative_prompt_embeds: one (L, cap_feat_dim) for each image. scale: the guidance scale; 1 skips
    the negative prompt and takes one evaluation a step. settings: those of guidance and of the step
    cache count; with the cache, use the velocity for one image or batch only. bf16_rounding: round
    the timestep as the published bfloat16 pipeline does, by up to 0.003. batch_guidance: evaluate
    both prompts in one batch of twice the size. rope_scale: RoPE interpolation factor.
    decoder_tile: as `LocalDecoder.forward` takes it. neighbourhood, attention: as `Hooks` takes
    them."""

    def hooks() -> Hooks:
        common: dict[str, Any] = {
            "rope_scale": (rope_scale, rope_scale),
            "decoder_tile": decoder_tile,
            "same_prompts": True,
            "neighbourhood": neighbourhood,
            "attention": attention,
        }
        if not settings.cache_threshold:
            return Hooks(**common)
        return StepCache(settings.cache_threshold, model.config.n_layers, **common)

    of_positive, of_negative, of_both = hooks(), hooks(), hooks()

    def velocity(x: Tensor, sigma: float) -> Tensor:
        if bf16_rounding:
            t = (1000 - torch.tensor(1000 * sigma).bfloat16()) / 1000
        else:
            t = torch.tensor(1 - sigma, dtype=torch.float32)
        t = t.to(x.device).expand(len(x))
        image = x.to(model.dtype)
        if not is_guided(sigma, scale, settings.cfg_truncation):
            return -model(image, t, prompt_embeds, of_positive).float()
        if batch_guidance:
            both = [*prompt_embeds, *negative_prompt_embeds]
            positive, negative = model(image.repeat(2, 1, 1, 1), t.repeat(2), both, of_both).chunk(
                2
            )
        else:
            others = [(negative_prompt_embeds, of_negative)]
            positive, negative = model(image, t, prompt_embeds, of_positive, others)
        guided = negative + scale * (positive - negative)
        if settings.cfg_normalization:  # as diffusers' ZImagePipeline does
            norm, limit = (each.float().flatten(1).norm(dim=1) for each in (guided, positive))
            limit = settings.cfg_normalization * limit
            guided = guided * (limit / norm).clamp(max=1).to(guided)[:, None, None, None]
        return -guided.float()

    return velocity


def is_guided(sigma: float, scale: float, truncation: float) -> bool:
    """Whether a step has guidance: not at scale 1, nor where 1 - sigma is above the truncation."""
    return scale != 1 and 1 - sigma <= truncation


def inpaint_velocity(velocity: Velocity, mask: Tensor, image: Tensor, noise: Tensor) -> Velocity:
    """Return a velocity that leads back to `image` where mask (1, 1, H, W) is 0, along noise -
    image.

    Start from `interpolate(image, noise, sigma)`; a solver then keeps those pixels on that line."""
    return lambda x, sigma: mask * velocity(x, sigma) + (1 - mask) * (noise - image)


@torch.no_grad()
def euler(
    velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None
) -> Tensor:
    """Integrate x (B, 3, H, W) along sigmas (n + 1,) with n evaluations, by Euler's method, as
    published."""
    sigmas = sigmas.tolist()
    for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:])):
        v = velocity(x, sigma)
        if callback:
            callback(step, len(sigmas) - 1, x - sigma * v)
        x = x + v * (after - sigma)
    return x


@torch.no_grad()
def ab2(velocity: Velocity, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Integrate like `euler`, by the Adams-Bashforth method of second order for uneven steps.

    One evaluation a step, and the velocity of the step before. Hairer, Norsett, Wanner, Solving
    Ordinary Differential Equations I, section III.5."""
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


SOLVERS = {"euler": euler, "ab2": ab2}


def flow_matching_loss(
    model: L2PTransformer,
    image: Tensor,
    prompt_embeds: list[Tensor],
    noise: Tensor,
    sigma: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the mean squared error of the velocity, in float32: the published objective.

    image, noise: (B, 3, H, W), images in [-1, 1]. prompt_embeds: B tensors (L, cap_feat_dim).
    sigma: (B,). weight: (B, 1, H, W) of the squared error; unweighted as published."""
    x = interpolate(image, noise, sigma[:, None, None, None])
    velocity = -model(x, 1 - sigma, prompt_embeds)
    if weight is None:
        return torch.nn.functional.mse_loss(velocity.float(), noise - image)
    return (weight * (velocity.float() - (noise - image)).square()).mean()


def training_sigmas(
    count: int, sampling: str, shift: float, patch_size: int, generator: torch.Generator
) -> Tensor:
    """Return (count,) random sigmas to train on, float32 in (0, 1].

    sampling: grid, even over `schedule(500)` at patch 16 and `schedule(1000)` above, as published;
    uniform, even between 0 and 1; logit-normal, the sigmoid of a standard normal (Stable Diffusion
    3, arXiv 2403.03206, section 3.1); mode, more of the middle and some of the ends (there too,
    scale 1.29); shifted, `grid` and what lies between its levels."""
    match sampling:
        case "grid":
            grid = schedule(500 if patch_size == 16 else 1000, shift=shift)[:-1]
            return grid[torch.randint(len(grid), (count,), generator=generator)]
        case "uniform":
            return 1 - torch.rand(count, generator=generator)
        case "logit-normal":
            return torch.randn(count, generator=generator).sigmoid()
        case "mode":
            u = torch.rand(count, generator=generator)
            return 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        case "shifted":
            return shifted(1 - torch.rand(count, generator=generator), shift)
    raise AssertionError(sampling)


def loss_weights(kind: str, sigma: Tensor) -> Tensor:
    """Return (B,) weights of the squared error of the velocity.

    min-snr: min(snr, 5) / (snr + 1) with snr = ((1 - sigma) / sigma)^2, as for the prediction of a
    velocity in arXiv 2303.09556: noise near 1 counts less, where the error says little of the
    image. cosmap: 2 / (pi (1 - 2 sigma + 2 sigma^2)), Stable Diffusion 3's: the middle counts twice
    the ends."""
    if kind == "min-snr":
        snr = ((1 - sigma) / sigma).square()
        return snr.clamp(max=5) / (snr + 1)
    assert kind == "cosmap"
    return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
