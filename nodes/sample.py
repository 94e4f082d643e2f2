"""Noise to pixels: MODEL and CONDITIONING to IMAGE, and the published schedule for ComfyUI's own
samplers."""

import math

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from ..l2p_core.backbones import BackboneConfig
from ..l2p_core.config import PixelConfig
from ..l2p_core.flow import schedule
from ..l2p_core.images import check_size, size_for
from ..l2p_core.settings import Settings, reject_hooks
from ..l2p_core.stages import LARGEST, Stage, misfit, plan_stages, run_stages
from . import comfyui
from .comfy_model import L2PModel
from .inputs import BATCH, check_numbers, setting, side
from .latents import fit, fit_mask, to_image, to_latent
from .prompt import note
from .sampling import EXACT, sample, sigmas_for, solver
from .stages import (
    HIDDEN,
    ONE_STAGE,
    REDRAW_AND_OLDER,
    STAGES,
    counting_windows,
    for_stage,
    note_on_older_inputs,
    shortage,
    stages_of,
)

# ComfyUI's samplers that do not suit L2P models at the usual guidance: docs/comfyui.md, Samplers.
UNUSABLE_SAMPLERS = (
    "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_2m_cfg_pp",
    "res_multistep_cfg_pp",
    "res_multistep_ancestral_cfg_pp",
    "gradient_estimation_cfg_pp",
)
GRAINY_SAMPLERS = ("dpm_fast", "dpm_adaptive", "ddpm", "res_multistep_ancestral")
MULTIPLES = "a multiple of 16; of 64, 128 or 320 for the 4K, 8K and 10K models"
OWN_SIZE = (
    "0: the image's, of no more than twice the pixels of the trained resolution; without an image"
    " the trained resolution"
)
STEPS = setting("num_inference_steps", "steps", default=30)
SHIFT = setting("shift", step=0.1, min=0.1, advanced=True)


class L2PKSampler(io.ComfyNode):
    """Pixels by ComfyUI's samplers, in stages where wanted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PKSampler",
            display_name="L2P KSampler",
            category="L2P",
            description=(
                "Generates an image directly in pixels, without a VAE. With an input image it"
                " refines that image; with a mask it generates only the masked part."
            ),
            search_aliases=[
                "ksampler",
                "sampler",
                "generate",
                "text to image",
                "image to image",
                "inpaint",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An L2P model."),
                io.Conditioning.Input("positive", tooltip="What to generate."),
                io.Conditioning.Input(
                    "negative",
                    tooltip=(
                        "The encoded negative prompt, empty or not; do not use zeroed"
                        " conditioning. It has no effect at guidance scale 1."
                    ),
                ),
                side("width", min=0, tooltip=f"Pixels, {MULTIPLES}. {OWN_SIZE}."),
                side("height", min=0, tooltip=f"Pixels, {MULTIPLES}. {OWN_SIZE}."),
                BATCH,
                setting(
                    "seed",
                    control_after_generate=True,
                    tooltip=(
                        "Seed of the noise of the whole batch. A single image equals that of `l2p"
                        " generate` with this seed."
                    ),
                ),
                STEPS,
                setting(
                    "cfg_scale",
                    "cfg",
                    default=2.0,
                    step=0.1,
                    round=0.01,
                    tooltip=(
                        "Guidance scale (CFG); 1 turns guidance off and halves the time."
                        " Published values: 2 for the 1K model, 4 for larger models."
                    ),
                ),
                setting(
                    "sampler",
                    "sampler_name",
                    options=[*comfy.samplers.SAMPLER_NAMES, "ab2"],
                    tooltip=(
                        "The sampler. euler is the published one. ab2 needs fewer steps: in 18"
                        " steps at shift 2 it is as near to the exact solution as euler in 30"
                        " steps at shift 3."
                    ),
                ),
                io.Combo.Input(
                    "scheduler",
                    options=[EXACT, *comfy.samplers.SCHEDULER_NAMES],
                    default=EXACT,
                    tooltip="The sigma schedule. l2p is exactly the published one.",
                ),
                SHIFT,
                setting(
                    "denoising_strength",
                    "denoise",
                    tooltip=(
                        "How much noise the input image gets: 1 keeps nothing of it. Keep 1"
                        " without an image."
                    ),
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The image to start from, or a batch of them. It is resized if its size"
                        " is not width x height."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=("The white part is generated; the rest of the image is kept exactly."),
                ),
                # Those of older workflows, whose widgets are told apart by their place.
                setting("stages", optional=True, extra_dict=HIDDEN),
                setting("stage_strength", "stage_denoise", optional=True, extra_dict=HIDDEN),
                setting("redraw", optional=True, options=REDRAW_AND_OLDER, extra_dict=HIDDEN),
                STAGES.Input(
                    "stage_options",
                    optional=True,
                    tooltip="From L2P Stages, for sizes above the trained resolution.",
                ),
            ],
            outputs=[io.Image.Output(), io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        width,
        height,
        batch_size,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        shift,
        denoise,
        image=None,
        mask=None,
        stages=ONE_STAGE.stages,
        stage_denoise=ONE_STAGE.stage_strength,
        redraw=ONE_STAGE.redraw,
        stage_options=None,
    ) -> io.NodeOutput:
        """Generate. Returns the IMAGE and its pixel latent."""
        check_numbers(cfg_scale=cfg, shift=shift, denoising_strength=denoise)
        of_stages = stage_options or stages_of(stages, stage_denoise, redraw)
        multiple, _, trained = sizes_of(model)
        config = model.model.diffusion_model.config
        batch_size = max(batch_size, 0 if image is None else len(image))
        height, width = drawn_size(image, height, width, trained, multiple)
        for conditioning in (positive, negative):
            check_conditioning(conditioning, config)
        positive, negative = (
            areas_as_shares(conditioning, height, width) for conditioning in (positive, negative)
        )
        check_image_and_mask(image, mask, denoise)
        settings = Settings(
            height=height,
            width=width,
            num_inference_steps=steps,
            cfg_scale=cfg,
            denoising_strength=denoise,
            **of_stages._asdict(),
        )
        if not config.hooks_run_blocks:
            reject_hooks(settings, config.row.title)
        plan = plan_stages(settings, trained, multiple)
        have = comfy.model_management.get_total_memory(model.load_device)
        note(
            cls,
            *notes_on(image, mask, denoise, height, width),
            note_on_sampler(sampler_name),
            note_on_model_sampling(model, shift),
            None if stage_options else note_on_older_inputs(of_stages),
            misfit(plan, trained),
            shortage(model, plan, batch_size, have),
        )
        progress = comfy.utils.ProgressBar(sum(stage.steps for stage in plan))
        device = comfy.model_management.intermediate_device()

        def generate(
            stage: Stage, start: Tensor | None, kept: Tensor | None, hole: Tensor | None
        ) -> Tensor:
            latent = (
                torch.zeros(batch_size, 3, stage.height, stage.width) if start is None else start
            )
            sigmas = sigmas_for(model, sampler_name, scheduler, stage.steps, stage.strength, shift)
            with counting_windows(model, stage.window):
                samples = sample(
                    for_stage(model, stage, multiple),
                    positive,
                    negative,
                    latent,
                    seed,
                    stage.cfg_scale,
                    solver(sampler_name),
                    sigmas,
                    hole,
                    progress,
                )
            if kept is not None:  # some samplers end a little above no noise
                samples = kept.to(samples.device).where(hole.to(samples.device) == 0, samples)
            return samples.to(device)

        def image_at(stage: Stage) -> Tensor:
            return to_latent(fit(image, stage.width, stage.height), batch_size).to(device)

        def mask_at(stage: Stage) -> Tensor:
            return fit_mask(mask, stage.width, stage.height, batch_size)[:, None].to(device)

        samples = run_stages(
            plan, generate, None if image is None else image_at, None if mask is None else mask_at
        )
        return io.NodeOutput(to_image(samples), {"samples": samples})


def areas_as_shares(conditioning: list, height: int, width: int) -> list:
    """Return the conditioning with areas in pixels as shares of the image, right for each stage.

    Conditioning (Set Area) counts in eighths of pixels, as (height, width, y, x)."""
    sides = (height, width, height, width)

    def as_share(options: dict) -> dict:
        area = options.get("area")
        if area is None or area[0] == "percentage":
            return options
        shares = [comfyui.AREA_UNIT * length / side for length, side in zip(area, sides)]
        return {**options, "area": ("percentage", *shares)}

    return [[embeds, as_share(options)] for embeds, options in conditioning]


def note_on_sampler(name: str) -> str | None:
    """Say so where a sampler is known not to work with L2P models."""
    if name in UNUSABLE_SAMPLERS:
        return f"{name} distorts the images of L2P models. Choose another sampler, such as euler"
    if name in GRAINY_SAMPLERS:
        return f"{name} leaves noise in the images of L2P models. More steps help, or euler"
    return None


def note_on_model_sampling(model, shift: float) -> str | None:
    """Say so where a node before this one set another shift, which is not used here.

    Raises ValueError if it changed the model's timestep scale or prediction type."""
    sampling = model.object_patches.get("model_sampling")
    if sampling is None:
        return None
    is_flow = isinstance(sampling, comfy.model_sampling.CONST)
    if not is_flow or abs(float(sampling.timestep(torch.tensor(0.5))) - 0.5) > 1e-6:
        raise ValueError(
            "a node such as ModelSamplingSD3 changed the model's timestep scale, which distorts"
            " the images of L2P models. Remove it, and set shift in L2P KSampler"
        )
    before = getattr(sampling, "shift", shift)
    if before == shift:
        return None
    return (
        f"a node such as ModelSamplingAuraFlow set shift {before:g}; L2P KSampler uses its own"
        f" shift, {shift:g}. Set it there, and remove the other node"
    )


def check_image_and_mask(image: Tensor | None, mask: Tensor | None, denoise: float) -> None:
    """Raise ValueError for a mask or a denoise that has no image to keep something of, and for an
    empty mask."""
    if image is None and (mask is not None or denoise < 1):
        raise ValueError(
            "the mask, or denoise below 1, needs an image to keep something of. Connect one, or set"
            " denoise to 1"
        )
    if mask is not None and not mask.any():
        raise ValueError(
            "the mask is empty, so nothing would be generated. Paint what is to be generated:"
            " right-click the image, Open in Mask Editor"
        )


def notes_on(
    image: Tensor | None, mask: Tensor | None, denoise: float, height: int, width: int
) -> list[str]:
    """What the user may not have meant."""
    if image is None:
        return []
    notes = []
    if mask is None and denoise == 1:
        notes.append(
            "denoise is 1 and there is no mask, so nothing of the image will be left; set denoise"
            " below 1 to keep some"
        )
    if image.shape[1:3] != (height, width):
        notes.append(
            f"the image is {image.shape[2]} x {image.shape[1]} and was resized to {width} x"
            f" {height}"
        )
    return notes


class L2PScheduler(io.ComfyNode):
    """The published sigma schedule → SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PScheduler",
            display_name="L2P Scheduler",
            category="L2P",
            description=(
                "Outputs exactly the published sigma schedule, for SamplerCustom and"
                " SamplerCustomAdvanced."
            ),
            search_aliases=["sigmas", "basic scheduler", "flow shift"],
            inputs=[
                STEPS,
                SHIFT,
                setting(
                    "denoising_strength",
                    "denoise",
                    tooltip="How much noise an image gets: 1 keeps nothing of it.",
                ),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, steps: int, shift: float, denoise: float) -> io.NodeOutput:
        check_numbers(shift=shift, denoising_strength=denoise)
        return io.NodeOutput(schedule(steps, denoise, shift))


def sizes_of(model) -> tuple[int, int, tuple[int, int]]:
    """What height and width must be multiples of, the width of captions, and the height and width
    that the model was trained at. Raises ValueError for another model."""
    if isinstance(model.model, L2PModel):
        config = model.model.diffusion_model.config
        trained = model.model.model_config.unet_config["trained_size"]
        return config.size_multiple, config.cap_feat_dim, trained
    raise ValueError(
        f"the model is a {type(model.model).__name__}, which is no L2P model. Load one with Load"
        " L2P Checkpoint"
    )


def drawn_size(
    image: Tensor | None, height: int, width: int, trained: tuple[int, int], multiple: int
) -> tuple[int, int]:
    """Height and width, with `OWN_SIZE` in the place of zeros. Raises ValueError where they are no
    multiples."""
    rows, columns = trained if image is None else image.shape[1:3]
    shrink = min(1.0, math.sqrt(LARGEST * math.prod(trained) / (rows * columns)))
    height, width = size_for(
        shrink * rows, shrink * columns, multiple, height or None, width or None
    )
    check_size(height, width, multiple)
    return height, width


def check_conditioning(conditioning: list, config: PixelConfig) -> None:
    """Raise ValueError unless a text encoder that fits the model made it."""
    encoder = "Qwen3-4B, or the bundled one for the bundled model"
    if isinstance(config, BackboneConfig):
        encoder = f"in Load Z-Image Text Encoder, set latent_model to {config.row.title}"
    for features, _ in conditioning:
        if features.shape[-1] != config.cap_feat_dim:
            raise ValueError(
                f"the conditioning is {features.shape[-1]} wide, this model reads"
                f" {config.cap_feat_dim}. Encode the prompt with the text encoder it was trained"
                f" with: {encoder}"
            )


NODES = [L2PKSampler, L2PScheduler]
