"""Pixel latents: the empty one, IMAGE to latent and back. For graphs of ComfyUI's own samplers, and
for L2P KSampler.

A pixel LATENT is (B, 3, H, W) in [-1, 1], an IMAGE (B, H, W, 3) in [0, 1].
"""

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor

from .inputs import BATCH, side

RATIOS = {"square": (1024, 1024), "16:9": (1344, 768), "9:16": (768, 1344), "3:2": (1248, 832)}
PRESETS = {
    f"{scale}K {name} ({width * scale} x {height * scale})": (width * scale, height * scale)
    for scale in (1, 2, 4)
    for name, (width, height) in RATIOS.items()
}
CUSTOM = "custom"


class EmptyL2PLatentImage(io.ComfyNode):
    """A size → an empty pixel LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EmptyL2PLatentImage",
            display_name="Empty L2P Latent Image",
            category="L2P",
            description="Makes an empty pixel latent for ComfyUI's own samplers.",
            search_aliases=["empty latent", "size", "resolution", "aspect ratio"],
            inputs=[
                io.Combo.Input(
                    "size",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    tooltip="A usual size. With custom, width and height are used.",
                ),
                side("width", min=16),
                side("height", min=16),
                BATCH,
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, size: str, width: int, height: int, batch_size: int) -> io.NodeOutput:
        width, height = PRESETS.get(size, (width, height))
        return io.NodeOutput(
            {
                "samples": torch.zeros(
                    batch_size,
                    3,
                    height,
                    width,
                    device=comfy.model_management.intermediate_device(),
                )
            }
        )


class L2PImageToLatent(io.ComfyNode):
    """IMAGE → pixel LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PImageToLatent",
            display_name="L2P Image to Pixel Latent",
            category="L2P",
            description=(
                "Replaces VAE Encode: outputs the image's own pixels as a LATENT, in float32."
            ),
            search_aliases=["vae encode", "pixel latent"],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip=(
                        "One image or a batch. Its sides should be multiples of 16 pixels, and of"
                        " 64, 128 or 320 for the 4K, 8K and 10K models. Other sizes are padded"
                        " while sampling."
                    ),
                )
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, image: Tensor) -> io.NodeOutput:
        return io.NodeOutput({"samples": to_latent(image, len(image))})


class L2PLatentToImage(io.ComfyNode):
    """Pixel LATENT → IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PLatentToImage",
            display_name="L2P Pixel Latent to Image",
            category="L2P",
            description=(
                "Replaces VAE Decode: outputs the generated pixels as an IMAGE, in float32."
            ),
            search_aliases=["vae decode", "pixel latent"],
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip=(
                        "The output of a sampler with an L2P model. Decode a latent of another"
                        " model with the VAE of that model."
                    ),
                )
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, latent: dict) -> io.NodeOutput:
        samples = latent["samples"]
        if samples.dim() != 4 or samples.shape[1] != 3:
            raise ValueError(
                f"the latent is {tuple(samples.shape)}; expected pixels, (batch, 3, height, width)."
                " A latent of another model needs that model's VAE Decode"
            )
        return io.NodeOutput(to_image(samples))


def fit(image: Tensor, width: int, height: int) -> Tensor:
    """An IMAGE of that size."""
    if image.shape[1:3] == (height, width):
        return image
    return comfy.utils.common_upscale(
        image.movedim(-1, 1), width, height, "lanczos", "disabled"
    ).movedim(1, -1)


def fit_mask(mask: Tensor, width: int, height: int, batch_size: int) -> Tensor:
    """A MASK (B, H, W) of that size for so many images."""
    return comfy.utils.repeat_to_batch_size(
        comfy.utils.common_upscale(mask[:, None], width, height, "bilinear", "disabled")[
            :, 0
        ].float(),
        batch_size,
    )


def to_latent(image: Tensor, batch_size: int) -> Tensor:
    """IMAGE → pixel latent of so many images."""
    return comfy.utils.repeat_to_batch_size(
        image[..., :3].movedim(-1, 1).float() * 2 - 1, batch_size
    )


def to_image(samples: Tensor) -> Tensor:
    """Pixel latent → IMAGE, a millionth lighter: what was a level of 255 is one again when Save
    Image cuts fractions off."""
    return ((samples.float() + 1) / 2 + 2**-20).clamp(0, 1).movedim(1, -1)


NODES = [EmptyL2PLatentImage, L2PImageToLatent, L2PLatentToImage]
