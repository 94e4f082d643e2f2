"""A latent Z-Image of a few thousand numbers."""

import diffusers
import torch
import transformers
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL


def make_latent(folder):
    """Write it, with the small model's text encoder, as diffusers does."""
    torch.manual_seed(0)
    encoder = transformers.Qwen3Model.from_pretrained(
        BUNDLED_MODEL / "text_encoder", dtype=torch.bfloat16
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content"
        " }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    transformer = diffusers.ZImageTransformer2DModel(
        dim=64,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=96,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 64, 64],
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    for parameter in transformer.parameters():  # some of them are not drawn at all
        parameter.data = torch.randn_like(parameter) * 0.1
    diffusers.ZImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        encoder,
        tokenizer,
        transformer,
    ).save_pretrained(folder)
