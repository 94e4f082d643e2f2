"""`l2p doctor` on the bundled model: it is proved right, and every fault that is put into it on
purpose fails a line of its own."""

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core import L2PConfig, doctor, read_layout
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS
from comfyui_l2p.l2p_core.files.load import expected_shapes
from comfyui_l2p.l2p_core.model import TimeEmbedder
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.proof import blur, draw_scene, pink_noise
from comfyui_l2p.quant.quantize import Options, quantize
from safetensors.torch import load_file, save_file
from test_file_tools import published_file

MODEL = BUNDLED_MODEL / "transformer.safetensors"
ENCODER = BUNDLED_MODEL / "text_encoder"
OUT = "local_decoder.out_conv."
PROOF = ("scale", "sign", "amplitude", "time", "naming", "convrot", "denoising", "prompt")


def failed(checkpoint, **options):
    """The lines that fail for a checkpoint, and what was said in each line."""
    given = (checkpoint, options.pop("text_encoder", ENCODER), None, "cpu", torch.float32)
    rest = {"convrot_groupsize": None, "image": None, "prompt": None, "other": None, **options}
    findings = {each.name: each for each in doctor.examine_checkpoint(*given, **rest)}
    return [name for name, each in findings.items() if each.ok is False], findings


@pytest.fixture
def faulty(write):
    """faulty(change) → a file of the bundled model's weights, changed."""

    def writer(change):
        weights = load_file(MODEL)
        change(weights)
        return write(weights, "faulty.safetensors")

    return writer


def int8_file(path, change=None, **options):
    """The bundled model in INT8, its tensors changed, without the markers of its rotation where
    `unmarked`."""
    unmarked = options.pop("unmarked", False)
    quantize(MODEL, path, Options(**options))
    if change is None and not unmarked:
        return path
    weights = load_file(path)
    if unmarked:
        weights = {key: each for key, each in weights.items() if not key.endswith("comfy_quant")}
    if change:
        change(weights)
    save_file(weights, path)
    return path


def swap(weights, one, other):
    for name in [name for name in weights if one in name]:
        partner = name.replace(one, other)
        weights[name], weights[partner] = weights[partner], weights[name]


def scale_output(factor):
    def change(weights):
        for name in (f"{OUT}weight", f"{OUT}bias"):
            weights[name] = weights[name] * factor

    return change


@pytest.mark.slow
def test_the_bundled_model_proves_itself():
    faults, found = failed(None, text_encoder=None)
    assert not faults and all(found[name].ok for name in PROOF if name != "convrot")
    assert found["convrot"].ok is None and "none of the published" in found["published as"].detail


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["row", "convrot"])
def test_int8_files_prove_themselves(tmp_path, granularity):
    path = int8_file(tmp_path / "int8.safetensors", granularity=granularity)
    faults, found = failed(path, other=MODEL)
    assert not faults and all(found[name].ok for name in (*PROOF, "other file"))


@pytest.mark.slow
@pytest.mark.parametrize("factor, line", [(-1, "sign"), (0.4, "amplitude"), (2, "amplitude")])
def test_a_wrong_output_is_named(faulty, factor, line):
    faults, _ = failed(faulty(scale_output(factor)))
    assert faults == [line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "one, other", [("to_q", "to_k"), ("to_q", "to_v"), ("to_k", "to_v"), (".w1.", ".w3.")]
)
def test_tensors_under_each_others_names_are_named(faulty, one, other):
    faults, found = failed(faulty(lambda weights: swap(weights, one, other)))
    assert faults == ["naming"]
    expected = "w1 and w3" if "w1" in one else one
    assert expected in found["naming"].detail


@pytest.mark.slow
def test_a_time_that_runs_backwards_is_named(monkeypatch):
    forward = TimeEmbedder.forward
    monkeypatch.setattr(TimeEmbedder, "forward", lambda self, t, dtype: forward(self, 1 - t, dtype))
    faults, _ = failed(MODEL)
    assert faults == ["time"]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [127, 1 / 127])
def test_a_wrong_scale_is_named(tmp_path, factor):
    def change(weights):
        for name in [name for name in weights if name.endswith("weight_scale")]:
            weights[name] = weights[name] * factor

    faults, found = failed(int8_file(tmp_path / "int8.safetensors", change))
    assert faults == ["scale"] and "weight_scale" in found["scale"].detail


@pytest.mark.slow
def test_an_unmarked_rotation_is_named_with_its_size(tmp_path):
    path = int8_file(tmp_path / "int8.safetensors", granularity="convrot", unmarked=True)
    faults, found = failed(path)
    assert faults == ["convrot"]
    assert "--convrot 64" in found["convrot"].detail
    assert not failed(path, convrot_groupsize=64)[0]  # the remedy that it names


@pytest.mark.slow
def test_a_rotation_that_is_not_there_is_named(tmp_path):
    path = int8_file(tmp_path / "int8.safetensors", unmarked=True)
    faults, found = failed(path, convrot_groupsize=64)
    assert faults == ["convrot"] and "no rotation" in found["convrot"].detail


@pytest.mark.slow
def test_a_damaged_file_is_named(tmp_path, faulty):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(MODEL.read_bytes()[:-1000])
    assert failed(cut)[0] == ["file"]

    def spoil(weights):
        weights["layers.2.feed_forward.w2.weight"][3, 5] = float("nan")

    assert failed(faulty(spoil))[0] == ["weights"]

    def blank(weights):
        weights["layers.2.feed_forward.w2.weight"].zero_()

    assert failed(faulty(blank))[0] == ["scale"]


@pytest.mark.slow
def test_weights_that_never_learned_do_not_denoise(faulty):
    def forget(weights):
        generator = torch.Generator().manual_seed(0)
        for name, weight in weights.items():
            if weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator)
                weights[name] = (noise * weight.float().std()).to(weight.dtype)

    assert failed(faulty(forget))[0] in (["denoising"], ["sign"])  # it points anywhere


@pytest.mark.slow
def test_a_wrong_prompt_or_text_encoder_is_named(tmp_path):
    faults, _ = failed(MODEL, prompt="a small white square on a red background, left")
    assert faults == ["prompt"]
    assert failed(MODEL, text_encoder=tmp_path / "absent")[0] == ["text encoder"]


@pytest.mark.slow
def test_the_recorded_image_comes_out_again(monkeypatch):
    assert doctor.recorded_image("cpu").ok
    monkeypatch.setattr(doctor, "RECORDED_PROMPT", "a large red circle on a blue background, right")
    assert doctor.recorded_image("cpu").ok is False


def test_published_files_are_recognised(tmp_path):
    """By their headers: sparse files of the real names, shapes and dtypes."""
    one = tmp_path / "model-1k.safetensors"
    shapes = expected_shapes(L2PConfig())
    published_file(one, shapes)
    found = doctor.published(read_layout(one))
    assert found.ok is None and "300 tensors of another dtype" in found.detail
    larger = L2PConfig(patch_size=64, decoder=PUBLISHED_DECODERS[64])
    published_file(one, expected_shapes(larger))
    assert doctor.published(read_layout(one)).detail.startswith("the 4K model")


def test_the_scene_has_the_spectrum_of_photographs():
    noise = pink_noise(128, 128, np.random.default_rng(1))
    power = np.abs(np.fft.rfft2(noise)) ** 2
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.rfftfreq(128))
    bands = [(0.03, 0.06), (0.12, 0.24)]
    low, high = (power[(frequency > a) & (frequency < b)].mean() for a, b in bands)
    assert low / high == pytest.approx(16, rel=0.3)  # 4 times the frequency
    assert draw_scene(96, 128).size == (128, 96)


def test_a_blur_keeps_flat_images_and_their_mean():
    flat = torch.full((1, 3, 32, 32), 0.25)
    assert torch.allclose(blur(flat, 2), flat, atol=1e-6)
    spot = torch.zeros(1, 3, 33, 33)
    spot[..., 16, 16] = 1
    assert blur(spot, 2)[0, 0, 16, 16].item() == pytest.approx(1 / (2 * np.pi * 4), rel=0.02)


@pytest.mark.slow
def test_the_command_reports_and_fails(tmp_path, capsys, faulty):
    path = faulty(scale_output(-1))
    command = ["doctor", "--checkpoint", str(path), "--text-encoder", str(ENCODER)]
    assert main([*command, "--device", "cpu"]) == 1
    told = capsys.readouterr().out
    assert "FAIL  sign" in told and "torch" in told and "ComfyUI" in told
    assert told.strip().endswith("failed")
