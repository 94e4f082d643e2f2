"""A transformer of diffusers with the local decoder, with the interface of `L2PTransformer`.

Letters in shapes: B batch, H W image size, h w patch grid, N image tokens, L prompt tokens, D
width. Time t runs from 0 (noise) to 1 (image). The output predicts image - noise."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import DECODER, BackboneConfig
from .decoder import LocalDecoder
from .model import PUBLISHED, Hooks, check_inputs


class DiffusersL2P(nn.Module):
    """Predicts image - noise from a noisy image, its time and its prompt."""

    def __init__(self, config: BackboneConfig):
        """Raises ImportError where diffusers is absent or lacks the class."""
        super().__init__()
        self.config = config
        row = config.row
        transformer = diffusers_class(row.diffusers_class)(
            **dict(config.arguments), in_channels=3 * config.patch_size**2
        )
        setattr(transformer, row.output, nn.Identity())
        setattr(transformer, DECODER, LocalDecoder(config))
        # Not a child: both share one table of children, so that tensors have diffusers' names, and
        # a layer that is replaced in one is replaced in both.
        self.__dict__["transformer"] = transformer
        self._modules = transformer._modules

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `forward` computes in; INT8 weights are scaled to it."""
        return self.local_decoder.out_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.local_decoder.out_conv.weight.device

    @property
    def main_blocks(self) -> list[nn.Module]:
        """The blocks that `freeze` counts and LoRAs change."""
        return [block for stack in self.config.row.stacks for block in self.get_submodule(stack)]

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they run."""
        return self.main_blocks

    @property
    def shared_parts(self) -> list[nn.Module]:
        """Parts that the blocks share, which stay frozen where any block does."""
        return [self.get_submodule(part) for part in self.config.row.shared]

    def forward(
        self,
        image: Tensor,
        t: Tensor,
        prompt_embeds: list[Tensor],
        hooks: Hooks = PUBLISHED,
        others: Sequence[tuple[list[Tensor], Hooks]] = (),
    ) -> Tensor | list[Tensor]:
        """Predict image - noise, as `L2PTransformer.forward` does.

        Raises ValueError where the arguments do not fit each other or the model, and where hooks
        change how blocks run: the step cache and neighbourhoods."""
        prompts = ((prompt_embeds, hooks), *others)
        for each, its in prompts:
            check_inputs(self.config, image, t, each)
            if type(its).run_block is not Hooks.run_block or its.neighbourhood:
                raise ValueError(
                    f"{self.config.row.title} runs its blocks as diffusers does; expected hooks"
                    " without step cache and neighbourhood"
                )
        image = image.to(self.dtype)
        features = [self.features(image, t, each, its) for each, its in prompts]
        predicted = self.local_decoder(image, features, hooks.decoder_tile)
        if self.config.row.sign < 0:
            predicted = [-each for each in predicted]
        return predicted if others else predicted[0]

    def features(
        self, image: Tensor, t: Tensor, prompt_embeds: list[Tensor], hooks: Hooks = PUBLISHED
    ) -> Tensor:
        """Run the transformer without its decoder: (B, D, h, w).

        Neighbours whose prompts are of one length run together, so that no prompt is padded by
        another's length."""
        self.config.check_rope_scale(*hooks.rope_scale)
        patch = self.config.patch_size
        h, w = image.shape[-2] // patch, image.shape[-1] // patch
        x = F.pixel_unshuffle(image, patch).flatten(2).transpose(1, 2)  # (B, N, 3 * p * p)
        tokens, start = [], 0
        for _, members in groupby(prompt_embeds, key=len):
            prompts = torch.stack([*members]).to(image.dtype)
            run = slice(start, start + len(prompts))
            inputs = self.config.row.inputs(x[run], 1 - t[run], prompts, h, w, hooks)
            tokens.append(self.transformer(**inputs, return_dict=False)[0])  # (B, N, D)
            start = run.stop
        return torch.cat(tokens).transpose(1, 2).unflatten(2, (h, w))


def build(config: BackboneConfig) -> DiffusersL2P:
    """The model, its weights on the meta device. Raises ImportError without diffusers."""
    try:
        from accelerate import init_empty_weights
    except ImportError:
        raise missing(config.row.title) from None
    # Unlike a device context, this leaves alone what a class computes for itself, such as RoPE.
    with init_empty_weights(include_buffers=False):
        return DiffusersL2P(config)


def diffusers_class(name: str) -> Any:
    """Import a class of diffusers. Raises ImportError where there is none."""
    try:
        import diffusers
    except ImportError:
        raise missing(name) from None
    found = getattr(diffusers, name, None)
    if found is None:
        raise ImportError(
            f"diffusers {diffusers.__version__} has no {name}: pip install 'comfyui-l2p[backbones]'"
        )
    return found


def missing(what: str) -> ImportError:
    """The error where the extra is not installed."""
    return ImportError(f"{what} needs diffusers: pip install 'comfyui-l2p[backbones]'")
