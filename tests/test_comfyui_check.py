"""L2P Check Model: the report of `l2p doctor`, on the canvas."""

import re

import pytest
from comfyui_l2p.l2p_core import doctor
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from safetensors.torch import load_file, save_file

BUNDLED = "L2P shapes (bundled small model)"
MODEL = BUNDLED_MODEL / "transformer.safetensors"


def without_measurements(report):
    return re.sub(r"[0-9.]+ s|[0-9.]+ GB beside", "", report)


@pytest.mark.comfyui
@pytest.mark.slow
def test_the_node_reports_what_the_doctor_does(comfyui, tmp_path):
    encoder = BUNDLED_MODEL / "text_encoder"
    weights = load_file(MODEL)
    flipped = {name: -weight if "out_conv" in name else weight for name, weight in weights.items()}
    save_file(flipped, tmp_path / "flipped.safetensors")

    for name, file in (
        (BUNDLED, MODEL),
        (str(tmp_path / "flipped.safetensors"), tmp_path / "flipped.safetensors"),
    ):
        found = comfyui.call("check_model", checkpoint=name, text_encoder=BUNDLED)
        expected = doctor.report(doctor.examine_checkpoint(file, encoder, device="cpu"))
        assert without_measurements(found) == without_measurements(expected)
        assert ("FAIL  sign" in found) == (file != MODEL)
    assert "1 test failed" in found


@pytest.mark.comfyui
def test_a_single_file_is_read_with_comfyuis_tokenizer(comfyui, tmp_path):
    """Its tokens are Qwen's, which the bundled encoder does not know, and the report says so."""
    tensors = load_file(BUNDLED_MODEL / "text_encoder" / "model.safetensors")
    save_file(
        {f"model.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "qwen.safetensors"
    )
    found = comfyui.call(
        "check_model", checkpoint=BUNDLED, text_encoder=str(tmp_path / "qwen.safetensors")
    )
    assert (
        "FAIL  text encoder   the tokenizer gives token 151645, and the text encoder knows 372"
        in found
    )
