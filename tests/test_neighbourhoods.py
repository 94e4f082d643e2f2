"""Attention within neighbourhoods, against attention under a mask that is written out."""

import pytest
import torch
from comfyui_l2p.l2p_core.model import Hooks
from comfyui_l2p.l2p_core.neighbourhoods import Neighbourhoods
from helpers import rms


class Masked(Hooks):
    """Says of each two tokens whether one may attend to the other, in a grid of 4 x 8 tokens."""

    def run_block(self, stack, index, block, *rest):
        self.shift = None if stack == "context_refiner" else index % 2 * 1  # side 3: 3 // 2
        return super().run_block(stack, index, block, *rest)

    def attend(self, q, k, v, lengths):
        tokens = torch.arange(k.shape[2])
        allowed = torch.ones(len(q), len(tokens), len(tokens), dtype=torch.bool)
        if self.shift is not None:
            rows, columns = (tokens // 8 - self.shift) // 3, (tokens % 8 - self.shift) // 3
            same = (rows[:, None] == rows) & (columns[:, None] == columns)
            image = tokens < 32
            allowed &= same | ~(image[:, None] & image)
        if lengths is not None:
            allowed &= (tokens < lengths[:, None])[:, None]
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed[:, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("lengths", [(5, 40), (7, 7)])
def test_image_tokens_attend_to_their_window_and_the_prompt(tiny_model, lengths):
    generator, width = torch.Generator().manual_seed(0), tiny_model.config.cap_feat_dim
    image = torch.randn(2, 3, 64, 128, generator=generator)
    prompts = [torch.randn(length, width, generator=generator) for length in lengths]
    with torch.no_grad():
        found, expected, whole = (
            tiny_model(image, torch.tensor([0.3, 0.6]), prompts, hooks)
            for hooks in (Hooks(neighbourhood=3), Masked(), Hooks())
        )
    assert rms(found - expected, expected) < 1e-5 < 1e-3 < rms(whole - expected, expected)


def test_windows_shift_by_half_and_cover_the_grid_once():
    places = torch.zeros(256, 192)
    for rows, columns in Neighbourhoods(256, 192, 64, 32).windows():
        places[rows, columns] += 1
    assert (places == 1).all()
    first, second = Neighbourhoods(256, 192, 64, 32).windows()[:2]
    assert first == (slice(0, 32), slice(0, 32)) and second == (slice(0, 32), slice(32, 96))
