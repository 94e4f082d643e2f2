"""How ComfyUI recognises L2P files, and how it runs our decoder on its own Z-Image backbone.

ComfyUI calls: sigma runs 1 → 0, the model gives noise - picture, pixels in flight are a LATENT (B, 3, H, W) in [-1, 1].
"""
import logging
import math
from functools import partial
from pathlib import Path

import comfy.latent_formats
import comfy.lora
import comfy.model_base
import comfy.model_detection
import comfy.model_management
import comfy.quant_ops
import comfy.supported_models
import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.lumina.model import NextDiT, TimestepEmbedder
from torch import Tensor, nn

from ..l2p_core.checkpoint import check, expected_shapes
from ..l2p_core.config import L2PConfig
from ..l2p_core.decoder import LocalDecoder, decoder_bytes
from ..l2p_core.quantization import FORMATS, dequantize
from ..l2p_core.header import CheckpointError, Entry
from ..l2p_core.layout import FLOATS, MAX_MARKER_BYTES, Layout, describe, find_prefix, layer_name, read_marker
from ..l2p_core.model import NORM_EPS, ROPE_THETA, TOKEN_MULTIPLE, TOKENS_AT_ONCE, by_tokens
from ..l2p_core.text import MAX_TOKENS
from ..quant.export import marker, name_in, packs
from ..quant.lora import names_of
from ..quant.stream import TORCH_DTYPES

LANDMARK = "local_decoder.enc1.0.weight"  # in every L2P model, in no other
INSTALLED = "_l2p_installed"  # set on ComfyUI's own module: a pack may be imported twice
MARGIN = 1.1  # for what is small beside: rotary tables, modulation, float32 inside norms
TOKENS_IN_ATTENTION = 10  # times all tokens that core's attention holds: packed q, k and v, what is turned and copied of them, its input
PICTURES_IN_FLIGHT = 4  # for each that a pass takes, float32: what goes in and comes out, noise, x
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class NextDiTL2P(NextDiT):
    """ComfyUI's Z-Image transformer with the local decoder in place of its last layer."""

    def __init__(self, l2p_config: L2PConfig, device=None, dtype=None, operations=None, **_):
        config = self.l2p_config = l2p_config
        super().__init__(
            patch_size=config.patch_size, in_channels=3, dim=config.dim, n_layers=config.n_layers,
            n_refiner_layers=config.n_refiner_layers, n_heads=config.n_heads, n_kv_heads=config.n_heads,
            multiple_of=config.ffn_dim, ffn_dim_multiplier=config.ffn_dim / config.dim, norm_eps=NORM_EPS, qk_norm=True,
            cap_feat_dim=config.cap_feat_dim, axes_dims=list(config.axes_dims), axes_lens=[1536, 512, 512],
            rope_theta=ROPE_THETA, z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=TOKEN_MULTIPLE,
            device=device, dtype=dtype, operations=operations)
        factory = {"device": device, "dtype": dtype, "operations": operations}
        self.t_embedder = TimestepEmbedder(config.t_hidden_dim, output_size=config.t_dim, **factory)
        for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
            block.attention.q_norm.eps = block.attention.k_norm.eps = NORM_EPS  # core leaves it at float32's epsilon
            block.feed_forward.forward = partial(by_tokens, block.feed_forward.forward)
        self.final_layer = PassOn()
        self.local_decoder = LocalDecoder(config, **factory)

    def _forward(self, x: Tensor, *args, transformer_options: dict = {}, **kwargs) -> Tensor:
        refuse_controlnet(transformer_options)
        height, width = x.shape[-2:]
        x = pad_to_patch_size(x, (self.l2p_config.size_multiple,) * 2)
        return super()._forward(x, *args, transformer_options=transformer_options, **kwargs)[..., :height, :width]

    def patchify_and_embed(self, x: Tensor, *args, **kwargs) -> tuple:
        embedded = list(super().patchify_and_embed(x, *args, **kwargs))
        embedded[2] = x, embedded[2]  # the picture goes with its size to unpatchify
        return tuple(embedded)

    def unpatchify(self, tokens: Tensor, image_and_sizes: tuple[Tensor, list], cap_size: list[int], return_tensor=False) -> Tensor:
        image, _ = image_and_sizes
        h, w = (side // self.patch_size for side in image.shape[-2:])
        features = tokens[:, cap_size[0]:cap_size[0] + h * w].transpose(1, 2).unflatten(2, (h, w))
        return self.local_decoder(image, features)


class PassOn(nn.Module):
    """Hands on its first argument."""

    def forward(self, x: Tensor, *_, **__) -> Tensor:
        return x


class L2PModel(comfy.model_base.Lumina2):
    """Derived from Lumina2, by which ComfyUI knows how LoRAs of Z-Image name their layers."""
    window = 0  # side in pixels of the windows that pictures are drawn in; 0 for the whole at once

    def __init__(self, model_config, model_type=comfy.model_base.ModelType.FLOW, device=None):
        comfy.model_base.BaseModel.__init__(self, model_config, model_type, device=device, unet_model=NextDiTL2P)

    def memory_required(self, input_shape: list[int], cond_shapes: dict = {}) -> float:
        """Bytes beside the weights that a batch of pictures (B, 3, H, W) takes: a few pictures, and of what a pass holds the largest. That
        is a block's attention or its feed-forward, or the decoder, which cuts large pictures into tiles."""
        config, dtype = self.diffusion_model.l2p_config, self.get_dtype_inference()
        batch, channels, *size = input_shape
        height, width = (min(side, self.window or side) for side in size)
        image_tokens = -(-height // config.patch_size) * -(-width // config.patch_size)
        tokens = image_tokens + MAX_TOKENS
        block = max(TOKENS_IN_ATTENTION * tokens * config.dim, 5 * tokens * config.dim + 4 * min(tokens, TOKENS_AT_ONCE) * config.ffn_dim)
        decoder = decoder_bytes(config, height, width, dtype, batch) / dtype.itemsize + batch * image_tokens * config.dim
        in_pass = max(batch * block, decoder + 2 * batch * channels * height * width)  # the decoder's output and its negative
        return MARGIN * in_pass * dtype.itemsize + PICTURES_IN_FLIGHT * math.prod(input_shape) * torch.float32.itemsize


class L2P(comfy.supported_models.ZImage):
    unet_config = {"image_model": "l2p"}
    latent_format = comfy.latent_formats.ZImagePixelSpace

    def __init__(self, unet_config: dict):
        super().__init__(unet_config)
        if unet_config.get("quantized"):
            self.quant_config = {"mixed_ops": True}

    def get_model(self, state_dict: dict, prefix: str = "", device=None) -> L2PModel:
        return L2PModel(self, device=device)

    def process_unet_state_dict(self, state_dict: dict) -> dict:
        return comfyui_state_dict(state_dict, layout_of(state_dict))

    def process_vae_state_dict(self, state_dict: dict) -> dict:
        return state_dict or {"pixel_space_vae": torch.tensor(1.0)}  # core's name for pixels as they are


def install() -> None:
    """Teach ComfyUI's loaders L2P, once, unless it knows L2P itself by now."""
    detection = comfy.model_detection
    if getattr(detection, INSTALLED, False):
        return
    if core_knows_l2p():
        logging.info("ComfyUI-L2P: this ComfyUI loads L2P by itself, so the pack leaves loading to it")
        return
    prefix_from_state_dict, detect, lora_keys = (
        detection.unet_prefix_from_state_dict, detection.detect_unet_config, comfy.lora.model_lora_keys_unet)

    def with_l2p_prefix(state_dict):
        return find_prefix(state_dict) if any(key.endswith(LANDMARK) for key in state_dict) else prefix_from_state_dict(state_dict)

    def with_l2p_config(state_dict, key_prefix, metadata=None):
        return (unet_config(state_dict, key_prefix, metadata) if key_prefix + LANDMARK in state_dict else
                detect(state_dict, key_prefix, metadata=metadata))

    def with_l2p_lora_keys(model, key_map={}):
        key_map = lora_keys(model, key_map)
        return {**l2p_lora_keys(model.diffusion_model.l2p_config), **key_map} if isinstance(model, L2PModel) else key_map

    comfy.supported_models.models.insert(0, L2P)
    detection.unet_prefix_from_state_dict = with_l2p_prefix
    detection.detect_unet_config = with_l2p_config
    comfy.lora.model_lora_keys_unet = with_l2p_lora_keys
    setattr(detection, INSTALLED, True)


def core_knows_l2p() -> bool:
    """Whether ComfyUI tells an L2P model from a latent Z-Image, asked with tensors that weigh nothing."""
    sizes = {}
    for published, size in expected_shapes(L2PConfig(n_layers=1)).items():
        name, place = name_in("comfyui", published)
        sizes[name] = (size[0] * (place + 1), *size[1:])  # q, k and v come one after another, and v is the last
    try:
        known = comfy.model_detection.detect_unet_config({name: torch.empty(size, device="meta") for name, size in sizes.items()}, "")
    except Exception as error:  # in code that is not written yet
        logging.warning(f"ComfyUI-L2P: asked for an L2P model, ComfyUI fails with {error!r}; it is taken not to know them")
        return False
    return known is not None and (known.get("image_model") != "lumina2" or known.get("patch_size") == 16)


def unet_config(state_dict: dict, prefix: str, metadata: dict[str, str] | None) -> dict:
    """What ComfyUI keeps of a model before it is built. Raises CheckpointError, saying why, where it can't be drawn with."""
    layout = layout_of(state_dict, prefix, metadata)
    check(layout)
    config = layout.config
    quantized = layout.quantization is not None
    if quantized and not has_kernels(layout):
        multiply_out(state_dict, layout)
        quantized = False
    return {"image_model": "l2p", "in_channels": 3, "patch_size": config.patch_size, "dim": config.dim,
            "n_layers": config.n_layers, "n_refiner_layers": config.n_refiner_layers, "l2p_config": config,
            "trained_size": layout.trained_size, "quantized": quantized}


def layout_of(state_dict: dict[str, Tensor], prefix: str = "", metadata: dict[str, str] | None = None) -> Layout:
    """The layout of tensors in memory, of those behind `prefix`, from a file with that metadata."""
    path = Path("the checkpoint")
    entries = {key: Entry(path, key, SAFETENSORS_DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, 0)
               for key, tensor in state_dict.items() if key.startswith(prefix) and not key.endswith(".comfy_quant")}
    eight_bits = {layer_name(key.removesuffix(".weight")) for key, entry in entries.items()
                  if key.endswith(".weight") and entry.dtype not in FLOATS}
    markers = {layer_name(key.removesuffix(".comfy_quant")): read_marker(key, marker_bytes(key, tensor))
               for key, tensor in state_dict.items() if key.endswith(".comfy_quant")}  # ComfyUI adds some with another prefix
    return describe(path, [path], entries, metadata or {}, {layer: marker for layer, marker in markers.items() if layer in eight_bits}, {})


def marker_bytes(key: str, tensor: Tensor) -> bytes:
    """The text of a `comfy_quant` tensor. Raises CheckpointError where it is of another kind: one large integer would be taken for
    a length."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) > MAX_MARKER_BYTES:
        raise CheckpointError(f"{key} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected text of at most {MAX_MARKER_BYTES} bytes. "
                              "The file is damaged")
    return tensor.cpu().numpy().tobytes()


def has_kernels(layout: Layout) -> bool:
    """Whether this ComfyUI computes with all formats of the file. INT8, since v0.27, is told by its own layout: packs have registered
    the name before."""
    formats = {source.format for source in layout.tensors.values() if source.format}
    return (hasattr(comfy.quant_ops, "TensorWiseINT8Layout") and getattr(comfy.quant_ops, "_CK_AVAILABLE", True)
            and formats <= set(comfy.quant_ops.QUANT_ALGOS))


def multiply_out(state_dict: dict[str, Tensor], layout: Layout) -> None:
    """Turn quantized tensors into bfloat16 in place, without their scales and markers: for a ComfyUI that lacks their kernels."""
    for source in {source.entry.key: source for source in layout.tensors.values() if source.format}.values():
        key = source.entry.key
        scale, scale_2 = (entry and state_dict.pop(entry.key) for entry in (source.scale, source.scale_2))
        state_dict[key] = dequantize(source.format, state_dict[key], scale, scale_2, source.convrot_groupsize, torch.bfloat16)
        state_dict.pop(f"{key.removesuffix('.weight')}.comfy_quant", None)


def comfyui_state_dict(state_dict: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The model's tensors under ComfyUI's names: q, k and v packed, and every quantized layer marked.

    state_dict: by the layout's own keys. Raises CheckpointError where q, k and v can't be packed."""
    out = {}
    for name, sources in packs(layout.tensors, "comfyui").items():
        out[name] = together([state_dict[key] for key in dict.fromkeys(source.entry.key for source in sources)])
        if sources[0].format is None and len({source.format for source in sources}) == 1:
            continue
        apart = len({source.entry.key for source in sources}) > 1
        if len({(source.format, source.convrot_groupsize) for source in sources}) > 1 or apart and FORMATS[sources[0].format].block:
            raise CheckpointError(f"{name} packs q, k and v, which are quantized each in its own way. Multiply them out first: "
                                  "l2p export --dtype bf16")
        scales = {source.scale.key: state_dict[source.scale.key] for source in sources}
        out[f"{name}_scale"] = together([
            scale if len(scales) == 1 else scale.reshape(-1, 1).expand(sources[0].shape[0], 1) for scale in scales.values()])
        if sources[0].scale_2:
            out[f"{name}_scale_2"] = state_dict[sources[0].scale_2.key]
        out[f"{name.removesuffix('.weight')}.comfy_quant"] = marker(sources[0].format, sources[0].convrot_groupsize)
    return out


def together(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def l2p_lora_keys(config: L2PConfig) -> dict:
    """Layers of the model as LoRA files name them → ComfyUI's key, of q, k and v with their rows in the packed tensor."""
    found = {}
    for weight in [name for name in expected_shapes(config) if name.endswith(".weight")]:
        packed, place = name_in("comfyui", weight)
        key = f"diffusion_model.{packed}"
        target = (key, (0, place * config.dim, config.dim)) if packed.endswith(".qkv.weight") else key
        found |= dict.fromkeys(names_of(weight.removesuffix(".weight")), target)
    return found


def refuse_controlnet(transformer_options: dict) -> None:
    """Raise ValueError for Z-Image's ControlNets, which read latents of 16 channels and patches of 2."""
    for patches in transformer_options.get("patches", {}).values():
        if any(type(patch).__name__ == "ZImageControlPatch" for patch in patches):
            raise ValueError("a Z-Image ControlNet is connected, which reads latents of 16 channels; an L2P model draws "
                             "pixels and can't follow it. Take the ControlNet out, or draw with Z-Image itself")
