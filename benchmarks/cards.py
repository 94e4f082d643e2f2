"""What fits which card: what `l2p generate` would choose without flags, counted on the headers of
full-size files. Nothing is run on a card.

    python benchmarks/cards.py

The files are sparse: the names, shapes and dtypes of the published ones, no weights. A card of N GB
counts as N GiB, of which 0.7 GB are taken by its driver and a desktop."""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

from comfyui_l2p.l2p_core import L2PConfig, L2PPipeline
from comfyui_l2p.l2p_core.backbones import FLUX2_KLEIN
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS, PixelConfig
from comfyui_l2p.l2p_core.estimate import estimate
from comfyui_l2p.l2p_core.files.load import expected_shapes
from load import encoded_header, int8_tensors, published_tensors

CARDS = (8, 12, 16, 24)
TAKEN = 0.7e9  # bytes, by driver and desktop
Tensors = Iterable[tuple[str, str, tuple[int, ...]]]


def text_encoder_tensors() -> Tensors:
    """(name, dtype, shape) of Qwen3-4B."""
    width, layers, ffn, head, heads, kv_heads = 2560, 36, 9728, 128, 32, 8
    yield "model.embed_tokens.weight", "BF16", (151_936, width)
    yield "model.norm.weight", "BF16", (width,)
    for layer in range(layers):
        shapes = {
            "self_attn.q_proj": (heads * head, width),
            "self_attn.k_proj": (kv_heads * head, width),
            "self_attn.v_proj": (kv_heads * head, width),
            "self_attn.o_proj": (width, heads * head),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "mlp.gate_proj": (ffn, width),
            "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        for name, shape in shapes.items():
            yield f"model.layers.{layer}.{name}.weight", "BF16", shape


def larger_tensors(patch: int) -> Tensors:
    """(name, dtype, shape) of the 4K, 8K and 10K models, whose dtype is taken to be BF16."""
    config = L2PConfig(patch_size=patch, decoder=PUBLISHED_DECODERS[patch])
    for name, shape in expected_shapes(config).items():
        yield name, "BF16", shape


def klein_shapes() -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of FLUX.2-klein-base-4B."""
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = diffusers.Flux2Transformer2DModel(
            in_channels=128,
            num_layers=5,
            num_single_layers=20,
            num_attention_heads=24,
            joint_attention_dim=7680,
            guidance_embeds=False,
        )
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def klein_config() -> PixelConfig:
    """The numbers of its pixel model."""
    config = FLUX2_KLEIN.config(klein_shapes(), 16).with_patch(16)
    assert config.decoder == PUBLISHED_DECODERS[16]
    return config


def write_sparse(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file of the real size that takes no room."""
    head, size = encoded_header(tensors)
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(len(head) + size)


def row(name: str, model: Path, encoder: Path, side: int, card: int) -> str:
    """Return one line of the table: a model on a card."""
    pipe = L2PPipeline.from_pretrained(model, encoder)
    settings = pipe.complete({"height": side, "width": side})
    placement = pipe.place(settings, 1, free=int(card * 2**30 - TAKEN))
    pipe.adopt(placement)
    freed = placement.free_text_encoder or placement.encode_on_cpu
    parts, _ = estimate(pipe, settings, 1, freed, placement.encode_on_cpu)
    return f"| {name} | {card} GB | {placement.reason} | {parts['total'] / 1e9:.1f} GB |"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    models = {
        "1K, BF16": (published_tensors(), 1024),
        "1K, INT8": (int8_tensors(), 1024),
        "4K, BF16": (larger_tensors(64), 4096),
    }
    print("| model | card | what `l2p generate` chooses | peak |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        encoder = Path(folder) / "qwen_3_4b.safetensors"
        write_sparse(encoder, text_encoder_tensors())
        for number, (name, (tensors, side)) in enumerate(models.items()):
            model = Path(folder) / f"model-{number}.safetensors"
            write_sparse(model, tensors)
            for card in CARDS:
                print(row(name, model, encoder, side, card), flush=True)


if __name__ == "__main__":
    main()
