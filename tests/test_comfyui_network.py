"""What other nodes and files do to our network inside ComfyUI: LoRAs, patches, wrappers, saving,
broken versions."""

import json

import pytest
import torch
from adapters import packed_change
from comfyui_l2p.l2p_core import load_model
from comfyui_l2p.l2p_core.model import Hooks, L2PTransformer
from comfyui_l2p.quant.quantize import Options, quantize
from helpers import comfyui_naming, int8, rms
from real_comfyui import Rejected
from safetensors.torch import load_file, save_file
from test_comfyui_model import INT8_SINCE


@pytest.fixture
def inputs(tmp_path):
    """inputs(**more) → (path, image, sigma, prompts) of a batch of two."""

    def make(**more):
        generator = torch.Generator().manual_seed(1)
        image, sigma = torch.randn(2, 3, 64, 96, generator=generator), torch.tensor([0.9, 0.3])
        prompts = torch.randn(2, 40, 64, generator=generator)
        path = tmp_path / "inputs.safetensors"
        save_file({"image": image, "sigma": sigma, "caption": prompts, **more}, path)
        return path, image, sigma, prompts

    return make


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output.safetensors"


DOTTED = "diffusion_model.layers.0.attention.qkv"


@pytest.mark.parametrize(
    "kind, name_of, quantized",
    [
        *(
            (kind, DOTTED, quantized)
            for kind in ("lora_A", "loha", "lokr", "lokr of four", "diff")
            for quantized in (False, True)
        ),
        ("lora_A", "layers.0.attention.qkv", False),
        ("lora_down", "lora_unet_layers_0_attention_qkv", False),
        ("lora_down", "lycoris_layers_0_attention_qkv", True),
    ],
)
def test_loras_of_packed_layers(
    comfyui, write, inputs, output, tiny_weights, tiny_model, kind, name_of, quantized
):
    held, change = packed_change(kind, 3 * 96, 96)
    merged = dict(tiny_weights)
    for place, name in enumerate(("to_q", "to_k", "to_v")):
        weight = f"layers.0.attention.{name}.weight"
        merged[weight] = tiny_weights[weight] + change[96 * place : 96 * (place + 1)]
    changed = L2PTransformer(tiny_model.config).eval()
    changed.load_state_dict(merged)

    path, image, sigma, prompts = inputs()
    lora = write({f"{name_of}.{part}": tensor for part, tensor in held.items()}, "lora.safetensors")
    model = write(int8(tiny_weights, "", "row")[0] if quantized else tiny_weights)
    loaded = comfyui.call(
        "forward", path=model, loader="diffusion", inputs=path, output=output, lora=lora
    )
    with torch.no_grad():
        expected, before = (
            -network(image, 1 - sigma, list(prompts)) for network in (changed, tiny_model)
        )
    found = load_file(output)["output"]
    assert loaded["patches"] == 3
    assert rms(found - expected, expected) < (2e-2 if quantized else 1e-5)
    assert rms(before - expected, expected) > 2e-2, "the LoRA changes too little to be seen"


def test_prompts_padded_to_one_length_give_what_each_gives_alone(
    comfyui, write, inputs, output, tiny_weights, tiny_model
):
    """5 and 40 tokens, which are padded to 32 and 64."""
    mask = torch.ones(2, 40)
    mask[0, 5:] = 0
    path, image, sigma, prompts = inputs(mask=mask)
    comfyui.call(
        "forward", path=write(tiny_weights), loader="diffusion", inputs=path, output=output
    )
    with torch.no_grad():
        alone = [
            -tiny_model(image[i : i + 1], 1 - sigma[i : i + 1], [prompts[i, :length]])
            for i, length in enumerate((5, 40))
        ]
        unmasked = -tiny_model(image[:1], 1 - sigma[:1], [prompts[0]])
    found = load_file(output)["output"]
    assert rms(found - torch.cat(alone), torch.cat(alone)) < 1e-5
    assert rms(found[:1] - unmasked, unmasked) > 1e-2


@pytest.mark.parametrize("size, shared", [(64, [2, 2]), (128, [2])])
def test_a_guided_step_computes_once_what_its_prompts_share(
    comfyui, write, output, tiny_weights, tiny_model, size, shared
):
    """16 patches are padded to 32 and refined for each prompt; 64 are not padded. A patch sees
    ComfyUI's batch. Both give what the library gives."""
    path, found = write(tiny_weights), []
    for patched, batches in ((False, shared), (True, [4])):
        seen = comfyui.call("guided_step", path=path, output=output, size=size, patched=patched)
        assert seen == batches
        found.append(load_file(output)["latent"])
    # guidance and the last sigma multiply the rounding of a pass by about 4
    assert rms(found[0] - found[1], found[1]) < 4e-6

    generator, width = torch.Generator().manual_seed(0), tiny_model.config.cap_feat_dim
    positive, negative = (torch.randn(1, length, width, generator=generator) for length in (40, 5))
    x = 0.9 * torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        with_prompt, without = (
            -tiny_model(x, torch.full((2,), 0.1), [*prompt, *prompt])
            for prompt in (positive, negative)
        )
    velocity = without + 2 * (with_prompt - without)
    expected = (x - 0.4 * velocity) / 0.5  # as the sampler scales it at the end
    assert rms(found[0] - expected, expected) < 1e-5


@pytest.mark.parametrize(
    "rope", [{"scale_x": 0.5, "scale_y": 0.25}, {"shift_x": 3.0, "shift_y": 7.0, "scale_x": 2.0}]
)
def test_rope_options(comfyui, write, inputs, output, tiny_weights, tiny_model, rope):
    path, image, sigma, prompts = inputs()
    comfyui.call("forward_with", path=write(tiny_weights), inputs=path, output=output, rope=rope)
    hooks = Hooks(
        rope_scale=(rope.get("scale_y", 1.0), rope.get("scale_x", 1.0)),
        rope_shift=(rope.get("shift_y", 0.0), rope.get("shift_x", 0.0)),
    )
    with torch.no_grad():
        expected, plain = (
            -tiny_model(image, 1 - sigma, list(prompts), hooks),
            -tiny_model(image, 1 - sigma, list(prompts)),
        )
    found = load_file(output)["output"]
    assert rms(found - expected, expected) < 1e-5 < rms(plain - expected, expected)


def test_block_patches_get_and_give_image_and_prompt_tokens(
    comfyui, write, inputs, output, tiny_weights, tiny_model
):
    """24 patches padded to 32, 40 prompt tokens to 64. Image tokens of zeros leave the decoder
    nothing but the pixels."""
    path, image, sigma, prompts = inputs()
    arguments = {"path": write(tiny_weights), "inputs": path, "output": output}
    with torch.no_grad():
        plain = -tiny_model(image, 1 - sigma, list(prompts))
        without_features = -tiny_model.local_decoder(image, torch.zeros(2, 96, 4, 6))

    kept = comfyui.call(
        "forward_with", patches={"double_block": "keep", "noise_refiner": "keep"}, **arguments
    )
    found = load_file(output)["output"]
    assert rms(found - plain, plain) < 1e-5
    assert [index for index, *_ in kept["seen"]] == [0, 1, 0, 1, 2, 3]
    assert all(
        shapes == [[2, 32, 96], [2, 64, 96], [1, 32, 1, 16, 2, 2]] for _, *shapes in kept["seen"]
    )

    comfyui.call("forward_with", patches={"double_block": "zero img"}, **arguments)
    found = load_file(output)["output"]
    assert rms(found - without_features, without_features) < 1e-5

    comfyui.call(
        "forward_with", patches={"double_block": "zero txt"}, **arguments
    )  # after the last block: of no effect
    found = load_file(output)["output"]
    assert rms(found - plain, plain) < 1e-5


def test_attention_overrides_are_used(comfyui, write, inputs, output, tiny_weights, tiny_model):
    """An attention that gives each token its own value: the same network with softmax replaced, in
    the library."""

    class OwnValue(Hooks):
        def attend(self, q, k, v, mask):
            return v.transpose(1, 2).flatten(2)

    path, image, sigma, prompts = inputs()
    seen = comfyui.call(
        "forward_with", path=write(tiny_weights), inputs=path, output=output, override=True
    )["seen"]
    with torch.no_grad():
        expected = -tiny_model(image, 1 - sigma, list(prompts), OwnValue())
    assert len(seen) == 2 + 2 + 4
    assert rms(load_file(output)["output"] - expected, expected) < 1e-5


def test_wrappers_cannot_change_the_sampler_s_tensor(
    comfyui, write, inputs, output, tiny_weights, tiny_model
):
    """As EasyCache does, which adds to its input in place."""
    path, image, sigma, prompts = inputs()
    found = comfyui.call(
        "forward_with", path=write(tiny_weights), inputs=path, output=output, wrapper=True
    )
    with torch.no_grad():
        expected = -tiny_model(image, 1 - sigma, list(prompts))
    assert not found["input_changed"]
    assert rms(load_file(output)["output"] - expected, expected) < 1e-5


@pytest.mark.parametrize("naming", ["published", "comfyui"])
def test_loading_copies_no_weights(comfyui, write, tiny_weights, naming):
    weights = tiny_weights if naming == "published" else comfyui_naming(tiny_weights)
    assert comfyui.call("copied_at_load", path=write(weights)) == 0
    markers = 100 * len(tiny_weights)  # a few bytes of text for each layer
    assert comfyui.call("copied_at_load", path=write(int8(weights, "", "row")[0])) < markers


@pytest.mark.parametrize("granularity, convrot", [("tensor", 0), ("row", 0), ("row", 16)])
def test_packed_int8_layers_are_one_product_on_a_cpu(
    comfyui, write, inputs, tiny_weights, granularity, convrot
):
    if comfyui.version < INT8_SINCE:
        pytest.skip("this ComfyUI has no INT8 linear layer")
    path, *_ = inputs()
    tensors, metadata = int8(comfyui_naming(tiny_weights), "", granularity, "metadata", convrot)
    packed = comfyui.call("int8_products", path=write(tensors, metadata=metadata), inputs=path)
    assert packed == {"together": 2 + 2 + 4, "difference": 0.0}
    apart, metadata = int8(tiny_weights, "", granularity, "metadata", convrot)
    assert (
        comfyui.call("int8_products", path=write(apart, metadata=metadata), inputs=path)["together"]
        == 0
    )


@pytest.mark.parametrize("kind", ["mxfp8", "nvfp4"])
def test_block_scales_of_packed_layers_are_split(
    comfyui, write, inputs, output, tmp_path, tiny_weights, kind
):
    """The packed file is made by ComfyUI's own quantizer, from the same weights."""
    import comfy_kitchen

    if comfyui.version < INT8_SINCE:
        pytest.skip("this ComfyUI gets the weights dequantized")
    path, image, sigma, prompts = inputs()
    packed, layers = {}, []
    for name, tensor in comfyui_naming(tiny_weights).items():
        if not name.endswith("qkv.weight"):
            packed[name] = tensor
            continue
        if kind == "mxfp8":
            weight, scale = comfy_kitchen.quantize_mxfp8(tensor.bfloat16())
            packed |= {name: weight, f"{name}_scale": scale.view(torch.uint8)}
        else:
            scale_2 = (tensor.abs().amax() / (448 * 6)).float()
            weight, scale = comfy_kitchen.quantize_nvfp4(tensor.bfloat16(), scale_2)
            packed |= {
                name: weight,
                f"{name}_scale": scale.view(torch.float8_e4m3fn),
                f"{name}_scale_2": scale_2,
            }
        layers.append(name.removesuffix(".weight"))
    metadata = {
        "_quantization_metadata": json.dumps(
            {"layers": {layer: {"format": kind} for layer in layers}}
        )
    }
    file = write(packed, metadata=metadata)
    comfyui.call("forward", path=file, loader="diffusion", inputs=path, output=output)
    with torch.no_grad():
        expected = -load_model(file, dtype=torch.float32)(image, 1 - sigma, list(prompts))
    assert rms(load_file(output)["output"] - expected, expected) < 1e-5


def test_q_k_and_v_may_be_quantized_each_in_its_own_way(
    comfyui, write, inputs, output, tiny_weights, tiny_model
):
    """Values stay in floating point, queries are rotated, keys are not."""
    rotated, markers = int8(tiny_weights, "", "row", "tensors", 16)
    plain, _ = int8(tiny_weights, "", "row", "tensors")
    mixed = {
        key: tensor
        for key, tensor in (
            plain | {key: rotated[key] for key in rotated if ".to_q." in key}
        ).items()
        if ".to_v." not in key
    }
    mixed |= {key: tensor for key, tensor in tiny_weights.items() if ".to_v." in key}
    path, image, sigma, prompts = inputs()
    comfyui.call("forward", path=write(mixed), loader="node", inputs=path, output=output)
    with torch.no_grad():
        expected = -tiny_model(image, 1 - sigma, list(prompts))
    assert rms(load_file(output)["output"] - expected, expected) < 2e-2


@pytest.mark.parametrize("quantized", [False, True])
def test_saved_checkpoints_have_comfyui_s_names(
    comfyui, write, inputs, tmp_path, tiny_weights, tiny_model, quantized
):
    """Every loader reads the file, the library's too."""
    tensors = int8(tiny_weights, "", "row")[0] if quantized else tiny_weights
    saved = tmp_path / "saved.safetensors"
    names = comfyui.call("saved_names", path=write(tensors), output=saved)
    expected = {f"model.diffusion_model.{name}" for name in comfyui_naming(tiny_weights)}
    assert expected == {
        name for name in names if not name.endswith(("_scale", "comfy_quant", "pixel_space_vae"))
    }
    _, image, sigma, prompts = inputs()
    with torch.no_grad():
        found, wanted = (
            network(image, 1 - sigma, list(prompts))
            for network in (load_model(saved, dtype=torch.float32), tiny_model)
        )
    assert rms(found - wanted, wanted) < (2e-2 if quantized else 1e-5)


def test_a_saved_checkpoint_holds_the_lora_that_was_loaded(
    comfyui, write, inputs, tmp_path, tiny_weights, tiny_model
):
    held, change = packed_change("lora_A", 3 * 96, 96)
    lora = write(
        {f"diffusion_model.layers.0.attention.qkv.{part}": tensor for part, tensor in held.items()},
        "lora.safetensors",
    )
    saved = tmp_path / "saved.safetensors"
    comfyui.call("saved_names", path=write(tiny_weights), output=saved, lora=lora)
    found = load_file(saved)["model.diffusion_model.layers.0.attention.qkv.weight"]
    before = comfyui_naming(tiny_weights)["layers.0.attention.qkv.weight"]
    torch.testing.assert_close(found, before + change, atol=1e-5, rtol=1e-5)


def test_files_that_cannot_be_packed_are_saved_under_published_names(
    comfyui, write, tmp_path, tiny_weights
):
    quantize(
        write(tiny_weights),
        path := tmp_path / "mxfp8.safetensors",
        Options("mxfp8", preset="small"),
    )
    if comfyui.version < INT8_SINCE:
        pytest.skip("this ComfyUI gets the weights dequantized")
    names = comfyui.call("saved_names", path=path, output=tmp_path / "saved.safetensors")
    assert "model.diffusion_model.layers.0.attention.to_q.weight" in names


def test_a_comfyui_that_cannot_run_the_network_says_so(comfyui, write, tiny_weights):
    """Two loads: each ends in the sentence, which is logged once."""
    first, second, *logged = comfyui.call("broken_self_test", path=write(tiny_weights))
    assert logged == [first] == [second]
    assert (
        first.startswith("ComfyUI-L2P does not work with ComfyUI v")
        and "tested with v0.16 to v" in first
    )


def test_the_self_test_takes_less_than_a_second(comfyui):
    assert comfyui.call("self_test_time") < 1


def test_a_model_that_comfyui_does_not_recognise_is_reported(comfyui, write, tiny_weights):
    with pytest.raises(
        Rejected, match="did not recognise model.safetensors as an L2P model.*other packs disabled"
    ):
        comfyui.call("not_recognised", path=write(tiny_weights))


def test_reference_images_are_rejected(comfyui, write, tiny_weights):
    with pytest.raises(Rejected, match="carries reference images.*Remove the node"):
        comfyui.call("with_reference_image", path=write(tiny_weights))
