"""The local decoder against recorded numbers, all four patches; in tiles against uncut; its memory
against a count."""

import json

import pytest
import torch
from comfyui_l2p.l2p_core import decoder as decoder_module
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS, L2PConfig, Level
from comfyui_l2p.l2p_core.decoder import LocalDecoder, decoder_bytes, tile_side
from comfyui_l2p.l2p_core.meter import peak_bytes
from comfyui_l2p.l2p_core.model import Hooks, L2PTransformer
from comfyui_l2p.l2p_core.pipeline import L2PPipeline
from golden import recipe
from helpers import GOLDEN
from torch import nn


@pytest.fixture
def decoder(tiny_model):
    return tiny_model.local_decoder


@pytest.mark.parametrize("case", ["96x64", "96x64.b"])
def test_output_is_the_published(golden, decoder, case):
    recorded = golden("local_decoder_fp32")
    with torch.no_grad():
        output = decoder(recorded[f"{case}.image"], recorded[f"{case}.features"])
    torch.testing.assert_close(output, recorded[f"{case}.output"], atol=5e-5, rtol=0)


def test_every_level_is_the_published(golden, decoder):
    recorded = golden("local_decoder_fp32")
    levels = [key.removeprefix("96x64.channel_mean.") for key in recorded if "channel_mean." in key]
    assert len(levels) == 9
    means = {}
    hooks = [
        decoder.get_submodule(level).register_forward_hook(
            lambda _, __, out, level=level: means.update({level: out.mean((2, 3)).squeeze()})
        )
        for level in levels
    ]
    with torch.no_grad():
        decoder(recorded["96x64.image"], recorded["96x64.features"])
    for hook in hooks:
        hook.remove()
    for level in levels:
        torch.testing.assert_close(
            means[level], recorded[f"96x64.channel_mean.{level}"].squeeze(), atol=5e-5, rtol=0
        )


def test_features_of_another_size_are_resized_by_nearest(golden, decoder):
    recorded = golden("local_decoder_fp32")
    with torch.no_grad():
        output = decoder(recorded["96x64.image"], recorded["96x64.mismatch_3x2.features"])
    torch.testing.assert_close(output, recorded["96x64.mismatch_3x2.output"], atol=5e-5, rtol=0)


@pytest.mark.slow
def test_a_larger_image_is_the_published(golden, decoder):
    recorded = golden("local_decoder_fp32")
    image = torch.from_numpy(recipe.tensor("input.local_decoder.image.256x256", (1, 3, 256, 256)))
    assert torch.equal(image[..., ::4, ::4], recorded["256x256.image_stride4"])
    with torch.no_grad():
        output = decoder(image, recorded["256x256.features"])
    torch.testing.assert_close(
        output[..., ::3, ::3], recorded["256x256.output_stride3"], atol=5e-5, rtol=0
    )
    torch.testing.assert_close(
        output.mean((2, 3)).squeeze(),
        recorded["256x256.output_channel_mean"].squeeze(),
        atol=5e-5,
        rtol=0,
    )
    torch.testing.assert_close(
        output.std((2, 3)).squeeze(),
        recorded["256x256.output_channel_std"].squeeze(),
        atol=5e-5,
        rtol=0,
    )


@pytest.mark.parametrize(
    "patch, image, features",
    [(64, (1, 3, 128, 192), (1, 96, 2, 3)), (160, (1, 3, 320, 320), (1, 96, 2, 2))],
)
def test_large_patch_decoders_are_the_recorded(golden, patch, image, features):
    decoder = LocalDecoder(L2PConfig(patch, dim=96, n_heads=3, decoder=PUBLISHED_DECODERS[patch]))
    decoder.load_state_dict(
        {
            name: torch.from_numpy(recipe.param(f"local_decoder.{name}", tuple(tensor.shape)))
            for name, tensor in decoder.state_dict().items()
        }
    )
    with torch.no_grad():
        output = decoder(
            torch.from_numpy(recipe.tensor(f"hr.public.{patch}.image", image)),
            torch.from_numpy(recipe.tensor(f"hr.public.{patch}.features", features)),
        )
    torch.testing.assert_close(
        output[..., ::2, ::2],
        golden("local_decoder_hr_fp32")[f"patch{patch}.output"],
        atol=5e-5,
        rtol=0,
    )


@pytest.mark.parametrize("patch", [64, 128, 160])
def test_tensors_are_the_published_files(patch):
    published = json.loads((GOLDEN / "l2p_hr_keys.json").read_text())[str(patch)]
    with torch.device("meta"):
        model = L2PTransformer(
            L2PConfig(patch, n_layers=1, n_refiner_layers=1, decoder=PUBLISHED_DECODERS[patch])
        )
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {
        name: shape
        for name, shape in shapes.items()
        if name.startswith(("local_decoder.", "all_x_embedder."))
    } == published


def test_another_conv2d_can_be_given_with_device_and_dtype():
    class Own(nn.Conv2d):
        pass

    class Operations:
        Conv2d = Own

    decoder = LocalDecoder(
        L2PConfig(dim=96, n_heads=3), Operations, device="meta", dtype=torch.float16
    )
    convolutions = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 3 * 4 + 2 and all(type(module) is Own for module in convolutions)
    assert {(tensor.device.type, tensor.dtype) for tensor in decoder.parameters()} == {
        ("meta", torch.float16)
    }


def narrow(patch: int, dtype: torch.dtype) -> LocalDecoder:
    """A published decoder's levels with few channels."""
    levels = tuple(
        Level(level.name, *(max(width // 32, 2) for width in level[1:]))
        for level in PUBLISHED_DECODERS[patch]
    )
    decoder = LocalDecoder(
        L2PConfig(patch, dim=16, n_heads=1, decoder=levels, bottleneck_dim=16), dtype=dtype
    )
    decoder.load_state_dict(
        {
            name: torch.from_numpy(recipe.param(f"local_decoder.{name}", tuple(tensor.shape)))
            for name, tensor in decoder.state_dict().items()
        }
    )
    return decoder


def inputs(
    decoder: LocalDecoder, dtype: torch.dtype, batch: int = 1
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Image and features at least 7 by 2 innermost pixels large, and the size of those in
    pixels."""
    config, step = decoder.config, 2 ** len(decoder.config.decoder)
    height, width = (
        -(-cells * step // config.size_multiple) * config.size_multiple for cells in (7, 2)
    )
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, 3, height, width, generator=generator)
    features = torch.randn(
        batch,
        config.dim,
        height // config.patch_size,
        width // config.patch_size,
        generator=generator,
    )
    return image.to(dtype), 10 * features.to(dtype), step  # strong, so that their reach shows


# Sums may be taken in another order: a few units in the last place.
@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize("patch", PUBLISHED_DECODERS)
def test_tiles_give_what_the_whole_gives(patch, dtype, tolerance):
    decoder = narrow(patch, dtype)
    image, features, step = inputs(decoder, dtype, batch=2)
    with torch.no_grad():
        whole = decoder(image, features, 0)
        for tile in (1, 3 * step + 1):  # rounded up to 1 and 4 steps
            torch.testing.assert_close(
                decoder(image, features, tile), whole, atol=tolerance, rtol=tolerance
            )


@pytest.mark.parametrize("patch", PUBLISHED_DECODERS)
def test_less_around_a_tile_would_show(patch, monkeypatch):
    decoder = narrow(patch, torch.float32)
    image, features, step = inputs(decoder, torch.float32)
    monkeypatch.setattr(decoder_module, "HALO", 2)
    with torch.no_grad():
        assert (decoder(image, features, 4 * step) - decoder(image, features, 0)).abs().max() > 5e-4


def test_large_images_are_cut_unless_gradients_are_kept(monkeypatch):
    decoder = narrow(16, torch.float64)
    image, features, step = inputs(decoder, torch.float64)
    monkeypatch.setattr(decoder_module, "tile_side", lambda *_: step)
    passes = []
    decoder.out_conv.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        decoder(image, features)
    assert len(passes) == 7 * 2
    passes.clear()
    decoder(image, features).sum().backward()
    assert len(passes) == 1


def test_gradients_pass_through_tiles_that_are_asked_for():
    decoder = narrow(16, torch.float64)
    image, features, step = inputs(decoder, torch.float64)
    whole, cut = (
        torch.autograd.grad(
            decoder(image, features, tile).square().sum(), list(decoder.parameters())
        )
        for tile in (0, 2 * step)
    )
    torch.testing.assert_close(cut, whole, atol=1e-8, rtol=1e-8)


def counted_bytes(
    config: L2PConfig, size: int, dtype: torch.dtype, tile: int | None, batch: int = 1
) -> int:
    """What a pass holds at its peak. Tensors without contents are counted alike."""
    with torch.device("meta"):
        decoder = LocalDecoder(config, dtype=dtype)
        image = torch.empty(batch, 3, size, size, dtype=dtype)
        features = torch.empty(
            batch, config.dim, size // config.patch_size, size // config.patch_size, dtype=dtype
        )
    return peak_bytes(lambda: decoder(image, features, tile))[0]


def test_memory_is_counted_the_same_with_and_without_contents():
    decoder = narrow(16, torch.float32)
    image, features, step = inputs(decoder, torch.float32)
    counted = [peak_bytes(lambda: decoder(image, features, tile))[0] for tile in (0, 2 * step)]
    decoder, image, features = decoder.to("meta"), image.to("meta"), features.to("meta")
    assert counted == [
        peak_bytes(lambda: decoder(image, features, tile))[0] for tile in (0, 2 * step)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "size, tile, batch", [(1280, 0, 3), (3840, 0, 1), (3840, 1280, 2), (10240, None, 1)]
)
@pytest.mark.parametrize("patch", PUBLISHED_DECODERS)
def test_the_estimate_is_what_is_counted(patch, size, tile, batch, dtype):
    config = L2PConfig(patch, decoder=PUBLISHED_DECODERS[patch])
    counted = counted_bytes(config, size, dtype, tile, batch)
    assert decoder_bytes(config, size, size, dtype, batch, tile) == pytest.approx(counted, rel=0.01)


def test_the_estimate_sees_features_wider_than_all_maps():
    config = L2PConfig(4, decoder=(Level("1", 4, 4, 4), Level("2", 4, 4, 4)), bottleneck_dim=4)
    assert decoder_bytes(config, 256, 256) == pytest.approx(
        counted_bytes(config, 256, torch.bfloat16, None), rel=0.01
    )


@pytest.mark.parametrize("patch", PUBLISHED_DECODERS)
def test_large_images_need_little_memory(patch):
    config = L2PConfig(patch, decoder=PUBLISHED_DECODERS[patch])
    for size, limit in ((3840, 1.2), (10240, 2.0)):  # GiB
        counted = counted_bytes(config, size, torch.bfloat16, None)
        assert counted < limit * 2**30
        assert counted < 0.4 * counted_bytes(config, size, torch.bfloat16, 0)


@pytest.mark.parametrize("patch", PUBLISHED_DECODERS)
def test_the_tile_that_is_chosen(patch):
    config = L2PConfig(patch, decoder=PUBLISHED_DECODERS[patch])
    step = 2 ** len(config.decoder)
    assert tile_side(config, 1024, 1024) == tile_side(config, 1024, 1024, torch.float32) == 0
    for height, width in ((4096, 4096), (10240, 10240), (10240, 2560)):
        tile = tile_side(config, height, width)
        assert tile % step == 0 and tile == tile_side(config, height, width, torch.float32)
        read = [
            sum(
                cut.read.stop - cut.read.start
                for cut in decoder_module.cuts(length, tile or length, step)
            )
            / length
            for length in (height, width)
        ]
        assert read[0] * read[1] < 1.45  # as many times are all pixels computed
    budget = 200 * 2**20
    assert (
        decoder_bytes(config, 2560, 1280, tile=tile_side(config, 2560, 1280, budget=budget))
        <= budget
    )
    assert tile_side(config, 2560, 2560, budget=0) <= 6 * step < 2560


@pytest.mark.slow
def test_the_model_hands_the_tile_to_its_decoder(tiny_model):
    config, generator = tiny_model.config, torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 96, 64, generator=generator)
    t, captions = torch.tensor([0.5]), [torch.randn(5, config.cap_feat_dim, generator=generator)]
    passes = []
    hook = tiny_model.local_decoder.out_conv.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        whole = tiny_model(image, t, captions)
        cut = tiny_model(image, t, captions, Hooks(decoder_tile=32))
    hook.remove()
    assert len(passes) == 1 + 3 * 2
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_pipeline_hands_its_tile_to_the_model():
    """Images of 96 x 96 pixels in tiles of 32: nine passes of the decoder's last layer each time
    instead of one."""

    def passes(**options):
        pipe, found = L2PPipeline.from_pretrained(device="cpu", **options), []
        pipe.transformer.local_decoder.out_conv.register_forward_hook(lambda *_: found.append(1))
        pipe("a large red circle", num_inference_steps=1, cfg_scale=1.0)
        return len(found)

    assert (passes(decoder_tile=32), passes()) == (9, 1)
    with pytest.raises(ValueError, match="decoder_tile is -1; expected"):
        L2PPipeline.from_pretrained(device="cpu", decoder_tile=-1)
