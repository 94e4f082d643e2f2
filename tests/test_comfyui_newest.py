"""The newest ComfyUI, by a stand-in: NextDiT with other signatures, and an L2P class of ComfyUI's
own."""

import pytest
import torch
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS, L2PConfig
from comfyui_l2p.l2p_core.files.load import expected_shapes
from helpers import comfyui_naming, int8, rms
from safetensors.torch import load_file, save_file
from test_comfyui_model import INT8_SINCE, LOADERS


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "naming, quantized", [("published", False), ("comfyui", False), ("comfyui", True)]
)
def test_the_network_runs(
    newest_comfyui, write, tmp_path, tiny_model, tiny_weights, loader, naming, quantized
):
    weights = tiny_weights if naming == "published" else comfyui_naming(tiny_weights)
    path = write(int8(weights, "model.diffusion_model.", "row")[0] if quantized else weights)
    generator = torch.Generator().manual_seed(1)
    image, sigma = torch.randn(2, 3, 64, 96, generator=generator), torch.tensor([0.9, 0.3])
    prompts = torch.randn(2, 21, 64, generator=generator)
    save_file({"image": image, "sigma": sigma, "caption": prompts}, tmp_path / "inputs.safetensors")
    loaded = newest_comfyui.call(
        "forward",
        path=path,
        loader=loader,
        inputs=tmp_path / "inputs.safetensors",
        output=tmp_path / "output.safetensors",
    )
    with torch.no_grad():
        expected = -tiny_model(image, 1 - sigma, list(prompts))
    assert rms(load_file(tmp_path / "output.safetensors")["output"] - expected, expected) < (
        2e-2 if quantized else 1e-5
    )
    assert any("INT8" in name for name in loaded["formats"]) == (
        quantized and newest_comfyui.version >= INT8_SINCE
    )


@pytest.mark.parametrize("patch", [16, 64, 128, 160])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_published_models_are_ours_beside_a_class_of_comfyui_s(newest_comfyui, patch, prefix):
    """By shapes alone, in both namings. A latent Z-Image is still ComfyUI's."""
    config = L2PConfig(patch_size=patch, n_layers=1, decoder=PUBLISHED_DECODERS[patch])
    published = {name: list(shape) for name, shape in expected_shapes(config).items()}
    packed = {
        name: list(tensor.shape)
        for name, tensor in comfyui_naming(
            {name: torch.empty(shape, device="meta") for name, shape in published.items()}
        ).items()
    }
    for shapes in (published, packed):
        named = {prefix + name: shape for name, shape in shapes.items()}
        assert newest_comfyui.call("detect", shapes=named, prefix=prefix) == "L2P"
    latent = {
        name: shape for name, shape in packed.items() if not name.startswith("local_decoder.")
    }
    latent["x_embedder.weight"] = [3840, 64]
    assert newest_comfyui.call("detect", shapes=latent) == "ZImage"


def test_without_the_pack_the_stand_in_takes_l2p_models_for_its_own(newest_comfyui):
    """The control: what the tests above would find without the pack's detection."""
    shapes = {"local_decoder.enc1.0.weight": [64, 3, 3, 3], "x_pad_token": [1, 3840]}
    assert newest_comfyui.call("detect_as_core", shapes=shapes) == "zimage_l2p"
