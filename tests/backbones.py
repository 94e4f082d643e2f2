"""Tiny models of further backbones, made by diffusers and transformers with random weights."""

from dataclasses import replace
from pathlib import Path

import torch
import transformers
from comfyui_l2p.l2p_core.backbones import FLUX2_KLEIN
from comfyui_l2p.l2p_core.config import Level
from comfyui_l2p.l2p_core.decoder import LocalDecoder
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from safetensors.torch import save_file

WIDTH = 8  # of the text encoder
LEVELS = tuple(Level(name, 8, 8, 8) for name in "1234")  # a decoder that trains in seconds
# As Qwen3's own template renders one user turn with thinking disabled.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content"
    " }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def flux2(in_channels: int, dim: int = 32, layers: tuple[int, int] = (2, 3)):
    """A Flux2Transformer2DModel with klein's proportions."""
    import diffusers

    model = diffusers.Flux2Transformer2DModel(
        in_channels=in_channels,
        num_layers=layers[0],
        num_single_layers=layers[1],
        attention_head_dim=16,
        num_attention_heads=dim // 16,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    for parameter in model.parameters():  # as they come, layers add next to nothing
        if parameter.dim() > 1:
            parameter.data *= 3
    return model.eval().requires_grad_(False)


def save_text_encoder(folder: Path) -> tuple[transformers.Qwen3ForCausalLM, object]:
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
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.3,  # so that prompts differ after 28 layers
        )
    ).eval()
    model.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return model, tokenizer


def save_klein(folder: Path) -> Path:
    """A FLUX.2-klein of a few thousand numbers: transformer/, text_encoder/ and tokenizer/."""
    torch.manual_seed(0)
    flux2(16).save_pretrained(folder / "transformer")
    save_text_encoder(folder)
    return folder


def save_pixel_model(file: Path, dim: int = 32, layers: tuple[int, int] = (2, 3)) -> Path:
    """A pixel model on FLUX.2-klein with a small decoder, its names written out by hand."""
    torch.manual_seed(1)
    weights = flux2(768, dim, layers).state_dict()
    del weights["proj_out.weight"]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    latent = FLUX2_KLEIN.config(shapes, 16)
    config = replace(latent, decoder=LEVELS, bottleneck_dim=32)
    decoder = LocalDecoder(config).state_dict()
    decoder = {f"local_decoder.{name}": tensor for name, tensor in decoder.items()}
    save_file({**weights, **decoder}, file)
    return file
