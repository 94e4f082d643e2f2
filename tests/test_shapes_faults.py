"""Each deliberate fault changes what the pipeline generates, and leaves no trace afterwards."""

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.shapes.faults import FAULTS
from comfyui_l2p.l2p_core.shapes.scenes import test_scenes as unseen_scenes
from comfyui_l2p.l2p_core.shapes.score import generate, score

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


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_and_leaves_no_trace(pipe, right, name):
    with FAULTS[name](pipe) as settings:
        wrong = generated(pipe, **settings)
    assert (np.abs(wrong - right).max() > 0) == (name != "none")
    if name in ("timestep reversed", "one main layer zeroed", "prompts swapped in a batch"):
        assert np.abs(wrong - right).mean() > 1  # of 255
    assert np.array_equal(generated(pipe), right)


LOST = {  # percent right that a fault leaves at most, of the table in l2p_core/shapes/README.md
    "noise scaled by 0.9": 50,
    "timestep reversed": 0,
    "guidance on the wrong sign": 0,
    "one main layer zeroed": 0,
    "decoder tile of 32 pixels without overlap": 75,
    "prompts swapped in a batch": 0,
}


@pytest.mark.slow
def test_the_score_notices_faults_of_consequence(pipe):
    """Without a fault, all of six unseen prompts are right; with one, clearly fewer."""
    scenes = unseen_scenes(6)
    prompts = [scene.caption() for scene in scenes]

    def right(name):
        with FAULTS[name](pipe) as settings:
            images = generate(pipe, prompts, progress=False, num_inference_steps=15, **settings)
        return score(images, scenes)["right"]

    assert right("none") == 100
    found = {name: right(name) for name in LOST}
    assert all(found[name] <= most for name, most in LOST.items()), found
