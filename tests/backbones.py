"""Tiny models of further backbones, made by diffusers and transformers with random weights."""

from dataclasses import replace
from pathlib import Path

import torch
import transformers
from comfyui_l2p.l2p_core.backbones import FLUX2_KLEIN, Backbone
from comfyui_l2p.l2p_core.config import Level
from comfyui_l2p.l2p_core.decoder import LocalDecoder
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from safetensors.torch import save_file

WIDTH = 8  # of the text encoder, unless given
# As Qwen3's own template renders one user turn with thinking disabled.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content"
    " }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def flux2(
    in_channels: int,
    dim: int = 32,
    layers: tuple[int, int] = (2, 3),
    gain: float = 3,
    **sizes: int,
):
    """A Flux2Transformer2DModel with klein's proportions.

    gain: of its weights; as they come, layers add next to nothing. sizes: further arguments of the
    class."""
    import diffusers

    arguments = {
        "in_channels": in_channels,
        "num_layers": layers[0],
        "num_single_layers": layers[1],
        "attention_head_dim": 16,
        "num_attention_heads": dim // 16,
        "joint_attention_dim": 3 * WIDTH,
        "timestep_guidance_channels": 256,  # the one width that ComfyUI computes
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    model = diffusers.Flux2Transformer2DModel(**{**arguments, **sizes})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= gain
    return model.eval().requires_grad_(False)


def qwen_image(in_channels: int):
    """A QwenImageTransformer2DModel."""
    import diffusers

    model = diffusers.QwenImageTransformer2DModel(
        in_channels=in_channels,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 14, 14),
    )
    return model.eval().requires_grad_(False)


def save_qwen_image(folder: Path) -> Path:
    """A Qwen-Image of a few thousand numbers: transformer/, text_encoder/ and tokenizer/."""
    torch.manual_seed(0)
    qwen_image(64).save_pretrained(folder / "transformer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    tokenizer.padding_side = "right"
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": len(tokenizer),
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "initializer_range": 0.3,  # so that prompts differ
    }
    vision = {"hidden_size": 16, "out_hidden_size": 32, "depth": 1, "num_heads": 1}
    config = transformers.Qwen2_5_VLConfig(
        text_config=sizes, vision_config={**vision, "intermediate_size": 16}
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def save_text_encoder(
    folder: Path, width: int = WIDTH
) -> tuple[transformers.Qwen3ForCausalLM, object]:
    """A Qwen3 of 28 layers and its tokenizer, in text_encoder/ and tokenizer/."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
    specials = ["<|endoftext|>", "<think>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.padding_side = "right"
    tokenizer.chat_template = CHAT_TEMPLATE
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.3,  # so that prompts differ after 28 layers
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # Qwen3's own
        )
    ).eval()
    for parameter in model.parameters():  # exact in float16, in which ComfyUI keeps text encoders
        parameter.data = parameter.data.half().float()
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return model, tokenizer


def save_klein(folder: Path) -> Path:
    """A FLUX.2-klein of a few thousand numbers: transformer/, text_encoder/ and tokenizer/."""
    torch.manual_seed(0)
    flux2(16).save_pretrained(folder / "transformer")
    save_text_encoder(folder)
    return folder


def save_pixel_model(
    file: Path,
    dim: int = 32,
    layers: tuple[int, int] = (2, 3),
    decoder: int = 8,
) -> Path:
    """A pixel model on FLUX.2-klein with a small decoder, of so many channels."""
    torch.manual_seed(1)
    return save_with_decoder(file, FLUX2_KLEIN, flux2(768, dim, layers), decoder)


def save_with_decoder(file: Path, row: Backbone, transformer, channels: int) -> Path:
    """A transformer of diffusers and a small decoder in one file, its names written out by hand."""
    weights = transformer.state_dict()
    for name in [name for name in weights if name.startswith("proj_out.")]:
        del weights[name]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    levels = tuple(Level(name, *[channels] * 3) for name in "1234")
    config = replace(row.config(shapes, 16), decoder=levels, bottleneck_dim=4 * channels)
    for name, tensor in LocalDecoder(config).state_dict().items():
        weights[f"local_decoder.{name}"] = tensor
    save_file(weights, file)
    return file
