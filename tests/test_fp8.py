"""FP8 weights that are multiplied in FP8, on a CPU, which has that product too; `multiplies_fp8`
says no there, because it is slow."""

import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline, pipeline
from comfyui_l2p.l2p_core.evaluate.metrics import psnr_of, squared_error
from comfyui_l2p.l2p_core.files.fp8 import Fp8Linear, multiplies_fp8
from comfyui_l2p.l2p_core.files.load import bytes_in_memory
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.quant.quantize import Options, quantize
from helpers import rms

FP8 = torch.float8_e4m3fn
SETTINGS = {"seed": 1, "num_inference_steps": 4}


@pytest.mark.parametrize("shape", [(1,), (48, 1)])
def test_the_product_is_that_of_both_rounded_by_hand(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 64, generator=generator) * torch.tensor([1e-3, 1.0, 300.0, 0, 7])[:, None]
    weight = (100 * torch.randn(48, 64, generator=generator)).to(FP8)
    scale, bias = torch.rand(shape, generator=generator), torch.randn(48, generator=generator)
    layer = Fp8Linear(weight, scale, bias)
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    rounded = (x / largest).to(FP8).double() * largest
    dequantized = weight.double() * scale.double()
    exact = rounded @ dequantized.T + bias
    assert rms(layer(x) - exact, exact) < 3e-3  # bfloat16's rounding
    moved = layer.bfloat16()
    assert (moved.weight.dtype, moved.weight_scale.dtype) == (FP8, torch.float32)
    assert moved.bias.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("fp8") / "fp8.safetensors"
    quantize(
        BUNDLED_MODEL / "transformer.safetensors",
        file,
        Options(format="float8_e4m3fn", preset="small"),
    )
    return file


def open_pipe(checkpoint):
    encoder = BUNDLED_MODEL / "text_encoder"
    return L2PPipeline.from_pretrained(
        checkpoint, encoder, device="cpu", torch_dtype=torch.float32, fp8=True
    )


def test_an_fp8_model_generates_in_fp8_where_the_device_can(checkpoint, monkeypatch):
    pipe = open_pipe(checkpoint)
    with pytest.warns(UserWarning, match="FP8 weights are dequantized: cpu has no FP8 product"):
        dequantized = pipe("a large red circle on a blue background, left", **SETTINGS)
    monkeypatch.setattr(pipeline, "multiplies_fp8", lambda device: True)
    pipe = open_pipe(checkpoint)
    found = pipe("a large red circle on a blue background, left", **SETTINGS)
    layers = [each for each in pipe.transformer.modules() if isinstance(each, Fp8Linear)]
    held = sum(each.nbytes for each in pipe.transformer.state_dict().values())
    counted = bytes_in_memory(pipe.layout, torch.float32, fp8=True)
    assert len(layers) == 7 * 6  # of all blocks
    assert held == sum(counted.values()) + 4 * len(layers)  # a scale each
    assert 35 < psnr_of(squared_error(found, dequantized)) < 60


def test_a_cpu_and_a_lora_need_dequantized_weights(checkpoint, monkeypatch):
    pipe = open_pipe(checkpoint)
    assert not multiplies_fp8(torch.device("cpu")) and not pipe.in_fp8
    monkeypatch.setattr(pipeline, "multiplies_fp8", lambda device: True)
    assert pipe.in_fp8
    pipe.loras.append(None)
    assert not pipe.in_fp8


def test_fp8_is_rejected_for_other_checkpoints():
    with pytest.raises(ValueError, match="transformer.safetensors holds no float8_e4m3fn weights"):
        L2PPipeline.from_pretrained(fp8=True)
