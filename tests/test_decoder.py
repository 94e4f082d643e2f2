"""The local decoder against recorded numbers, all four patches."""
import json

import pytest
import torch
from torch import nn

from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS, L2PConfig
from comfyui_l2p.l2p_core.decoder import LocalDecoder
from comfyui_l2p.l2p_core.model import L2PTransformer

from golden import recipe
from helpers import GOLDEN


@pytest.fixture
def decoder(tiny_model):
    return tiny_model.local_decoder


@pytest.mark.parametrize("case", ["96x64", "96x64.b"])
def test_output_is_the_published(golden, decoder, case):
    recorded = golden("local_decoder_fp32")
    with torch.no_grad():
        output = decoder(recorded[f"{case}.image"], recorded[f"{case}.features"])
    torch.testing.assert_close(output, recorded[f"{case}.output"], atol=5e-5, rtol=0)


def test_every_stage_is_the_published(golden, decoder):
    recorded = golden("local_decoder_fp32")
    stages = [key.removeprefix("96x64.channel_mean.") for key in recorded if "channel_mean." in key]
    assert len(stages) == 9
    means = {}
    hooks = [decoder.get_submodule(stage).register_forward_hook(
        lambda _, __, out, stage=stage: means.update({stage: out.mean((2, 3)).squeeze()})) for stage in stages]
    with torch.no_grad():
        decoder(recorded["96x64.image"], recorded["96x64.features"])
    for hook in hooks:
        hook.remove()
    for stage in stages:
        torch.testing.assert_close(means[stage], recorded[f"96x64.channel_mean.{stage}"].squeeze(), atol=5e-5, rtol=0)


def test_features_of_another_size_are_resized_by_nearest(golden, decoder):
    recorded = golden("local_decoder_fp32")
    with torch.no_grad():
        output = decoder(recorded["96x64.image"], recorded["96x64.mismatch_3x2.features"])
    torch.testing.assert_close(output, recorded["96x64.mismatch_3x2.output"], atol=5e-5, rtol=0)


def test_a_larger_picture_is_the_published(golden, decoder):
    recorded = golden("local_decoder_fp32")
    image = torch.from_numpy(recipe.tensor("input.local_decoder.image.256x256", (1, 3, 256, 256)))
    assert torch.equal(image[..., ::4, ::4], recorded["256x256.image_stride4"])
    with torch.no_grad():
        output = decoder(image, recorded["256x256.features"])
    torch.testing.assert_close(output[..., ::3, ::3], recorded["256x256.output_stride3"], atol=5e-5, rtol=0)
    torch.testing.assert_close(output.mean((2, 3)).squeeze(), recorded["256x256.output_channel_mean"].squeeze(), atol=5e-5, rtol=0)
    torch.testing.assert_close(output.std((2, 3)).squeeze(), recorded["256x256.output_channel_std"].squeeze(), atol=5e-5, rtol=0)


@pytest.mark.parametrize("patch, image, features", [(64, (1, 3, 128, 192), (1, 96, 2, 3)), (160, (1, 3, 320, 320), (1, 96, 2, 2))])
def test_large_patch_decoders_are_the_recorded(golden, patch, image, features):
    decoder = LocalDecoder(L2PConfig(patch, dim=96, n_heads=3, decoder=PUBLISHED_DECODERS[patch]))
    decoder.load_state_dict({name: torch.from_numpy(recipe.param(f"local_decoder.{name}", tuple(tensor.shape)))
                             for name, tensor in decoder.state_dict().items()})
    with torch.no_grad():
        output = decoder(torch.from_numpy(recipe.tensor(f"hr.public.{patch}.image", image)),
                         torch.from_numpy(recipe.tensor(f"hr.public.{patch}.features", features)))
    torch.testing.assert_close(output[..., ::2, ::2], golden("local_decoder_hr_fp32")[f"patch{patch}.output"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("patch", [64, 128, 160])
def test_tensors_are_the_published_files(patch):
    published = json.loads((GOLDEN / "l2p_hr_keys.json").read_text())[str(patch)]
    with torch.device("meta"):
        model = L2PTransformer(L2PConfig(patch, n_layers=1, n_refiner_layers=1, decoder=PUBLISHED_DECODERS[patch]))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if name.startswith(("local_decoder.", "all_x_embedder."))} == published


def test_another_conv2d_can_be_given_with_device_and_dtype():
    class Own(nn.Conv2d):
        pass

    class Operations:
        Conv2d = Own

    decoder = LocalDecoder(L2PConfig(dim=96, n_heads=3), Operations, device="meta", dtype=torch.float16)
    convolutions = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 3 * 4 + 2 and all(type(module) is Own for module in convolutions)
    assert {(tensor.device.type, tensor.dtype) for tensor in decoder.parameters()} == {("meta", torch.float16)}
