"""FLUX.2-klein in ComfyUI: core's own transformer with the local decoder.

Files have diffusers' tensor names. The network has core's, and packs q, k and v of a double block
into one tensor."""

from collections.abc import Mapping
from functools import cache
from itertools import groupby

import comfy.supported_models
import torch
from torch import Tensor, nn

from ..l2p_core.backbones import FLUX2_KLEIN, BackboneConfig
from ..l2p_core.config import Level
from ..l2p_core.decoder import LocalDecoder
from ..l2p_core.files.layout import Layout, Source
from ..l2p_core.files.load import INT8, expected_shapes
from ..l2p_core.files.naming import lora_targets
from ..quant.export import PREFIXES
from . import comfyui, versions
from .comfy_model import (
    L2P,
    PixelNetwork,
    dequantize_in_place,
    layout_of,
    pack,
    published_state_dict,
)

# diffusers' names of layers → core's, apart from the blocks.
LAYERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.modulation",
}
DOUBLE = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
BLOCKS = {
    "transformer_blocks": ("double_blocks", DOUBLE),
    "single_transformer_blocks": ("single_blocks", SINGLE),
}


class Flux2Network(PixelNetwork, comfyui.Flux):
    """Core's transformer, which takes pixels and ends in the local decoder."""

    def __init__(self, l2p_config: BackboneConfig, device=None, dtype=None, operations=None, **_):
        sizes, settings = dict(l2p_config.arguments), l2p_config.row.settings
        factory = {"device": device, "dtype": dtype}
        super().__init__(
            final_layer=False,
            in_channels=3,
            out_channels=3,
            patch_size=l2p_config.patch_size,
            vec_in_dim=None,
            context_in_dim=l2p_config.cap_feat_dim,
            hidden_size=l2p_config.dim,
            mlp_ratio=sizes["mlp_ratio"],
            num_heads=sizes["num_attention_heads"],
            depth=sizes["num_layers"],
            depth_single_blocks=sizes["num_single_layers"],
            axes_dim=list(sizes["axes_dims_rope"]),
            theta=settings["rope_theta"],
            qkv_bias=False,
            guidance_embed=False,
            txt_ids_dims=[3],
            global_modulation=True,
            mlp_silu_act=True,
            ops_bias=False,
            operations=operations,
            **factory,
        )
        self.config = l2p_config
        for name, module in self.named_modules():
            if name.endswith(("query_norm", "key_norm")):
                module.eps = settings["eps"]  # core leaves it to torch
        self.final_layer = NormOut(l2p_config.dim, settings["eps"], operations, **factory)
        self.local_decoder = LocalDecoder(l2p_config, operations, **factory)

    @staticmethod
    def numbers_in_blocks(config: BackboneConfig, tokens: int) -> int:
        """How many numbers an image's largest block holds at once: of a single block the input, q,
        k, v and both halves of the feed-forward, these activated, and rotated queries and keys."""
        ratio = dict(config.arguments)["mlp_ratio"]
        return int((10 + 4 * ratio) * tokens * config.dim)

    def noise_minus_image(
        self,
        image: Tensor,
        timesteps: Tensor,
        prompts: list[Tensor],
        count: int,
        options: dict,
    ) -> Tensor:
        """See `PixelNetwork`. The decoder computes the image's half once for all its prompts."""
        features = self.features(image, timesteps, prompts, options)
        predicted = self.local_decoder(image[: len(image) // count], [*features.chunk(count)])
        return -self.config.row.sign * torch.cat(predicted)

    def features(
        self, image: Tensor, timesteps: Tensor, prompts: list[Tensor], options: dict
    ) -> Tensor:
        """Run the transformer without its decoder: (B, D, h, w).

        Neighbours whose prompts are of one length run together, as in `DiffusersL2P.features`."""
        patch = self.config.patch_size
        grid = image.shape[-2] // patch, image.shape[-1] // patch
        x, ids = self.process_img(image, transformer_options=options)  # (B, N, 3 * p * p)
        tokens, start = [], 0
        for length, members in groupby(prompts, key=len):
            prompt = torch.stack([*members])
            run = slice(start, start + len(prompt))
            prompt_ids = torch.zeros(len(prompt), length, ids.shape[-1], device=ids.device)
            prompt_ids[..., -1] = torch.arange(length, device=ids.device)
            out = self.forward_orig(
                x[run],
                ids[run],
                prompt,
                prompt_ids,
                timesteps[run],
                y=None,
                transformer_options=options,
            )
            tokens.append(out)  # (B, N, D)
            start = run.stop
        return torch.cat(tokens).transpose(1, 2).unflatten(2, grid)


class NormOut(nn.Module):
    """diffusers' `norm_out`, scale before shift, in the place of core's last layer."""

    def __init__(self, dim: int, eps: float, operations, **factory):
        super().__init__()
        self.norm = operations.LayerNorm(dim, elementwise_affine=False, eps=eps, **factory)
        self.modulation = operations.Linear(dim, 2 * dim, bias=False, **factory)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B, N, D) tokens. time: (B, D)."""
        scale, shift = self.modulation(nn.functional.silu(time))[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class L2PFlux2(L2P):
    """ComfyUI's description of the model."""

    unet_config = {"image_model": "l2p-flux2"}
    network = Flux2Network
    sampling_settings = {"multiplier": 1.0, "shift": FLUX2_KLEIN.shift}
    clip_target = comfy.supported_models.Flux2.clip_target

    @staticmethod
    def self_test() -> str | None:
        """See `self_test`."""
        return self_test()

    @staticmethod
    def expected_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a file, read off core's network: diffusers need not be
        installed."""
        network = Flux2Network(config.shallow(), device="meta", operations=nn)
        return expected_shapes(config, diffusers_state_dict(network.state_dict()))

    @classmethod
    def lora_keys(cls, config: BackboneConfig) -> comfyui.LoraKeys:
        """Layers as LoRA files name them → core's key of their weight, with the rows of a part."""
        targets = lora_targets(cls.expected_shapes(config))
        return comfyui.LoraKeys(
            {name: lora_key(weight, config.dim) for name, weight in targets.items()}
        )

    def process_unet_state_dict(self, state_dict: dict) -> dict:
        """Rename the tensors of a file for the network."""
        dequantize_in_place(state_dict, unpackable(layout_of(state_dict)))
        return core_state_dict(published_state_dict(state_dict, layout_of(state_dict)))

    def process_unet_state_dict_for_saving(self, state_dict: dict) -> dict:
        """Rename the network's tensors for a file: diffusers' names again."""
        prefix = PREFIXES["comfyui"]
        return {prefix + name: tensor for name, tensor in diffusers_state_dict(state_dict).items()}


def core_layer(layer: str) -> tuple[str, int | None]:
    """Core's name of a layer of diffusers, and which third of its rows: None for all."""
    stack, _, rest = layer.partition(".")
    if stack not in BLOCKS:
        return LAYERS.get(layer, layer), None
    number, _, part = rest.partition(".")
    core_stack, parts = BLOCKS[stack]
    core = parts.get(part, part)
    together = [each for each, name in parts.items() if name == core]
    third = together.index(part) if len(together) > 1 else None
    return f"{core_stack}.{number}.{core}", third


def diffusers_layers(layer: str) -> list[str]:
    """diffusers' names of one of core's layers; three where it packs q, k and v."""
    stack, _, rest = layer.partition(".")
    for diffusers_stack, (core_stack, parts) in BLOCKS.items():
        if stack == core_stack:
            number, _, core = rest.partition(".")
            names = [part for part, name in parts.items() if name == core]
            return [f"{diffusers_stack}.{number}.{part}" for part in names]
    return [next((name for name, core in LAYERS.items() if core == layer), layer)]


def unpackable(layout: Layout) -> list[Source]:
    """The q, k and v that can't be packed as they are: those of unlike formats, and of formats
    other than INT8, of which ComfyUI has no scale for each row."""
    packed: dict[str, list[Source]] = {}
    for name, source in layout.tensors.items():
        core, third = core_layer(name.removesuffix(".weight"))
        if third is not None:
            packed.setdefault(core, []).append(source)
    return [
        source
        for sources in packed.values()
        for kinds in [{(each.format, each.convrot_groupsize) for each in sources}]
        for source in sources
        if len(kinds) > 1 or source.format != INT8
    ]


def core_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under core's names, q, k and v of double blocks packed."""
    out: dict[str, Tensor] = {}
    packed: dict[str, dict[str, dict[int, Tensor]]] = {}
    for key, tensor in state_dict.items():
        layer, _, suffix = key.rpartition(".")
        core, third = core_layer(layer)
        if third is None:
            out[f"{core}.{suffix}"] = tensor
        else:
            packed.setdefault(core, {}).setdefault(suffix, {})[third] = tensor
    for layer, by_suffix in packed.items():
        parts = {
            suffix: [tensor for _, tensor in sorted(thirds.items())]
            for suffix, thirds in by_suffix.items()
        }
        for suffix, tensors in parts.items():
            out[f"{layer}.{suffix}"] = pack(suffix, tensors, parts["weight"])
    return out


def diffusers_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors under diffusers' names: the inverse of `core_state_dict`."""
    out = {}
    for key, tensor in state_dict.items():
        layer, _, suffix = key.rpartition(".")
        names = diffusers_layers(layer)
        if len(names) == 1:
            parts = [tensor]
        elif suffix == "weight" or suffix == "weight_scale" and tensor.numel() > 1:
            parts = tensor.chunk(len(names))
        else:  # of all rows
            parts = [tensor.clone() for _ in names]
        out |= {f"{name}.{suffix}": part for name, part in zip(names, parts)}
    return out


def lora_key(weight: str, dim: int) -> str | tuple[str, tuple[int, int, int]]:
    """Core's key of a weight; of a packed one with the dimension, the start and the count of its
    rows."""
    core, third = core_layer(weight.removesuffix(".weight"))
    key = f"diffusion_model.{core}.weight"
    return key if third is None else (key, (0, third * dim, dim))


@cache
def self_test() -> str | None:
    """Load a tiny model of random weights through ComfyUI and run one pass.

    Returns None, or the sentence that says why this ComfyUI can't run such models, which is logged
    too."""
    config = BackboneConfig(
        backbone=FLUX2_KLEIN.name,
        patch_size=16,
        dim=16,
        n_layers=2,
        cap_feat_dim=8,
        arguments=(
            ("num_attention_heads", 1),
            ("axes_dims_rope", (4, 4, 4, 4)),
            ("mlp_ratio", 3.0),
            ("num_layers", 1),
            ("num_single_layers", 1),
        ),
        decoder=(Level("1", 4, 4, 4),),
        bottleneck_dim=8,
    )
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        image, prompt, sigma = torch.randn(1, 3, 32, 48), torch.randn(1, 5, 8), torch.tensor([0.5])
        try:
            shapes = L2PFlux2.expected_shapes(config)
            description = L2PFlux2({**L2PFlux2.unet_config, "l2p_config": config})
            description.set_inference_dtype(torch.float32, None)
            model = description.get_model({}, device=torch.device("cpu"))
            model.load_model_weights({name: torch.randn(shape) for name, shape in shapes.items()})
            denoised = model.apply_model(image, sigma, c_crossattn=prompt, transformer_options={})
            if denoised.shape != image.shape or not denoised.isfinite().all():
                raise ValueError("its output is no image")
        except Exception as error:  # whatever a future ComfyUI does differently
            return versions.log_unsupported(error)
    return None
