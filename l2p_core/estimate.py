"""What generating will hold in memory, and how often the model runs, by a checkpoint's header
alone."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .files.header import read_header
from .files.load import bytes_in_memory
from .fit import Needs
from .flow import SOLVERS, guided_velocity, is_guided, schedule
from .meter import Meter, shapes_only
from .model import padded
from .settings import CompleteSettings
from .stages import Stage, in_windows, windows
from .text import MAX_TOKENS, encoder_files

if TYPE_CHECKING:
    from .pipeline import L2PPipeline


def estimate(
    pipe: L2PPipeline,
    settings: CompleteSettings,
    batch: int,
    free_text_encoder: bool,
    encode_on_cpu: bool = False,
) -> tuple[dict[str, int], list[tuple[int, int, int]]]:
    """Bytes held at the peak, by purpose, with their sum as "total", and what waits in
    the CPU's memory; and the passes through the model that one batch takes: (how many, height,
    width) for each stage.

    A text encoder that is not there, or works on the CPU, counts as nothing.
    Prompts count as 512 tokens. Two steps of the last stage are run on tensors that have only a
    shape."""
    needed = needs(pipe, settings, batch)
    streamed = pipe.streamed
    generating = {
        "model": needed.streamed if streamed else needed.model,
        "images and activations": needed.passing(pipe.decoder_tile),
    }
    encoder = 0 if encode_on_cpu else needed.text_encoder
    parts = generating if free_text_encoder else {"text encoder": encoder, **generating}
    in_all = max(sum(generating.values()), encoder) if free_text_encoder else sum(parts.values())
    beside = {"in the CPU's memory": needed.model} if streamed else {}
    multiple = pipe.layout.config.size_multiple
    passes = []
    for stage in pipe.plan_stages(settings):
        tiles = windows(stage.height, stage.width, stage.window, multiple)
        passes.append(
            (
                passes_of(settings, stage) * len(tiles),
                min(stage.height, stage.window or stage.height),
                min(stage.width, stage.window or stage.width),
            )
        )
    return {**parts, "total": in_all, **beside}, passes


def needs(pipe: L2PPipeline, settings: CompleteSettings, batch: int) -> Needs:
    """Return what generating takes, for `fit.place`."""
    stacks = tuple(f"{stack}." for stack in pipe.layout.config.depths)  # what `offload` streams
    by_block: Counter[str] = Counter()  # bytes, by the part of the name that tells a block
    for name, size in bytes_in_memory(pipe.layout, pipe.dtype, pipe.in_fp8).items():
        by_block[".".join(name.split(".")[:2]) if name.startswith(stacks) else ""] += size
    model = by_block.total()
    outside = by_block.pop("")
    streamed = outside + sum(size for _, size in by_block.most_common(2))
    encoder = encoder_bytes(pipe.text_encoder_path, pipe.dtype)
    return Needs(encoder, model, streamed, cache(partial(passing, pipe, settings, batch)))


def encoder_bytes(text_encoder: Path, dtype: torch.dtype) -> int:
    """Return the bytes of a text encoder in memory; 0 where it does not exist."""
    files = encoder_files(text_encoder) if text_encoder.exists() else []
    return sum(
        entry.count * dtype.itemsize for file in files for entry in read_header(file)[0].values()
    )


def passing(
    pipe: L2PPipeline, settings: CompleteSettings, batch: int, decoder_tile: int | None
) -> int:
    """Return the bytes of images and of what passes through the model, at the peak."""
    layout, dtype = pipe.layout, pipe.dtype
    model = layout.config.build().to(dtype).requires_grad_(False)
    last = pipe.plan_stages(settings)[-1]
    sigmas = schedule(2)  # numbers, so not made on shapes
    with shapes_only(model), Meter() as meter:
        captions = [
            torch.empty(MAX_TOKENS, layout.config.cap_feat_dim, dtype=dtype) for _ in range(batch)
        ]
        noise = torch.empty(batch, 3, last.height, last.width)
        velocity = guided_velocity(
            model,
            captions,
            captions,
            last.cfg_scale,
            batch_guidance=pipe.batch_guidance,
            decoder_tile=decoder_tile,
            neighbourhood=last.neighbourhood // layout.config.patch_size,
        )
        asked: set[float] = set()

        def once(x: Tensor, sigma: float) -> Tensor:
            """The velocity of each step's first window; the others hold the same."""
            known = sigma in asked
            asked.add(sigma)
            return torch.empty_like(x) if known else velocity(x, sigma)

        multiple = layout.config.size_multiple
        SOLVERS[settings.sampler](
            in_windows(once, last.window, multiple) if last.window else velocity, noise, sigmas
        )
    kept = 0
    if settings.cache_threshold and not last.window:
        patch = layout.config.patch_size
        tokens = padded(last.height // patch * (last.width // patch)) + padded(MAX_TOKENS)
        passes_a_step = 1 if last.cfg_scale == 1 else 2
        held = 2 * passes_a_step + 1  # by `StepCache`: two for each pass, and one while it runs
        kept = held * batch * tokens * layout.config.dim * dtype.itemsize
    if settings.inpaint_mask:  # its image, its noise and itself are held all the way
        kept += 4 * last.height * last.width * (3 + 3 * batch + 1)
    return meter.peak() + kept


def passes_of(settings: CompleteSettings, stage: Stage) -> int:
    """Of the model in a stage: two for each step with guidance, be they batched or not, one for
    each without."""
    sigmas = schedule(stage.steps, stage.strength, settings.shift)[:-1].tolist()
    return sum(
        2 if is_guided(sigma, stage.cfg_scale, settings.cfg_truncation) else 1 for sigma in sigmas
    )
