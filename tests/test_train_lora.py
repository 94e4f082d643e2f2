"""Training that starts from a LoRA file of any dialect, and the files that it can't start from."""

import pytest
import torch
from adapters import a_lora, packed_change
from comfyui_l2p.l2p_core import CheckpointError
from comfyui_l2p.l2p_core.train.run import train
from safetensors.torch import load_file
from small_runs import CHECKPOINT, config


@pytest.fixture(scope="module")
def weights():
    return {name: tensor.float() for name, tensor in load_file(CHECKPOINT).items()}


def main_layers(weights, naming):
    """A LoRA of alpha 2 on main layers alone, and what it adds to each weight."""
    file, added = a_lora(weights, naming, alpha=2)
    return (
        {key: tensor for key, tensor in file.items() if "decoder" not in key},
        {name: change for name, change in added.items() if "decoder" not in name},
    )


def packed(kind):
    held, change = packed_change(kind, 3 * 192, 192)
    file = {f"lora_unet_layers_2_attention_qkv.{part}": tensor for part, tensor in held.items()}
    parts = zip(("to_q", "to_k", "to_v"), change.chunk(3))
    return file, {f"layers.2.attention.{part}.weight": rows for part, rows in parts}


@pytest.mark.slow
@pytest.mark.parametrize("naming", ["ai-toolkit", "kohya, packed"])
def test_a_run_starts_from_a_loras_weights(data, weights, write, naming):
    """A step of next to no length leaves the product of the file's factors, alpha included."""
    file, added = packed("lora_down") if naming == "kohya, packed" else main_layers(weights, naming)
    settings = config(
        data,
        lora_rank=4,
        resume_lora=str(write(file, "first.safetensors")),
        steps=1,
        batch=1,
        learning_rate=1e-12,
    )
    lora = load_file(train(settings, progress=False))
    for name in (key for key in lora if key.endswith("lora_B.weight")):
        layer = name.removeprefix("diffusion_model.").removesuffix(".lora_B.weight")
        product = lora[name] @ lora[name.replace("lora_B", "lora_A")]
        wanted = added.get(f"{layer}.weight", torch.zeros_like(product))
        torch.testing.assert_close(product, wanted, atol=1e-6, rtol=1e-5, msg=name)

    write({key: 2 * tensor for key, tensor in file.items()}, "first.safetensors")
    with pytest.raises(ValueError, match="another LoRA"):
        train(settings, progress=False)


def test_what_no_run_can_start_from_is_named(data, weights, write):
    loha = {f"diffusion_model.layers.0.attention.qkv.{part}": tensor
            for part, tensor in packed_change("loha", 3 * 192, 192)[0].items()}  # fmt: skip
    rejected = (
        (main_layers(weights, "kohya")[0], {"lora_rank": 8}, "has rank 4 for .*give lora_rank 4"),
        (a_lora(weights)[0], {}, "dec2.0.weight, which a LoRA run does not train"),
        (loha, {}, "hada_w1_a.* is no LoRA"),
        (weights, {}, "is no LoRA"),
        (loha, {"lora_rank": 0}, "lora_rank 0 trains no LoRA"),
    )
    for file, changes, words in rejected:
        path = str(write(file, "first.safetensors"))
        with pytest.raises((CheckpointError, ValueError), match=words):
            train(config(data, **{"lora_rank": 4, "resume_lora": path, **changes}), progress=False)
        assert not (data.parent / "run" / "config.toml").exists()
