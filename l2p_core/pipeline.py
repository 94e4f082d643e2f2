"""The whole path as one object: files and a prompt → images."""

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from .attention import AUTO, check_backend
from .config import L2PConfig
from .devices import default_device, default_dtype, empty_cache, free_memory, threads_for
from .files.fp8 import multiplies_fp8
from .files.layout import Layout, read_layout
from .files.load import check, has_fp8, load_model
from .files.lora import Change, add_changes, read_lora
from .fit import RESERVE, SHARE, Placement, place
from .flow import SOLVERS, Callback, guided_velocity, inpaint_velocity, interpolate, schedule
from .images import (
    check_size,
    eight_bits,
    flatten,
    mask_levels,
    size_for,
    to_images,
    to_mask,
    to_pixels,
)
from .model import L2PTransformer
from .settings import FIELDS, CompleteSettings, checked, reject_hooks
from .shapes.parse import read_prompt
from .stages import Stage, in_windows, misfit, plan_stages, run_stages
from .text import TextEncoder, find_encoder

KEPT_ENCODINGS = 64
BUNDLED_MODEL = Path(__file__).parent / "shapes" / "model"


class Defaults(NamedTuple):
    """The default settings of a checkpoint."""

    num_inference_steps: int
    cfg_scale: float
    height: int
    width: int


class Lora(NamedTuple):
    """A LoRA that images are generated with."""

    layout: Layout
    strength: float
    changes: Mapping[str, Change]


class L2PPipeline:
    """Generates images from prompts.

        pipe = L2PPipeline.from_pretrained("model-1k-merge.safetensors", "Z-Image-Turbo")
        pipe("a lighthouse at dusk", seed=42).save("lighthouse.png")

    The text encoder is loaded at the first prompt and the model at the first image, so each can
    be in memory alone: see `encode_prompt` and `unload_text_encoder`."""

    def __init__(
        self,
        layout: Layout,
        text_encoder: Path,
        tokenizer: Path | None,
        device: torch.device,
        dtype: torch.dtype,
        progress: bool = False,
        decoder_tile: int | None = None,
        offload: bool | None = None,
        batch_guidance: bool = False,
        compile_blocks: bool = False,
        load_on_cpu: bool = False,
        prompt_reader: Callable[[str, int], str] | None = None,
        attention: str = AUTO,
        fp8: bool = False,
    ):
        """See `from_pretrained`. load_on_cpu: load the model there; training moves it in parts.
        prompt_reader: what makes of a prompt and a seed the prompt that is encoded."""
        self.layout, self.device, self.dtype = layout, device, dtype
        self.text_encoder_path, self.tokenizer_path = text_encoder, tokenizer
        self.decoder_tile, self.offload, self._progress = decoder_tile, offload, progress
        self.batch_guidance, self.compile_blocks = batch_guidance, compile_blocks
        self.load_on_cpu, self._prompt_reader = load_on_cpu, prompt_reader
        self.attention, self.fp8 = attention, fp8
        self.loras: list[Lora] = []  # see `load_lora`
        self._encode_on_cpu = False
        self._encodings: dict[str, Tensor] = {}  # of the prompts seen last

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path | None = None,
        text_encoder: str | Path | None = None,
        tokenizer: str | Path | None = None,
        device: str | torch.device | None = None,
        torch_dtype: torch.dtype | None = None,
        convrot_groupsize: int | None = None,
        progress: bool = False,
        decoder_tile: int | None = None,
        offload: bool | None = None,
        batch_guidance: bool = False,
        compile_blocks: bool = False,
        load_on_cpu: bool = False,
        trained_size: tuple[int, int] | None = None,
        attention: str = AUTO,
        fp8: bool = False,
    ) -> "L2PPipeline":
        """Open a checkpoint of any kind that `load_model` reads; only its header is read for now.

        checkpoint: None for the bundled small model, for which prompts are completed: see
        `read_prompt`. text_encoder, tokenizer: as for
        `TextEncoder.load`; by default `text_encoder/` and `tokenizer/` beside the checkpoint.
        device: by default the accelerator where there is one. torch_dtype: by default the one that
        suits the device and the model, see `default_dtype`. progress: show a bar while loading.
        decoder_tile: side in pixels of the squares that the local decoder computes one after
        another, 0 for the whole at once; by default large images are cut. The image is the
        same. offload: keep the model's weights in the CPU's memory, and on the device only the
        block that computes and the next; by default where it does not fit: see `place`.
        batch_guidance: run both passes of a guided step as one of twice the batch. compile_blocks:
        with torch.compile, which takes a while at the first images. load_on_cpu: load the model
        there whatever the device is. trained_size: height and width of the trained resolution,
        where it is not what the checkpoint says. attention: the kernel, one of
        `attention.BACKENDS`; whether the device has it is tried when the model is loaded. fp8:
        keep FP8 weights (float8_e4m3fn) and multiply in FP8, see `in_fp8`. Raises
        CheckpointError where the checkpoint can't be used, and ValueError for a tile below 0, or
        for fp8 where there are no such weights."""
        if decoder_tile is not None and decoder_tile < 0:
            raise ValueError(
                f"decoder_tile is {decoder_tile}; expected a side in pixels, or 0 for no tiles"
            )
        prompt_reader = None if checkpoint else read_prompt
        checkpoint = Path(checkpoint) if checkpoint else BUNDLED_MODEL / "transformer.safetensors"
        layout = read_layout(checkpoint, convrot_groupsize)
        check(layout)
        if fp8 and not has_fp8(layout):
            raise ValueError(
                f"fp8 is for FP8 checkpoints, and {layout.path.name} holds no float8_e4m3fn weights"
                " with scales. Leave it out, or make such a checkpoint: l2p quantize --format"
                " float8_e4m3fn"
            )
        if trained_size:
            height, width = trained_size
            metadata = {**layout.metadata, "modelspec.resolution": f"{width}x{height}"}
            layout = replace(layout, metadata=metadata)
        if text_encoder is None:
            folders = (
                (checkpoint, checkpoint.parent) if checkpoint.is_dir() else (checkpoint.parent,)
            )
            text_encoder = (
                next(
                    (folder for folder in folders if (folder / "text_encoder").is_dir()), folders[0]
                )
                / "text_encoder"
            )
        device = usable_device(device or default_device())
        return cls(
            layout,
            find_encoder(text_encoder),
            Path(tokenizer) if tokenizer else None,
            device,
            torch_dtype or default_dtype(device, layout.parameters),
            progress,
            decoder_tile,
            offload,
            batch_guidance,
            compile_blocks,
            load_on_cpu,
            prompt_reader,
            attention,
            fp8,
        )

    @property
    def streamed(self) -> bool:
        """Whether the model's weights stay in the CPU's memory: as `offload` says, or as `place`
        chose."""
        if self.offload is None and self.device.type == "cpu":
            return False
        if self.offload is None:
            self.offload = self.place(self.complete({}), 1).offload
        return self.offload

    @property
    def in_fp8(self) -> bool:
        """Whether FP8 weights are multiplied as such: where `fp8` asks for it, the device can, and
        no LoRA changes them. They are dequantized elsewhere."""
        return self.fp8 and not self.loras and multiplies_fp8(self.device)

    def place(
        self,
        settings: CompleteSettings,
        batch: int,
        free_text_encoder: bool | None = None,
        free: int | None = None,
    ) -> Placement:
        """Choose what stays on the accelerator, by `fit.place`, for images of these
        settings.

        free_text_encoder: None where that is left open. free: bytes of free memory to plan for; by
        default the device's. What the user asked for is kept; on a CPU everything stays."""
        from .estimate import needs

        if free is None and (free := free_memory(self.device)) is not None:
            free += self._loaded_bytes()  # what is loaded already is placed anew
        return place(
            needs(self, settings, batch),
            free,
            free_text_encoder,
            self.offload,
            self.decoder_tile,
            find_spec("diffusers") is not None,
        )

    def adopt(self, placement: Placement) -> None:
        """Load and generate as `place` chose."""
        self.offload, self.decoder_tile = placement.offload, placement.decoder_tile
        self._encode_on_cpu = placement.encode_on_cpu

    def _loaded_bytes(self) -> int:
        """Bytes of the text encoder and the model that are in the accelerator's memory."""
        encoder, model = self.__dict__.get("text_encoder"), self.__dict__.get("transformer")
        modules = [each for each in (encoder and encoder.model, model) if each is not None]
        return sum(
            weight.nbytes
            for module in modules
            for weight in module.state_dict().values()
            if weight.device.type == self.device.type
        )

    def _encoder_device(self) -> torch.device:
        """The CPU where the text encoder has no room, alone or beside a model that is loaded."""
        from .estimate import encoder_bytes

        free = free_memory(self.device)
        if self._encode_on_cpu:
            return torch.device("cpu")
        if free is None or "transformer" not in self.__dict__:
            return self.device
        size = encoder_bytes(self.text_encoder_path, self.dtype)
        return self.device if size <= SHARE * free - RESERVE else torch.device("cpu")

    @cached_property
    def transformer(self) -> L2PTransformer:
        """The model, loaded when it is first used."""
        self._check_attention()
        on_cpu = self.streamed or self.load_on_cpu
        if self.fp8 and not self.in_fp8:
            reason = "a LoRA changes them" if self.loras else f"{self.device} has no FP8 product"
            warnings.warn(f"FP8 weights are dequantized: {reason}", stacklevel=2)
        model = load_model(
            self.layout,
            "cpu" if on_cpu else self.device,
            self.dtype,
            progress=self._progress,
            fp8=self.in_fp8,
        )
        add_changes(model, [(lora.changes, lora.strength) for lora in self.loras])
        if self.streamed:
            stream_blocks(model, self.device)
        if self.compile_blocks:
            for block in model.blocks:
                block.compile(dynamic=True)  # one graph for all sizes and lengths of prompts
        return model

    def _check_attention(self) -> None:
        """Raise ValueError where the model or the device does not support `attention`."""
        config = self.layout.config
        if isinstance(config, L2PConfig):
            check_backend(self.attention, self.device, self.dtype, config.head_dim)
        elif self.attention != AUTO:
            raise ValueError(
                f"attention is {self.attention}, which {self.layout.model} does not support. Set it"
                f" to {AUTO}"
            )

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, loaded when it is first used."""
        return TextEncoder.load(
            self.text_encoder_path,
            self.tokenizer_path,
            self._encoder_device(),
            self.dtype,
            self.layout.config.prompts,
        )

    def load_lora(self, file: str | Path, strength: float = 1.0) -> None:
        """Generate with this LoRA from now on, beside those that were given before.

        file: LoRA, LoHa, LoKr or a difference, as any trainer names them, for weights of any kind.
        strength: 0 for no effect, 1 for what was trained; below 0 for the opposite. The model is
        loaded again at the next image. Raises CheckpointError where the file does not fit the
        checkpoint, and ValueError for a strength that is no number."""
        layout = read_layout(file)
        self.loras.append(Lora(layout, strength, read_lora(layout, self.layout, strength)))
        self.__dict__.pop("transformer", None)

    def unload_loras(self) -> None:
        """Generate without LoRAs from now on."""
        self.loras.clear()
        self.__dict__.pop("transformer", None)

    @property
    def defaults(self) -> Defaults:
        """The checkpoint's own settings, else the published ones; the size the model was trained
        at."""
        steps, guidance = self.layout.config.steps_and_guidance
        own: dict[str, Any] = self.own_settings
        return Defaults(
            own.get("num_inference_steps", steps),
            own.get("cfg_scale", guidance),
            *self.layout.trained_size,
        )

    @property
    def own_settings(self) -> dict[str, str | int | float]:
        """What the checkpoint says to generate with, or a LoRA of it: see
        `Layout.default_settings`."""
        settings = dict(self.layout.default_settings)
        for lora in self.loras:
            settings |= lora.layout.default_settings if lora.strength > 0 else {}
        return settings

    def read_prompt(self, prompt: str, seed: int) -> str:
        """Return the prompt that is encoded for an image of that seed.

        The bundled small model knows one form of prompt. What a prompt leaves open (size, place,
        colour, shape) is filled in at random by the seed, and unknown words are named in a warning.
        Prompts of other checkpoints are read as they are."""
        return self._prompt_reader(prompt, seed) if self._prompt_reader else prompt

    def encode_prompt(self, prompt: str) -> Tensor:
        """(L, cap_feat_dim) features of one prompt, to be used for any number of images. The
        empty one has some too."""
        if prompt not in self._encodings:
            while len(self._encodings) >= KEPT_ENCODINGS:
                del self._encodings[next(iter(self._encodings))]
            self._encodings[prompt] = self.text_encoder.encode(prompt)
        return self._encodings[prompt]

    def unload_text_encoder(self) -> None:
        """Take the text encoder out of memory. Prompts seen lately stay encoded; a new one loads it
        again."""
        self.__dict__.pop("text_encoder", None)
        empty_cache(self.device)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str = "",
        *,
        seed: int | Sequence[int] | None = None,
        input_image: Image.Image | None = None,
        inpaint_mask: Image.Image | None = None,
        num_images: int | None = None,
        callback: Callback | None = None,
        prompt_embeds: Tensor | Sequence[Tensor] | None = None,
        negative_prompt_embeds: Tensor | None = None,
        bf16_rounding: bool = False,
        **settings: object,
    ) -> Image.Image | list[Image.Image]:
        """Generate. Returns one image for one prompt, and a list for several prompts or where
        num_images is given.

        prompt: one, or several for one batch; or prompt_embeds, what `encode_prompt` gave for them.
        seed: one for the whole batch, as ComfyUI takes it; or one for each image; None for a random
        one. input_image: start from this image, resized with a warning where it has another size.
        Its transparent parts are white. inpaint_mask: white is generated, black keeps the input
        image's pixels exactly; see `images.mask_levels` for transparent ones. num_images:
        images for each prompt, in one batch. callback: called in each step, after the model, with
        the steps done, all steps, and the x0 prediction, (B, 3, H, W) in about [-1, 1]; raise from
        it to stop. bf16_rounding: round timesteps and the input image as the published pipeline
        does. settings: all others of `settings.Settings`, by name; what is left out has the
        checkpoint's default. Raises ValueError for sizes, counts and values that do not fit, and
        TypeError for a name that is no setting."""
        if unknown := settings.keys() - FIELDS.keys():
            raise TypeError(f"{min(unknown)} is no setting; there are {', '.join(FIELDS)}")
        check_mask(inpaint_mask, input_image)
        if isinstance(seed, int):
            checked("seed", seed)
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        if inpaint_mask is not None:
            inpaint_mask = mask_levels(inpaint_mask, input_image)
        if input_image is not None:
            input_image = flatten(eight_bits(input_image))
        chosen = self.complete(settings, input_image)
        plan = self.plan_stages(chosen)

        placement = None
        if free_memory(self.device) is not None and "transformer" not in self.__dict__:
            placement = self.place(chosen, batch_size(prompt, prompt_embeds, num_images))
            self.adopt(placement)

        single = num_images is None and (
            isinstance(prompt, str) or isinstance(prompt_embeds, Tensor)
        )
        copies = 1 if num_images is None else num_images
        if prompt_embeds is None:
            assert prompt is not None  # one of the two was given
            prompts = [prompt] if isinstance(prompt, str) else prompt
            prompts = [each for each in prompts for _ in range(copies)]
            read = map(self.read_prompt, prompts, reading_seeds(seed, len(prompts)))
            positives = [self.encode_prompt(each) for each in read]
        else:
            given = [prompt_embeds] if isinstance(prompt_embeds, Tensor) else prompt_embeds
            positives = [each for each in given for _ in range(copies)]
        positives = [each.to(self.device) for each in positives]
        if not positives:
            raise ValueError("there is nothing to generate: no prompts, or num_images is 0")
        negatives = positives
        if any(stage.cfg_scale != 1 for stage in plan):
            negative = (
                self.encode_prompt(negative_prompt)
                if negative_prompt_embeds is None
                else negative_prompt_embeds
            )
            negatives = [negative.to(self.device)] * len(positives)
        if placement and placement.free_text_encoder:
            self.unload_text_encoder()
        if warning := misfit(plan, self.layout.trained_size):
            warnings.warn(warning, stacklevel=2)
        if chosen.cache_threshold and any(stage.window for stage in plan):
            warnings.warn("cache_threshold has no effect in tiles (redraw tiled)", stacklevel=2)
        done, in_all = 0, sum(stage.steps for stage in plan)

        def generate(
            stage: Stage, start: Tensor | None, image: Tensor | None, mask: Tensor | None
        ) -> Tensor:
            nonlocal done
            velocity = guided_velocity(
                self.transformer,
                positives,
                negatives,
                stage.cfg_scale,
                replace(chosen, cache_threshold=0.0) if stage.window else chosen,
                bf16_rounding,
                self.batch_guidance,
                stage.rope_scale,
                self.decoder_tile,
                stage.neighbourhood // self.layout.config.patch_size,
                self.attention,
            )
            if stage.window:
                velocity = in_windows(velocity, stage.window, self.layout.config.size_multiple)
            sigmas = schedule(stage.steps, stage.strength, chosen.shift)
            noise = draw_noise(
                (len(positives), 3, stage.height, stage.width), seed, chosen.rand_device
            ).to(self.device)
            if mask is not None:
                velocity = inpaint_velocity(velocity, mask, image, noise)
            x = noise if start is None else interpolate(start, noise, sigmas[0])
            del start, noise  # not held while sampling
            before, done = done, done + stage.steps
            report = callback and (lambda step, _, x0: callback(before + step, in_all, x0))
            return SOLVERS[chosen.sampler](velocity, x, sigmas, report)

        def image_at(stage: Stage) -> Tensor:
            pixels = fit(input_image, stage.height, stage.width, "input_image")
            return (
                to_pixels(pixels, torch.bfloat16 if bf16_rounding else torch.float32)
                .float()
                .to(self.device)
            )

        def mask_at(stage: Stage) -> Tensor:
            return to_mask(fit(inpaint_mask, stage.height, stage.width, "inpaint_mask")).to(
                self.device
            )

        work = self.layout.parameters * self._tokens(plan[-1]) * len(positives)
        with threads_for(work, self.device):
            x = run_stages(plan, generate, input_image and image_at, inpaint_mask and mask_at)
        if inpaint_mask is not None:
            mask = mask_at(plan[-1])
            x = mask * x.clamp(-1, 1) + (1 - mask) * image_at(plan[-1])
        images = to_images(x)
        return images[0] if single else images

    def complete(
        self, values: Mapping[str, object], image: Image.Image | None = None
    ) -> CompleteSettings:
        """Check settings and fill in the checkpoint's defaults for what is left out or None.

        image: the input image, whose size counts where none is given. Raises ValueError for a value
        that does not fit."""
        given: dict[str, Any] = {  # each in the type of its setting
            name: checked(name, value) for name, value in values.items() if value is not None
        }
        if image is not None:
            given["height"], given["width"] = self.size_for(
                image, given.get("height"), given.get("width")
            )
        defaults: dict[str, Any] = {
            "shift": self.layout.config.shift,
            **self.own_settings,
            **self.defaults._asdict(),
        }
        settings = CompleteSettings(**{**defaults, **given})
        if not self.layout.config.hooks_run_blocks:
            reject_hooks(settings, self.layout.model)
        self.check_size(settings.height, settings.width)
        usable_device(settings.rand_device)
        return settings

    def plan_stages(self, settings: CompleteSettings) -> list[Stage]:
        """See `stages.plan_stages`. Raises ValueError where the model can't run a stage, too."""
        config = self.layout.config
        plan = plan_stages(settings, self.layout.trained_size, config.size_multiple)
        config.check_rope_scale(*(stage.rope_scale for stage in plan))
        return plan

    def _tokens(self, stage: Stage) -> int:
        """Image tokens of one pass."""
        return stage.height * stage.width // self.layout.config.patch_size**2

    def size_for(
        self, image: Image.Image, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """Return the supported height and width nearest to the image's; where one is given, the
        other in proportion."""
        return size_for(image.height, image.width, self.layout.config.size_multiple, height, width)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming the nearest sizes, unless the checkpoint supports this one."""
        check_size(height, width, self.layout.config.size_multiple)


def batch_size(
    prompt: str | Sequence[str] | None,
    prompt_embeds: Tensor | Sequence[Tensor] | None,
    num_images: int | None,
) -> int:
    """Return how many images one call generates."""
    given = prompt if prompt_embeds is None else prompt_embeds
    prompts = 1 if isinstance(given, (str, Tensor)) else len(given or ())
    return max(1, prompts * (num_images or 1))


def reading_seeds(seed: int | Sequence[int] | None, images: int) -> list[int]:
    """The seed by which each image's prompt is read: its own, or one apart from one for all."""
    if isinstance(seed, Sequence):
        return [*seed, *range(images)][:images]  # a wrong number of them is an error of its own
    first = random.randrange(2**32) if seed is None else seed
    return [first + number for number in range(images)]


def check_mask(mask: object, image: object) -> None:
    """Raise ValueError for a mask, or a file of one, without the image it keeps pixels of."""
    if mask and not image:
        raise ValueError(
            "inpaint_mask is given without input_image; give the image that the mask belongs to"
        )


def usable_device(name: str | torch.device) -> torch.device:
    """The device, tried. Raises ValueError where torch has none of that name here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name} can't be used here: {str(error).splitlines()[0]}"
        ) from None


def stream_blocks(model: L2PTransformer, device: torch.device) -> None:
    """Leave the weights where they are, and have each block's fetched while the one before it
    computes."""
    try:
        from diffusers.hooks import apply_group_offloading
    except ImportError:
        raise ImportError("offload needs diffusers: pip install 'comfyui-l2p[offload]'") from None
    apply_group_offloading(model, device, num_blocks_per_group=1, use_stream=device.type == "cuda")


def draw_noise(
    shape: tuple[int, int, int, int], seed: int | Sequence[int] | None, device: str = "cpu"
) -> Tensor:
    """Standard normal float32 of (B, 3, H, W): one draw from one seed, or one draw for each image
    from its own."""
    if isinstance(seed, Sequence):
        if len(seed) != shape[0]:
            raise ValueError(
                f"{len(seed)} seeds are given for {shape[0]} images; expected one seed for"
                " each image, or one for all"
            )
        return torch.cat([draw_noise((1, *shape[1:]), each, device) for each in seed])
    generator = torch.Generator(usable_device(device))
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def fit(image: Image.Image, height: int, width: int, name: str) -> Image.Image:
    """The image at that size, resized with a warning where it has another."""
    if image.size == (width, height):
        return image
    warnings.warn(
        f"{name} is {image.width} x {image.height} and was resized to {width} x {height}",
        stacklevel=3,
    )
    return image.convert("L" if name == "inpaint_mask" else "RGB").resize(
        (width, height), Image.Resampling.LANCZOS
    )
