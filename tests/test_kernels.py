"""Fused kernels against what they replace. comfy-kitchen's run in their form for CPUs, which has
the arguments and the layout of those for GPUs."""

from copy import deepcopy

import comfy_kitchen
import pytest
import torch
from comfyui_l2p.l2p_core import kernels, model
from comfyui_l2p.l2p_core.model import rope_of_prompt, scaled_norm
from helpers import rms


@pytest.fixture
def fused(monkeypatch):
    """Makes the network use comfy-kitchen's kernel here, and counts its calls."""
    calls = []

    def rms_rope(*given):
        calls.append(given)
        return comfy_kitchen.rms_rope(*given)

    monkeypatch.setattr(model, "fused_rotation", lambda x: rms_rope)
    return calls


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.bfloat16, 3e-3)])
def test_the_fused_rotation_is_that_of_torch(fused, tiny_model, dtype, tolerance):
    attention = deepcopy(tiny_model.layers[0].attention).to(dtype)
    heads = attention.norm_q.weight.shape[0]
    q, k = torch.randn(2, 2, 48, 3, heads, generator=torch.Generator().manual_seed(0)).to(dtype)
    rope = rope_of_prompt(48, tiny_model.config.axes_dims, torch.device("cpu"))[None]
    with torch.no_grad():
        found = model.Hooks().norm_and_rotate(attention, q, k, rope)
        expected = model.norm_and_rotate(attention, q, k, rope)
    assert len(fused) == 1
    for one, other in zip(found, expected):
        assert one.dtype == dtype
        assert rms(one.float() - other.float(), other.float()) < tolerance


def test_a_pass_makes_the_matrices_once_for_each_set_of_tokens(fused, tiny_model, monkeypatch):
    image, prompt = torch.randn(1, 3, 64, 64), torch.randn(40, tiny_model.config.cap_feat_dim)
    made = []

    def matrices(rope, make=model.rotation_matrices):
        made.append(rope)
        return make(rope)

    monkeypatch.setattr(model, "rotation_matrices", matrices)
    with torch.no_grad():
        found = tiny_model(image, torch.tensor([0.4]), [prompt])
        monkeypatch.undo()
        expected = tiny_model(image, torch.tensor([0.4]), [prompt])
    stacks = tiny_model.noise_refiner, tiny_model.context_refiner, tiny_model.layers
    assert (len(fused), len(made)) == (sum(map(len, stacks)), len(stacks))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_a_factor_in_the_weight_rounds_as_a_product_does():
    """Of an error in bfloat16, against float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight, factor = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((1, 64, 256), (256,), (1, 1, 256))
    )
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    exact = exact * weight.double() * factor.double()
    as_product = torch.nn.functional.rms_norm(x, (256,), weight, 1e-5) * factor
    in_weight = scaled_norm(x, weight, factor)
    assert rms(in_weight - exact, exact) < 1.1 * rms(as_product - exact, exact) < 5e-3


def test_a_backend_in_torch_is_no_kernel(monkeypatch):
    """Its real arithmetic takes several times as long as the complex product."""
    found = {"available": True, "disabled": False, "capabilities": ["rms_rope"]}
    backends = {"eager": found}
    monkeypatch.setattr(comfy_kitchen, "list_backends", lambda: backends)
    for backend, expected in (("cuda", comfy_kitchen.rms_rope), ("hip", None)):
        kernels.kernel_of_device.cache_clear()
        assert kernels.kernel_of_device("rms_rope") is None
        kernels.kernel_of_device.cache_clear()
        backends[backend] = found if expected else {**found, "disabled": True}
        assert kernels.kernel_of_device("rms_rope") is expected
        del backends[backend]
    kernels.kernel_of_device.cache_clear()
