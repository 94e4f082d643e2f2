"""Each deliberate fault changes what the pipeline generates, and leaves no trace afterwards."""

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.shapes.faults import FAULTS

PROMPTS = [
    "a large red circle on a blue background, left",
    "a small yellow triangle on a black background, top",
]


@pytest.fixture(scope="module")
def pipe():
    return L2PPipeline.from_pretrained(torch_dtype=torch.float32)


def generated(pipe, **settings):
    images = pipe(PROMPTS, seed=[0, 1], **{"num_inference_steps": 4, **settings})
    return np.stack([np.asarray(image, dtype=float) for image in images])


@pytest.fixture(scope="module")
def right(pipe):
    return generated(pipe)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_and_leaves_no_trace(pipe, right, name):
    with FAULTS[name](pipe) as settings:
        wrong = generated(pipe, **settings)
    assert (np.abs(wrong - right).max() > 0) == (name != "none")
    if name in ("time reversed", "one main layer zeroed", "prompts swapped in a batch"):
        assert np.abs(wrong - right).mean() > 1  # of 255
    assert np.array_equal(generated(pipe), right)
