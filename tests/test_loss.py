"""The training objective against recorded losses and gradients of the published trainer, at exact times.

Ours are computed in float64: some CPUs' float32 convolution gradients are off by 2e-4, more than the objective's own error.
"""
import json
from copy import deepcopy

import pytest
from PIL import Image

from comfyui_l2p.l2p_core.image import to_pixels
from comfyui_l2p.l2p_core.sampler import schedule
from comfyui_l2p.l2p_core.train.loss import flow_matching_loss

from helpers import GOLDEN, rms

RUNS = [run for run in json.loads((GOLDEN / "training.json").read_text())["runs"]
        if run["model"] == "tiny" and run["timestep_precision"] == "t_fp32"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_loss_and_gradients_are_the_published(golden, tiny_model, run):
    recorded = golden("training_fp32")
    size = f"{run['height']}x{run['width']}"
    picture = to_pixels(Image.fromarray(recorded[f"input.image_u8.{size}"].numpy()))
    sigma = schedule(500)[run["timestep_id_used_for_sigma"]][None]
    model = deepcopy(tiny_model).double()
    loss = flow_matching_loss(model, picture.double(), [recorded["input.caption.7"].double()],
                              recorded[f"input.noise.{size}.seed77"].double(), sigma.double())
    loss.backward()
    assert loss.item() == pytest.approx(run["loss"], rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(run["grad_norms"][name], rel=2e-4, abs=1e-6), name
        if (gradient := recorded.get(f"run.{run['name']}.grad.{name}")) is not None and gradient.any():
            assert rms(parameter.grad - gradient, gradient) < 1e-4, name
