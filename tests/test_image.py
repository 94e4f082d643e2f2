"""Pixel conversions against recorded tables."""

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core.images import check_size, to_images, to_levels, to_mask, to_pixels
from PIL import Image

RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2))


@pytest.mark.parametrize(
    "dtype, table",
    [(torch.float32, "preprocess.u8_to_fp32"), (torch.bfloat16, "preprocess.u8_to_bf16")],
)
def test_levels_become_the_published_pixels(golden, dtype, table):
    pixels = to_pixels(RAMP, dtype)
    assert pixels.shape == (1, 3, 1, 256)
    assert torch.equal(pixels[0, 0, 0], golden("sampling_fp32")[table])


def test_pixels_become_the_published_levels(golden):
    recorded = golden("sampling_fp32")
    levels = to_levels(recorded["postprocess.in"].reshape(1, 1, 1, -1).expand(1, 3, 1, -1))
    assert torch.equal(levels[0, 0, :, 1], recorded["postprocess.u8"])


def test_a_image_comes_back_exactly():
    assert to_images(to_pixels(RAMP))[0].tobytes() == RAMP.tobytes()


def test_mask_is_white_for_anew():
    mask = to_mask(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)))
    assert mask.tolist() == [[[[0.0, 1.0]]]]


@pytest.mark.parametrize(
    "height, width, said",
    [
        (100, 96, "height is 100.*96 and 112"),
        (96, 8, "width is 8.*Nearest: 16"),
        (0, 96, "height is 0"),
    ],
)
def test_sizes_off_the_grid_name_the_nearest(height, width, said):
    with pytest.raises(ValueError, match=said):
        check_size(height, width, 16)
