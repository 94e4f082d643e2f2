"""The training objective against recorded losses and gradients of the published trainer, at exact
times and at those that it rounds to bfloat16, and with frozen layers.

Ours are computed in float64: some CPUs' float32 convolution gradients are off by 2e-4, more than
the objective's own error."""

import json

import pytest
import torch
from comfyui_l2p.l2p_core import L2PConfig, L2PTransformer
from comfyui_l2p.l2p_core.flow import flow_matching_loss, schedule
from comfyui_l2p.l2p_core.images import to_pixels
from comfyui_l2p.l2p_core.train.config import layers_of
from golden import recipe
from helpers import GOLDEN, rms
from PIL import Image

RUNS = json.loads((GOLDEN / "training.json").read_text())["runs"]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_loss_and_gradients_are_the_published(golden, run):
    recorded, rounded = golden("training_fp32"), run["timestep_precision"] == "t_bf16"
    size = f"{run['height']}x{run['width']}"
    image = to_pixels(
        Image.fromarray(recorded[f"input.image_u8.{size}"].numpy()),
        torch.bfloat16 if rounded else torch.float32,
    )
    sigma = schedule(500)[run["timestep_id_used_for_sigma"]][None]
    kind = {"tiny": recipe.TINY, "tiny12": recipe.TINY12}[run["model"]]
    model = L2PTransformer(L2PConfig.from_shapes(recipe.shapes(kind)))
    model.load_state_dict(recipe.torch_weights(kind))
    model.double().layers[layers_of("5:-5")].requires_grad_(False)

    def at_its_time(image, t, captions):
        """Ours takes 1 - sigma; what the published program rounds that to is recorded."""
        return model(
            image, torch.tensor([run["model_t"]], dtype=torch.bfloat16) if rounded else t, captions
        )

    loss = flow_matching_loss(
        at_its_time,
        image.double(),
        [recorded["input.caption.7"].double()],
        recorded[f"input.noise.{size}.seed77"].double(),
        sigma.double(),
    )
    loss.backward()
    assert loss.item() == pytest.approx(run["loss"], rel=1e-5)
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == set(run["parameters_without_gradient"])
    for name, parameter in model.named_parameters():
        if name in frozen:
            continue
        assert parameter.grad.norm().item() == pytest.approx(
            run["grad_norms"][name], rel=2e-4, abs=1e-6
        ), name
        if (
            gradient := recorded.get(f"run.{run['name']}.grad.{name}")
        ) is not None and gradient.any():
            assert rms(parameter.grad - gradient, gradient) < 1e-4, name
