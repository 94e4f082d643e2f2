"""The network inside ComfyUI against l2p_core, through ComfyUI's own loaders and ours."""

import backbones
import pytest
import torch
from comfyui_l2p.l2p_core import load_model
from comfyui_l2p.l2p_core.backbones import QWEN_IMAGE
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS, L2PConfig
from comfyui_l2p.l2p_core.model import L2PTransformer
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.quant.quantize import Options, quantize
from helpers import comfyui_naming, int8, scaled_fp8
from real_comfyui import Rejected
from safetensors.torch import load_file

LOADERS = ("checkpoint", "diffusion", "node")
INT8_SINCE = (0, 27)  # ComfyUI's own INT8 linear; before, the pack dequantizes the weights


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("naming", ["published", "comfyui"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "pipe.dit."])
def test_every_loader_reads_every_naming(
    compare, write, tiny_model, tiny_weights, loader, naming, prefix
):
    weights = tiny_weights if naming == "published" else comfyui_naming(tiny_weights)
    path = write({prefix + name: tensor for name, tensor in weights.items()})
    error, loaded = compare(path, loader, tiny_model)
    assert error < 1e-5
    assert loaded["class"] == "L2PModel"


@pytest.mark.parametrize("loader", LOADERS)
def test_mixed_dtypes(compare, write, tiny_weights, loader):
    """FP32 main layers among BF16, as in the published file; q, k and v of unlike dtypes are packed
    as the wider."""
    mixed = {
        name: tensor if name.startswith("layers.1.") or ".to_k." in name else tensor.bfloat16()
        for name, tensor in tiny_weights.items()
    }
    path = write(mixed)
    assert compare(path, loader, load_model(path, dtype=torch.float32))[0] < 1e-5


def test_the_epsilon_of_query_and_key_norms_is_ours(compare, write, tiny_weights):
    """With queries and keys this small the epsilon decides the output: core's own would be 10 %
    off."""
    weights = {
        name: tensor * 0.003 if ".to_q." in name or ".to_k." in name else tensor
        for name, tensor in tiny_weights.items()
    }
    path = write(weights)
    assert compare(path, "diffusion", load_model(path, dtype=torch.float32))[0] < 1e-5


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("naming", ["published", "comfyui"])
@pytest.mark.parametrize(
    "granularity, marked, convrot",
    [
        ("tensor", "tensors", 0),
        ("row", None, 0),
        ("flat", None, 0),
        ("row", "metadata", 0),
        ("row", "tensors", 16),
        ("row", "metadata", 16),
    ],
)
def test_int8_stays_int8(
    comfyui, compare, write, tiny_model, tiny_weights, loader, naming, granularity, marked, convrot
):
    weights = tiny_weights if naming == "published" else comfyui_naming(tiny_weights)
    tensors, metadata = int8(weights, "model.diffusion_model.", granularity, marked, convrot)
    error, loaded = compare(write(tensors, metadata=metadata), loader, tiny_model)
    assert error < 2e-2
    assert any("INT8" in name for name in loaded["formats"]) == (comfyui.version >= INT8_SINCE), (
        loaded
    )


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "mxfp8", "nvfp4", "convrot_w4a4"])
def test_other_formats_stay_as_they_are(
    comfyui, compare, write, tiny_weights, tmp_path, loader, kind
):
    """The weights as l2p_core dequantizes them; of 4-bit convrot the layers' inputs are rounded
    too. A ComfyUI without the format gets them in bfloat16, or is told that its comfy-kitchen is
    too old."""
    path = tmp_path / "quantized.safetensors"
    quantize(write(tiny_weights), path, Options(kind, preset="small"))
    reference = load_model(path, dtype=torch.float32)
    if comfyui.version >= INT8_SINCE:
        error, loaded = compare(path, loader, reference)
        assert error < (0.1 if kind == "convrot_w4a4" else 1e-5)
        assert any("Layout" in name for name in loaded["formats"]), loaded
        return
    try:
        error, loaded = compare(path, loader, reference)
    except Rejected as rejected:
        assert "installed comfy-kitchen is too old for this checkpoint" in str(rejected)
    else:
        assert error < 5e-3 and loaded["formats"] == ["torch.float32"]


@pytest.mark.parametrize("loader", LOADERS)
def test_float8_that_was_simply_cast(compare, write, tiny_weights, loader):
    cast = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 and "layers." in name else tensor
        for name, tensor in tiny_weights.items()
    }
    path = write(cast)
    assert compare(path, loader, load_model(path, dtype=torch.float32))[0] < 1e-5


def test_a_stage_in_windows_asks_for_the_memory_of_one(comfyui):
    """And for whole images beside it: fifteen in float32."""

    def asked(size, **options):
        return comfyui.call(
            "largest_asked_for",
            path=BUNDLED_MODEL / "transformer.safetensors",
            size=size,
            **options,
        )

    windows = asked(192, stages=2, redraw="tiled")
    assert windows - asked(96) == pytest.approx(15 * 3 * (192**2 - 96**2) * 4, abs=1)
    assert windows < asked(192, stages=2, redraw="extrapolated")


def test_unmarked_rotated_int8_is_read_as_the_loader_is_told(
    compare, write, tiny_model, tiny_weights
):
    tensors, _ = int8(tiny_weights, "", "row", None, 16)
    path = write(tensors)
    assert compare(path, "node", tiny_model, convrot="16")[0] < 2e-2
    assert compare(path, "node", tiny_model)[0] > 0.1


@pytest.mark.parametrize("patch", [16, 64, 128, 160])
def test_all_decoders(compare, write, patch):
    torch.manual_seed(0)
    narrow = tuple(
        level._replace(enc=min(level.enc, 8), up=8, dec=8) for level in PUBLISHED_DECODERS[patch]
    )
    config = L2PConfig(
        patch_size=patch,
        dim=96,
        n_heads=3,
        n_layers=2,
        n_refiner_layers=1,
        ffn_dim=128,
        cap_feat_dim=64,
        decoder=narrow,
        bottleneck_dim=16,
    )
    model = L2PTransformer(config).eval()
    side = config.size_multiple
    assert (
        compare(
            write(model.state_dict()), "checkpoint", model, height=side, width=2 * side, batch=1
        )[0]
        < 1e-5
    )


def test_the_bundled_model(compare):
    path = BUNDLED_MODEL / "transformer.safetensors"
    assert compare(path, "diffusion", load_model(path, dtype=torch.float32), 96, 96)[0] < 1e-5


def test_load_checkpoint_gives_a_vae_that_passes_pixels(comfyui, write, tiny_weights):
    assert comfyui.call("vae_round_trip", path=write(tiny_weights)) < 1e-6


@pytest.mark.parametrize("quantized", [False, True])
def test_save_checkpoint_and_load_again(
    comfyui, compare, write, tiny_model, tiny_weights, quantized
):
    tensors = int8(tiny_weights, "", "row")[0] if quantized else tiny_weights
    error, loaded = compare(write(tensors), None, tiny_model, call="save_and_reload")
    assert error < (2e-2 if quantized else 1e-5)
    assert loaded["vae"] and any("INT8" in name for name in loaded["formats"]) == (
        quantized and comfyui.version >= INT8_SINCE
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_what_cannot_be_drawn_with_is_named(comfyui, write, tiny_weights, loader, tmp_path):
    def refusal(tensors):
        with pytest.raises(Rejected) as rejected:
            comfyui.call("forward", path=write(tensors), loader=loader, inputs="", output="")
        return str(rejected.value)

    part = {
        name: tensor for name, tensor in tiny_weights.items() if not name.startswith("layers.1.")
    }
    assert "trained part" in refusal(part) and "l2p merge" in refusal(part)
    assert "lacks 1 of the model's" in refusal(
        {name: tensor for name, tensor in tiny_weights.items() if name != "x_pad_token"}
    )
    assert "layers.0.new" in refusal({**tiny_weights, "layers.0.new": torch.zeros(1)})
    qwen_image = tmp_path / "qwen-image.safetensors"
    backbones.save_with_decoder(qwen_image, QWEN_IMAGE, backbones.qwen_image(768), 8)
    assert "L2P model on Qwen-Image; this pack runs" in refusal(load_file(qwen_image))


def test_installed_once_and_nodes_are_there(comfyui):
    assert {
        "L2PCheckpointLoader",
        "L2PTextEncoderLoader",
        "L2PTextEncode",
        "L2PKSampler",
        "L2PScheduler",
        "EmptyL2PLatentImage",
    } <= set(comfyui.nodes)
    assert comfyui.call("install_again")


def test_an_old_comfyui_gets_one_plain_line(comfyui):
    assert comfyui.call("nodes_under", version="0.15.1") == [
        [],
        [
            "ComfyUI-L2P needs ComfyUI v0.16 or newer, this is v0.15.1: its nodes are left out."
            " Update ComfyUI"
        ],
    ]
    assert "L2PKSampler" in comfyui.call("nodes_under", version="0.16.0")[0]


def test_a_comfyui_that_lacks_something_private_gets_one_plain_line(comfyui):
    nodes, (line,) = comfyui.call("nodes_under", broken="sample")
    assert nodes == [] and line.startswith("ComfyUI-L2P does not work with ComfyUI v")
    assert "ImportError" in line or "ModuleNotFoundError" in line


def test_other_models_are_recognised_as_before(comfyui):
    latent = {
        "cap_embedder.1.weight": (3840, 2560),
        "cap_embedder.0.weight": (2560,),
        "x_embedder.weight": (3840, 64),
        "noise_refiner.0.attention.k_norm.weight": (128,),
        "noise_refiner.0.attention.qkv.weight": (11520, 3840),
        "x_pad_token": (1, 3840),
        "layers.0.attention.qkv.weight": (11520, 3840),
    }
    assert comfyui.call("detect", shapes=latent) == "ZImage"


LORA_TARGETS = (
    "layers.0.attention.to_q",
    "layers.1.attention.to_k",
    "layers.1.attention.to_out.0",
    "layers.2.feed_forward.w2",
    "noise_refiner.0.attention.to_v",
    "context_refiner.0.feed_forward.w1",
    "layers.0.adaLN_modulation.0",
    "cap_embedder.1",
    "all_x_embedder.16-1",
    "local_decoder.dec2.0",
    "local_decoder.out_conv",
)
DIFFUSERS, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
NAMINGS = {  # who writes it: (a layer's name in the file, the names of its two factors)
    "ai-toolkit": ("diffusion_model.{}".format, DIFFUSERS),
    "diffusers": ("transformer.{}".format, DIFFUSERS),
    "DiffSynth": ("{}".format, ("lora_A.default.weight", "lora_B.default.weight")),
    "T2I-L2P's trainer": ("pipe.dit.{}".format, ("lora_A.default.weight", "lora_B.default.weight")),
    "peft": ("base_model.model.{}".format, DIFFUSERS),
    "kohya": (lambda name: "lora_unet_" + name.replace(".", "_"), KOHYA),
    "LyCORIS": (lambda name: "lycoris_" + name.replace(".", "_"), KOHYA),
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("naming", NAMINGS)
def test_loras_change_the_image_as_merged_weights_do(
    compare, write, tiny_model, tiny_weights, naming, quantized
):
    name_of, (down, up) = NAMINGS[naming]
    generator = torch.Generator().manual_seed(2)
    lora, merged = {}, dict(tiny_weights)
    for target in LORA_TARGETS:
        weight = tiny_weights[f"{target}.weight"]
        a = torch.randn(4, *weight.shape[1:], generator=generator)
        b = torch.randn(weight.shape[0], 4, *[1] * (weight.dim() - 2), generator=generator)
        lora |= {f"{name_of(target)}.{down}": a, f"{name_of(target)}.{up}": b}
        change = b.flatten(1) @ a.flatten(1)
        merged[f"{target}.weight"] = weight + (
            0.5 * 0.5 * weight.norm() / change.norm()
        ) * change.view_as(weight)
        lora[f"{name_of(target)}.{up}"] = b * (0.5 * weight.norm() / change.norm())
    changed = L2PTransformer(tiny_model.config)
    changed.load_state_dict(merged)
    file = write(lora, "lora.safetensors")
    path = write(int8(tiny_weights, "", "row")[0] if quantized else tiny_weights)
    error, loaded = compare(path, "diffusion", changed.eval(), lora=file, strength=0.5)
    assert loaded["patches"] == len(LORA_TARGETS)
    assert error < (3e-2 if quantized else 1e-5)
    assert compare(path, "diffusion", tiny_model, lora=file, strength=0.5)[0] > 0.1


def test_a_z_image_controlnet_is_rejected_by_name(comfyui, write, tiny_weights):
    with pytest.raises(Rejected, match="Z-Image ControlNet is connected.*Remove the ControlNet"):
        comfyui.call("with_controlnet", path=write(tiny_weights))


def test_comfyuis_own_detection_tests_pass_with_the_pack(comfyui):
    found = comfyui.call("core_detection_tests")
    if found is None:
        pytest.skip("ComfyUI's Python has no pytest, which its own tests run on")
    assert found == 0


@pytest.mark.parametrize(
    "patch, size", [(16, 1024), (16, 2048), (16, 4096), (64, 4096), (128, 8192), (160, 10240)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_comfyui_is_told_the_memory_that_a_pass_takes(comfyui, patch, size, dtype):
    """Counted at the published widths. Too little would run out of memory, too much would push the
    weights off the card."""
    in_flight = comfyui.call(
        "images_in_flight", path=BUNDLED_MODEL / "transformer.safetensors", size=480
    )
    told, counted = comfyui.call(
        "memory",
        config={"patch_size": patch, "n_layers": 1, "n_refiner_layers": 1},
        size=size,
        dtype=dtype,
    )
    counted += in_flight * 3 * size**2 * 4
    assert counted <= told < 1.5 * counted


@pytest.mark.parametrize(
    "have, batch_size, stages, redraw, words",
    [
        (10**12, 1, 1, "interpolated", None),
        (10**8, 1, 1, "interpolated", "Take a smaller size"),
        (10**8, 2, 1, "interpolated", "Take a smaller batch_size, or"),
        (10**8, 1, 2, "interpolated", "Take redraw tiled"),
        (10**9, 1, 6, "tiled", None),
    ],
)
def test_what_a_device_cannot_hold_is_told_with_figures(
    comfyui, write, tiny_weights, have, batch_size, stages, redraw, words
):
    told = comfyui.call(
        "shortage",
        path=write(tiny_weights, metadata={"modelspec.resolution": "64x64"}),
        have=have,
        batch_size=batch_size,
        height=2048,
        width=2048,
        stages=stages,
        redraw=redraw,
    )
    assert (
        told is None
        if words is None
        else words in told
        and f"generating {batch_size} x 2048 x 2048 holds about" in told
        and "0.1 GB" in told
    )


def test_stop_works_inside_a_step(comfyui, write, tiny_weights):
    """Stop pressed while the first layer runs: the decoder is not reached."""
    reached = comfyui.call("stop_inside_a_step", path=write(tiny_weights))
    assert "layers.0" in reached and "local_decoder" not in reached


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("spelling", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_every_loader_keeps_the_scales_of_fp8(
    compare, write, tiny_weights, loader, spelling, prefix
):
    scaled, plain = scaled_fp8(
        tiny_weights,
        lambda key, tensor: tensor.dim() == 2 and key.startswith("layers."),
        spelling,
    )
    path = write({prefix + key: tensor for key, tensor in scaled.items()}, "scaled.safetensors")
    reference = load_model(write(plain, "plain.safetensors"), dtype=torch.float32)
    assert compare(path, loader, reference)[0] < 0.02
