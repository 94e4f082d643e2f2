"""What L2P KSampler asks of ComfyUI: its samplers, its sigmas, and previews."""

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ..l2p_core.flow import ab2, schedule
from ..l2p_core.images import to_images
from . import comfyui

EXACT = "l2p"
PREVIEW_SIZE = 512


def sample(
    model,
    positive,
    negative,
    latent: Tensor,
    seed: int,
    cfg: float,
    sampler,
    sigmas: Tensor,
    noise_mask: Tensor | None,
    progress: comfy.utils.ProgressBar,
) -> Tensor:
    """Return ComfyUI's samples, (B, 3, H, W), float32, with a preview of the x0 prediction
    at each step."""
    done = progress.current

    wanted = comfyui.wants_preview()

    def callback(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        shown = ("JPEG", preview(x0), PREVIEW_SIZE) if wanted else None
        progress.update_absolute(done + step + 1, preview=shown)

    return comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(latent, seed),
        cfg,
        sampler,
        sigmas,
        positive,
        negative,
        latent,
        noise_mask=noise_mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    ).float()


def solver(name: str) -> comfy.samplers.Sampler:
    """ComfyUI's sampler of that name, or "ab2", which it does not have."""
    if name != "ab2":
        return comfy.samplers.sampler_object(name)

    def sample_ab2(
        model, x: Tensor, sigmas: Tensor, extra_args: dict, callback, disable: bool
    ) -> Tensor:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            return (x - model(x, x.new_full((len(x),), sigma), **extra_args)) / sigma

        return ab2(
            velocity, x, sigmas, lambda step, _, x0: callback({"i": step, "denoised": x0, "x": x})
        )

    return comfy.samplers.KSAMPLER(sample_ab2)


def sigmas_for(
    model, sampler: str, scheduler: str, steps: int, denoise: float, shift: float
) -> Tensor:
    """Return the sigmas down to 0 of the published schedule or one of ComfyUI's, steps + 1 of them.

    As in ComfyUI's KSampler, denoise below 1 takes the end of a longer schedule, and some samplers
    run without the last sigma above 0, at which they fail. A few schedulers give some sigmas
    more or less than asked for, there too."""
    skips_last = sampler in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    if scheduler == EXACT:
        if skips_last:
            longer = schedule(steps + 1, denoise, shift)
            return torch.cat([longer[:-2], longer[-1:]])
        return schedule(steps, denoise, shift)
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow(model.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1.0)
    count = steps if denoise > 0.9999 else int(steps / denoise)
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, count + skips_last)
    if skips_last:
        sigmas = torch.cat([sigmas[:-2], sigmas[-1:]])
    return sigmas if denoise > 0.9999 else sigmas[-(steps + 1) :]


def preview(x0: Tensor) -> Image.Image:
    """The first image as it now looks to come out, small."""
    small = min(1.0, PREVIEW_SIZE / max(x0.shape[-2:]))
    if small < 1:
        x0 = torch.nn.functional.interpolate(x0[:1].float(), scale_factor=small, mode="area")
    return to_images(x0[:1])[0]
