"""Prompts encoded inside ComfyUI against l2p_core's encoder."""

import shutil

import pytest
import torch
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.text import MAX_TOKENS, TextEncoder
from helpers import rms, scaled_fp8
from safetensors.torch import load_file, save_file

BUNDLED = "L2P shapes (bundled small model)"


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.load(BUNDLED_MODEL, dtype=torch.float32)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red circle on a blue background",
        "",
        "({[unbalanced:1.3",
        "naïve 日本語 emoji 🙂\nnew line",
    ],
)
def test_prompts_give_the_same_features(comfyui, encoder, tmp_path, prompt):
    comfyui.call("encode", prompt=prompt, output=tmp_path / "out.safetensors", text_encoder=BUNDLED)
    found = load_file(tmp_path / "out.safetensors")
    for name, text in (("positive", prompt), ("negative", "")):
        expected = encoder.encode(text)
        assert found[name].shape == (1, *expected.shape)
        assert rms(found[name][0] - expected, expected) < 1e-5


def test_a_long_prompt_is_cut_where_the_library_cuts_it(comfyui, encoder, tmp_path):
    prompt = "a red circle on a blue background " * 100
    comfyui.call("encode", prompt=prompt, output=tmp_path / "out.safetensors", text_encoder=BUNDLED)
    found = load_file(tmp_path / "out.safetensors")["positive"][0]
    with pytest.warns(UserWarning, match="tokens"):
        expected = encoder.encode(prompt)
    assert len(found) == len(expected) == MAX_TOKENS
    assert rms(found - expected, expected) < 1e-5


@pytest.mark.parametrize("spelling", ["weight_scale", "scale_weight"])
def test_an_fp8_encoder_of_another_width_keeps_its_scales(comfyui, tmp_path, spelling):
    """The same numbers as FP8 with scales, and dequantized beforehand."""
    shutil.copytree(BUNDLED_MODEL / "tokenizer", tmp_path / "tokenizer")
    weights = load_file(BUNDLED_MODEL / "text_encoder" / "model.safetensors")
    weights = {f"model.{key}": tensor for key, tensor in weights.items()}
    scaled, plain = scaled_fp8(
        weights, lambda key, tensor: tensor.dim() == 2 and "embed" not in key, spelling
    )
    found = {}
    for name, tensors in (("scaled", scaled), ("plain", plain)):
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        out = tmp_path / f"{name}-out.safetensors"
        comfyui.call("encode", prompt="a red circle", output=out, text_encoder=str(file))
        found[name] = load_file(out)["positive"]
    assert rms(found["scaled"] - found["plain"], found["plain"]) < 1e-6
