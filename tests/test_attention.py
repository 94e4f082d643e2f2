"""The kernels of attention against torch's own choice."""

import sys
from types import SimpleNamespace

import pytest
import torch
from comfyui_l2p.l2p_core.attention import BACKENDS, check_backend
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.model import Hooks
from helpers import rms

CPU = torch.device("cpu")


@pytest.fixture
def images(tiny_model):
    """images(hooks) → the prediction for a batch with prompts of unlike length."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 64, 64, generator=generator)
    width = tiny_model.config.cap_feat_dim
    prompts = [torch.randn(length, width, generator=generator) for length in (40, 7)]

    def predict(hooks):
        with torch.no_grad():
            return tiny_model(image, torch.tensor([0.3, 0.6]), prompts, hooks)

    return predict


@pytest.fixture
def sage(monkeypatch):
    """SageAttention's function with its arguments, but exact; and its calls."""
    calls = []

    def sageattn(q, k, v, tensor_layout, is_causal):
        assert (tensor_layout, is_causal) == ("HND", False)
        calls.append(q.shape)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    return calls


@pytest.mark.parametrize("backend", ["flash", "math", "sage"])
@pytest.mark.parametrize("neighbourhood", [0, 3])
def test_every_kernel_gives_the_same_image(images, sage, backend, neighbourhood):
    found = images(Hooks(attention=backend, neighbourhood=neighbourhood))
    expected = images(Hooks(neighbourhood=neighbourhood))
    assert rms(found - expected, expected) < 1e-5
    assert bool(sage) == (backend == "sage")


@pytest.mark.parametrize(
    "backend, error, said",
    [
        ("cudnn", ValueError, "cpu has no cudnn attention for torch.float32 .* --attention auto"),
        ("efficient", ValueError, "no efficient attention"),
        ("sage", ImportError, "pip install sageattention"),
        ("fast", ValueError, f"'fast'; expected one of {', '.join(BACKENDS)}"),
    ],
)
def test_a_kernel_that_is_not_here_is_one_sentence(monkeypatch, backend, error, said):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(error, match=said):
        check_backend(backend, CPU, torch.float32, 32)
    for there in ("auto", "flash", "math"):
        check_backend(there, CPU, torch.float32, 32)


def test_generate_takes_a_kernel_and_rejects_one_before_loading(tmp_path, capsys):
    output = tmp_path / "out.png"
    command = ["generate", "a red circle", "--steps", "1", "-o", str(output), "--device", "cpu"]
    assert main([*command, "--attention", "cudnn"]) == 1
    assert "no cudnn attention" in capsys.readouterr().err and not output.exists()
    assert main([*command, "--attention", "math"]) == 0 and output.exists()
