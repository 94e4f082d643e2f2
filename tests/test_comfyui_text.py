"""Prompts encoded inside ComfyUI against l2p_core's encoder."""

import pytest
import torch
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.text import MAX_TOKENS, TextEncoder
from helpers import rms
from safetensors.torch import load_file

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
