"""What drawing will hold in memory, and how often the model runs, by a checkpoint's header alone."""
import math

import torch

from .generate import Picture
from .header import read_header
from .meter import Meter, shapes_only
from .model import L2PTransformer
from .pipeline import L2PPipeline
from .sampler import guided_velocity, schedule, solver
from .stages import in_windows, windows
from .text import MAX_TOKENS, encoder_files

KEPT_IN_8_BITS = "int8_tensorwise"  # other formats are multiplied out


def estimate(pipe: L2PPipeline, picture: Picture, batch: int, free_text_encoder: bool) -> tuple[dict[str, int], list[tuple[int, int, int]]]:
    """Bytes held at the peak, by what they are for, with their sum as "in all"; and the passes through the model that one batch
    takes: (how many, height, width) for each stage.

    Prompts count as 512 tokens. Two steps of the last stage are run on tensors that have only a shape."""
    layout, dtype = pipe.layout, pipe.dtype
    weights = sum(math.prod(source.shape) * (1 if source.format == KEPT_IN_8_BITS else dtype.itemsize)
                  for source in layout.tensors.values())
    encoder = sum(entry.count * dtype.itemsize for file in encoder_files(pipe.text_encoder_path) for entry in read_header(file)[0].values())
    with torch.device("meta"):
        model = L2PTransformer(layout.config).to(dtype).requires_grad_(False)
    model.decoder_tile = pipe.decoder_tile
    *_, last = plan = picture.plan(pipe)
    sigmas = schedule(2)
    with shapes_only(model), Meter() as meter:
        captions = [torch.empty(MAX_TOKENS, layout.config.cap_feat_dim, dtype=dtype) for _ in range(batch)]
        noise = torch.empty(batch, 3, last.height, last.width)
        velocity = guided_velocity(model, captions, captions, picture.cfg_scale)
        if last.window:
            velocity = in_windows(velocity, last.window, layout.config.size_multiple)
        solver(picture.sampler)(velocity, noise, sigmas)
    drawing = {"model": weights, "pictures and what passes": meter.peak()}
    parts = drawing if free_text_encoder else {"text encoder": encoder, **drawing}
    in_all = max(sum(drawing.values()), encoder) if free_text_encoder else sum(parts.values())
    each = 1 if picture.cfg_scale == 1 else 2
    return {**parts, "in all": in_all}, [(each * stage.steps * len(windows(*stage[:2], stage.window, layout.config.size_multiple)),
                                          *(min(side, stage.window or side) for side in stage[:2])) for stage in plan]
