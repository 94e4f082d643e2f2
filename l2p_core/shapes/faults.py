"""Deliberate faults, one at a time: what the small model's score is worth as a witness.

Each fault is a context manager over a pipeline. Within it the pipeline has the fault; it gives the
settings to generate with, as the pipeline takes them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from .. import decoder, pipeline
from ..pipeline import L2PPipeline

Settings = dict[str, Any]
Fault = Callable[[L2PPipeline], AbstractContextManager[Settings]]


def _settings(**settings: object) -> Fault:
    """A fault that is a wrong setting."""

    @contextmanager
    def fault(pipe: L2PPipeline) -> Iterator[Settings]:
        yield settings

    return fault


@contextmanager
def _wrong_guidance(pipe: L2PPipeline) -> Iterator[Settings]:
    """Guidance leads away from the prompt as far as it should lead to it."""
    right = pipeline.guided_velocity

    def wrong(model, positives, negatives, scale, *rest):
        return right(model, positives, negatives, 1 - scale, *rest)

    with patch.object(pipeline, "guided_velocity", wrong):
        yield {}


@contextmanager
def _weak_noise(pipe: L2PPipeline) -> Iterator[Settings]:
    right = pipeline.draw_noise
    with patch.object(pipeline, "draw_noise", lambda *given: 0.9 * right(*given)):
        yield {}


def _called(change: Callable[[tuple], tuple]) -> Fault:
    """A fault in what the transformer is called with: (image, t, captions, ...)."""

    @contextmanager
    def fault(pipe: L2PPipeline) -> Iterator[Settings]:
        handle = pipe.transformer.register_forward_pre_hook(lambda _, given: change(given))
        try:
            yield {}
        finally:
            handle.remove()

    return fault


def _reversed_time(given: tuple) -> tuple:
    image, t, *rest = given
    return image, 1 - t, *rest


def _coarse_time(given: tuple) -> tuple:
    image, t, *rest = given
    return image, (t * 16).round() / 16, *rest


def _swapped_prompts(given: tuple) -> tuple:
    """Each prompt goes to its neighbour in the batch."""
    image, t, captions, *rest = given
    return image, t, [*captions[1:], captions[0]], *rest


@contextmanager
def _zeroed_layer(pipe: L2PPipeline) -> Iterator[Settings]:
    """The middle main layer adds nothing."""
    layer = pipe.transformer.layers[len(pipe.transformer.layers) // 2]
    zeroed = layer.attention_norm2.weight, layer.ffn_norm2.weight
    before = [weight.detach().clone() for weight in zeroed]
    with torch.no_grad():
        for weight in zeroed:
            weight.zero_()
    try:
        yield {}
    finally:
        with torch.no_grad():
            for weight, value in zip(zeroed, before):
                weight.copy_(value)


def _norm_epsilon(value: float) -> Fault:
    """Another epsilon of the norms of queries and keys."""

    @contextmanager
    def fault(pipe: L2PPipeline) -> Iterator[Settings]:
        model = pipe.transformer
        blocks = (*model.noise_refiner, *model.context_refiner, *model.layers)
        norms = [
            norm for block in blocks for norm in (block.attention.norm_q, block.attention.norm_k)
        ]
        before = [norm.eps for norm in norms]
        for norm in norms:
            norm.eps = value
        try:
            yield {}
        finally:
            for norm, eps in zip(norms, before):
                norm.eps = eps

    return fault


@contextmanager
def _tile_without_overlap(pipe: L2PPipeline) -> Iterator[Settings]:
    before, pipe.decoder_tile = pipe.decoder_tile, 32
    try:
        with patch.object(decoder, "HALO", 0):
            yield {}
    finally:
        pipe.decoder_tile = before


FAULTS: dict[str, Fault] = {
    "none": _settings(),
    "schedule shift 1 in place of 3": _settings(shift=1.0),
    "schedule shift 12 in place of 3": _settings(shift=12.0),
    "noise scaled by 0.9": _weak_noise,
    "timestep reversed": _called(_reversed_time),
    "timestep rounded to bfloat16": _settings(bf16_rounding=True),
    "timestep rounded to sixteenths": _called(_coarse_time),
    "guidance on the wrong sign": _wrong_guidance,
    "one main layer zeroed": _zeroed_layer,
    "q/k norm epsilon 0.1 in place of 1e-5": _norm_epsilon(0.1),
    "decoder tile of 32 pixels without overlap": _tile_without_overlap,
    "prompts swapped in a batch": _called(_swapped_prompts),
}
