"""How ComfyUI runs the network of `l2p_core`, and which names its files have there.

ComfyUI's convention: sigma goes from 1 to 0, the model predicts noise - image, and the image being
sampled is a LATENT (B, 3, H, W) in [-1, 1]."""

import math
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_detection
import comfy.supported_models
import comfy.text_encoders.z_image
import torch
from comfy.supported_models_base import ClipTarget
from torch import Tensor

from ..l2p_core.attention import attend_by_parts
from ..l2p_core.config import L2PConfig, Level, PixelConfig
from ..l2p_core.decoder import decoder_bytes
from ..l2p_core.files.header import CheckpointError, Entry
from ..l2p_core.files.layout import (
    FLOATS,
    MAX_MARKER_BYTES,
    Layout,
    Source,
    describe,
    read_marker,
)
from ..l2p_core.files.load import expected_shapes
from ..l2p_core.files.naming import PACKED, layer_name, lora_targets, name_in
from ..l2p_core.files.quantization import FORMATS, dequantize, split_block_scales
from ..l2p_core.model import (
    TOKENS_AT_ONCE,
    Attention,
    Block,
    Hooks,
    L2PTransformer,
    rotation_matrices,
)
from ..l2p_core.text import MAX_TOKENS
from ..quant.export import PREFIXES, marker
from ..quant.stream import TORCH_DTYPES
from . import comfyui, versions

QWEN3_4B_WIDTH = 2560  # the one Qwen3 that ComfyUI builds for Z-Image
QWEN3_TOKENS = 151643  # words of Qwen3's own vocabulary at the least
ROTATED = 10  # times a run of tokens that rotating them in float32 holds beside, counted
MARGIN = 1.1  # for what is small beside: RoPE tables, modulation, float32 inside norms
# float32 images that ComfyUI's samplers hold for each one in a pass, counted: 14 with euler
IMAGES_IN_FLIGHT = 15
NEIGHBOURHOOD = "l2p_neighbourhood"  # of transformer_options: what `Hooks` takes
SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class ComfyHooks(Hooks):
    """One pass inside ComfyUI: its attention, block patches and RoPE options."""

    def __init__(self, image: Tensor, options: dict):
        """image: (B, 3, H, W), padded. options: ComfyUI's transformer_options."""
        rope = options.get("rope_options") or {}
        super().__init__(
            rope_scale=(rope.get("scale_y", 1.0), rope.get("scale_x", 1.0)),
            rope_shift=(rope.get("shift_y", 0.0), rope.get("shift_x", 0.0)),
            neighbourhood=options.get(NEIGHBOURHOOD, 0),
        )
        self.image, self.options = image, options
        self.patches = options.get("patches", {})
        self.prompt: Tensor | None = None  # (B, M, D), after the context refiner
        self.before: Tensor | None = None  # the input of a stack, kept only where a patch reads it

    def run_block(
        self,
        stack: str,
        index: int,
        block: Block,
        x: Tensor,
        rope: Tensor,
        lengths: Tensor | None,
        time: Tensor | None,
    ) -> Tensor:
        """Run a block, and after it the patches that other nodes gave for its stack."""
        patches = self.patches.get(
            {"layers": "double_block", "noise_refiner": "noise_refiner"}.get(stack), ()
        )
        if index == 0:
            self.before = x if patches else None
        if stack == "layers":
            self.options["block_type"], self.options["block_index"] = "double", index
        x = super().run_block(stack, index, block, x, rope, lengths, time)
        if stack == "context_refiner" and self.patches:
            self.prompt = x
        for patch in patches:
            x = self._patched(patch, stack, index, x, rope, time)
        return x

    def _patched(
        self, patch, stack: str, index: int, x: Tensor, rope: Tensor, time: Tensor
    ) -> Tensor:
        """What a patch makes of x. It gets and gives image tokens and prompt tokens apart."""
        image_tokens = x.shape[1] - (self.prompt.shape[1] if stack == "layers" else 0)
        given = {
            "img": x[:, :image_tokens],
            "img_input": self.before[:, :image_tokens],
            "txt": self.prompt if stack == "noise_refiner" else x[:, image_tokens:],
            "pe": rotation_matrices(rope[:, :image_tokens]),
            "vec": time,
            "x": self.image,
            "block_index": index,
            "transformer_options": self.options,
        }
        if stack == "noise_refiner":
            given["block_type"] = stack
        changed = patch(given)
        image = changed.get("img", given["img"])
        if stack == "noise_refiner":
            return image
        return torch.cat([image, changed.get("txt", given["txt"])], dim=1)

    def project(
        self, x: Tensor, layers: tuple[torch.nn.Module, ...]
    ) -> list[Tensor] | tuple[Tensor, ...]:
        """Apply q, k and v, as one product where they are INT8 and lie together."""
        joint = comfyui.joint_int8(x, layers)
        return super().project(x, layers) if joint is None else joint.chunk(len(layers), dim=-1)

    def scaled_norm(self, norm: torch.nn.RMSNorm, x: Tensor, factor: Tensor) -> Tensor:
        """Normalize and scale with the weight where and as ComfyUI computes with it."""
        return comfyui.scaled_norm(norm, x, factor)

    def norm_and_rotate(
        self, attention: Attention, q: Tensor, k: Tensor, rope: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Normalize and rotate by ComfyUI's fused kernel, where it has one."""
        return comfyui.norm_and_rotate(attention, q, k, rope, self.matrices)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """Attention as ComfyUI was started with, or as a node overrides it."""
        attend = partial(comfyui.attend, options=self.options)
        return attend_by_parts(attend, q, k, v, lengths, self.windows)


class PixelNetwork:
    """A network with a local decoder, called as ComfyUI calls its networks."""

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        num_tokens: int | None = None,
        attention_mask: Tensor | None = None,
        transformer_options: dict = {},
        **kwargs,
    ) -> Tensor:
        """Predict noise - image, (B, 3, H, W), inside the wrappers that other nodes put around the
        network.

        x: (B, 3, H, W) of any size. timesteps: (B,) sigma, 1 to 0. context: (B, L, cap_feat_dim)
        prompt embeddings. attention_mask: (B, L), 0 where a prompt shorter than L was padded.
        num_tokens: not used."""
        return comfyui.run_wrapped(
            self._forward,
            self,
            transformer_options,
            x,
            timesteps,
            context,
            num_tokens,
            attention_mask,
            **kwargs,
        )

    def _forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        num_tokens: int | None = None,
        attention_mask: Tensor | None = None,
        transformer_options: dict = {},
        control=None,
        **_,
    ) -> Tensor:
        comfyui.reject_controlnet(transformer_options, control)
        height, width = x.shape[-2:]
        image = comfyui.pad_to_patch_size(x, (self.config.size_multiple,) * 2)
        prompts = list(context.expand(len(image), -1, -1))
        if attention_mask is not None:
            real = attention_mask.bool().expand(len(image), -1)
            prompts = [prompt[mask] for prompt, mask in zip(prompts, real)]
        count = prompts_of_an_image(image, timesteps, transformer_options)
        predicted = self.noise_minus_image(image, timesteps, prompts, count, transformer_options)
        return predicted[..., :height, :width]

    def noise_minus_image(
        self,
        image: Tensor,
        timesteps: Tensor,
        prompts: list[Tensor],
        count: int,
        options: dict,
    ) -> Tensor:
        """Predict noise - image, (B, 3, H, W), of a padded batch.

        prompts: one for each image. count: how often the batch repeats the same images, as
        `prompts_of_an_image` counts."""
        raise NotImplementedError


class L2PNetwork(PixelNetwork, L2PTransformer):
    """The transformer of `l2p_core`, built from ComfyUI's operations."""

    # of the weights, as ComfyUI chose it; the pass itself computes in the image's dtype
    dtype = None

    def __init__(self, l2p_config: L2PConfig, device=None, dtype=None, operations=None, **_):
        super().__init__(l2p_config, operations, device=device, dtype=dtype)
        self.dtype = dtype

    @staticmethod
    def numbers_in_blocks(config: L2PConfig, tokens: int) -> int:
        """How many numbers an image's largest block holds at once: in its attention or its
        feed-forward."""
        attention = 5 * tokens * config.dim  # x, q, k, v and the result
        if comfyui.fused_rotation() is None:  # then queries and keys are rotated in float32
            attention += ROTATED * min(tokens, TOKENS_AT_ONCE) * config.dim
        feed_forward = 3 * tokens * config.dim + 4 * min(tokens, TOKENS_AT_ONCE) * config.ffn_dim
        return max(attention, feed_forward)

    def noise_minus_image(
        self,
        image: Tensor,
        timesteps: Tensor,
        prompts: list[Tensor],
        count: int,
        options: dict,
    ) -> Tensor:
        """See `PixelNetwork`."""
        options["total_blocks"] = len(self.layers)
        image, timesteps = image[: len(image) // count], timesteps[: len(image) // count]
        predicted = self.predict_each(
            image,
            1 - timesteps,
            [
                (prompts[start : start + len(image)], ComfyHooks(image, options))
                for start in range(0, len(prompts), len(image))
            ],
        )
        return -torch.cat(predicted)


def prompts_of_an_image(image: Tensor, timesteps: Tensor, options: dict) -> int:
    """Return for how many prompts a batch repeats the same images, so that what does not depend on
    the prompt is computed once: 2 in a guided step, 1 where nothing is to be shared.

    Nothing is shared where a node has patched blocks or attention, which expects ComfyUI's batch.
    image: (B, 3, H, W), one part of it for each of ComfyUI's `cond_or_uncond`."""
    count = len(options.get("cond_or_uncond", ()))
    patched = ("patches", "patches_replace", "optimized_attention_override")
    if count < 2 or len(image) % count or any(options.get(each) for each in patched):
        return 1
    parts = zip(image.chunk(count), timesteps.chunk(count))
    (first, time), *others = parts
    same = all(torch.equal(first, each) and torch.equal(time, other) for each, other in others)
    return count if same else 1


class PromptCond(comfy.conds.CONDRegular):
    """Prompt embeddings (B, L, cap_feat_dim), or their mask (B, L). Of another length, they are
    padded with zeros where a batch has several: never repeated, as core does for cross attention.
    """

    def can_concat(self, other: "PromptCond") -> bool:
        """Whether a batch can have both."""
        mine, others = self.cond, other.cond
        return mine.shape[2:] == others.shape[2:] and mine.device == others.device

    def concat(self, others: list["PromptCond"]) -> Tensor:
        """Return one batch of all."""
        rows = [row for each in (self, *others) for row in each.cond]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class L2PModel(comfy.model_base.BaseModel):
    """ComfyUI's wrapper of the network: conditioning and memory estimate."""

    # side in pixels of the tiles that an image is refined in; 0 for the whole image at once
    window = 0

    def __init__(self, model_config, model_type=comfy.model_base.ModelType.FLOW, device=None):
        network = model_config.network
        super().__init__(model_config, model_type, device=device, unet_model=network)

    def extra_conds(self, **kwargs) -> dict:
        """Prompt embeddings and their mask, which says what was padded to the length of others.

        A text encoder's own padding counts as prompt where the model was trained with it."""
        if kwargs.get("reference_latents") or kwargs.get("unclip_conditioning"):
            raise ValueError(
                "the conditioning carries reference images, which L2P models were not trained with."
                " Remove the node that adds them, such as ReferenceLatent"
            )
        out = super().extra_conds(**kwargs)
        if (prompts := kwargs.get("cross_attn")) is not None:
            out["c_crossattn"] = PromptCond(prompts)
            mask = kwargs.get("attention_mask")
            if mask is None or self.diffusion_model.config.prompts.pad_to:
                mask = prompts.new_ones(prompts.shape[:2])
            out["attention_mask"] = PromptCond(mask.int())
        return out

    def memory_required(self, input_shape: list[int], cond_shapes: dict = {}) -> float:
        """Bytes beside the weights that a batch of images (B, 3, H, W) takes: a few images, and the
        most that a pass holds at once. That is a block's attention or its feed-forward, or the
        decoder, which tiles large images."""
        config, dtype = self.diffusion_model.config, self.get_dtype_inference()
        batch, channels, *size = input_shape
        height, width = (min(side, self.window or side) for side in size)
        image_tokens = -(-height // config.patch_size) * -(-width // config.patch_size)
        in_blocks = self.diffusion_model.numbers_in_blocks(config, image_tokens + MAX_TOKENS)
        decoder = (
            decoder_bytes(config, height, width, dtype, batch) / dtype.itemsize
            + batch * image_tokens * config.dim
        )
        output = 2 * batch * channels * height * width  # the decoder's, and its negative
        in_pass = max(batch * in_blocks, decoder + output)
        in_flight = IMAGES_IN_FLIGHT * math.prod(input_shape) * torch.float32.itemsize
        return MARGIN * in_pass * dtype.itemsize + in_flight


class L2P(comfy.supported_models.ZImage):
    """ComfyUI's description of the model; the text encoder and the noise schedule are those of
    Z-Image."""

    unet_config = {"image_model": "l2p"}
    network: type[PixelNetwork] = L2PNetwork
    latent_format = comfy.latent_formats.ZImagePixelSpace

    def __init__(self, unet_config: dict):
        super().__init__(unet_config)
        if unet_config.get("quantized"):
            self.quant_config = {"mixed_ops": True}

    @staticmethod
    def self_test() -> str | None:
        """See `self_test`."""
        return self_test()

    @staticmethod
    def expected_shapes(config: PixelConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a file."""
        return expected_shapes(config)

    @classmethod
    def lora_keys(cls, config: PixelConfig) -> comfyui.LoraKeys:
        """Layers as LoRA files name them → ComfyUI's key of their weight."""
        targets = lora_targets(cls.expected_shapes(config))
        return comfyui.LoraKeys(
            {name: f"diffusion_model.{weight}" for name, weight in targets.items()}
        )

    def get_model(self, state_dict: dict, prefix: str = "", device=None) -> L2PModel:
        """Build the model, its weights not loaded yet."""
        return L2PModel(self, device=device)

    def clip_target(self, state_dict: dict = {}):
        """The text encoder in a file of Save Checkpoint: Z-Image's, or one of other sizes, such as
        the bundled model's."""
        prefix = self.text_encoder_key_prefix[0] + "qwen3_4b.transformer."
        own = {
            key.removeprefix(prefix): tensor
            for key, tensor in state_dict.items()
            if key.startswith(prefix)
        }
        norm = own.get("model.norm.weight")
        if norm is None or len(norm) == QWEN3_4B_WIDTH:
            return super().clip_target(state_dict)

        from .load import BUNDLED_MODEL, find_tokenizer, read_prompt, small_qwen3  # it imports this

        folder = find_tokenizer(BUNDLED_MODEL / "text_encoder", None)
        tokenizer, encoder = small_qwen3(own, folder)
        if len(own["model.embed_tokens.weight"]) >= QWEN3_TOKENS:
            tokenizer = comfy.text_encoders.z_image.ZImageTokenizer
        else:
            tokenizer.l2p_read_prompt = staticmethod(read_prompt)  # for L2P Text Encode
        return ClipTarget(tokenizer, encoder)

    def process_unet_state_dict(self, state_dict: dict) -> dict:
        """Rename the tensors of a file for the network."""
        return published_state_dict(state_dict, layout_of(state_dict))

    def process_unet_state_dict_for_saving(self, state_dict: dict) -> dict:
        """Rename the network's tensors for a file that other programs read too."""
        prefix = PREFIXES["comfyui"]
        return {prefix + name: tensor for name, tensor in packed_state_dict(state_dict).items()}

    def process_vae_state_dict(self, state_dict: dict) -> dict:
        """Give Load Checkpoint a VAE that passes pixels on."""
        return state_dict or {"pixel_space_vae": torch.tensor(1.0)}  # core's name for it


@cache
def self_test() -> str | None:
    """Build a tiny model through ComfyUI and compare one pass with the network run alone. Takes
    some milliseconds.

    Returns None, or the sentence that says why this ComfyUI can't run L2P models, which is logged
    too."""
    config = L2PConfig(
        patch_size=16,
        dim=32,
        n_heads=2,
        n_layers=1,
        n_refiner_layers=1,
        ffn_dim=32,
        cap_feat_dim=16,
        t_hidden_dim=32,
        decoder=(Level("1", 4, 4, 4),),
        bottleneck_dim=8,
    )
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        network = L2PTransformer(config).eval()
        image, prompt, sigma = torch.randn(1, 3, 32, 32), torch.randn(1, 5, 16), torch.tensor([0.5])
        try:
            description = L2P({"image_model": "l2p", "l2p_config": config})
            description.set_inference_dtype(torch.float32, None)
            model = description.get_model({}, device=torch.device("cpu"))
            model.load_model_weights(network.state_dict())
            denoised = model.apply_model(image, sigma, c_crossattn=prompt, transformer_options={})
            expected = image + 0.5 * network(image, 1 - sigma, list(prompt))
            difference = float((denoised - expected).abs().max())
            if difference > 1e-4:
                raise ValueError(f"its output differs by {difference:.2g}")
        except Exception as error:  # whatever a future ComfyUI does differently
            return versions.log_unsupported(error)
    return None


def layout_of(
    state_dict: dict[str, Tensor], prefix: str = "", metadata: dict[str, str] | None = None
) -> Layout:
    """The layout of tensors in memory, of those with that key prefix, from a file with that
    metadata."""
    path = Path("the checkpoint")
    entries = {
        key: Entry(
            path,
            key,
            SAFETENSORS_DTYPES.get(tensor.dtype, str(tensor.dtype)),
            tuple(tensor.shape),
            0,
            0,
        )
        for key, tensor in state_dict.items()
        if key.startswith(prefix) and not key.endswith(".comfy_quant")
    }
    quantized = {
        layer_name(key.removesuffix(".weight"))
        for key, entry in entries.items()
        if key.endswith(".weight") and entry.dtype not in FLOATS
    }
    markers = {
        layer_name(key.removesuffix(".comfy_quant")): read_marker(key, marker_bytes(key, tensor))
        for key, tensor in state_dict.items()
        if key.endswith(".comfy_quant")
    }  # core adds some with other prefixes
    markers = {layer: found for layer, found in markers.items() if layer in quantized}
    return describe(path, [path], entries, metadata or {}, markers, {})


def marker_bytes(key: str, tensor: Tensor) -> bytes:
    """The text of a `comfy_quant` tensor. Raises CheckpointError for anything else, such as one
    huge number."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) > MAX_MARKER_BYTES:
        raise CheckpointError(
            f"{key} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected text of at most "
            f"{MAX_MARKER_BYTES} bytes. The file is damaged"
        )
    return tensor.cpu().numpy().tobytes()


def dequantize_in_place(state_dict: dict[str, Tensor], sources: Iterable[Source]) -> None:
    """Turn those that are quantized into bfloat16, for a ComfyUI that can't compute with them.
    Scales and markers are removed."""
    for source in {source.entry.key: source for source in sources if source.format}.values():
        key = source.entry.key
        scale, scale_2 = (
            entry and state_dict.pop(entry.key) for entry in (source.scale, source.scale_2)
        )
        state_dict[key] = dequantize(
            source.format, state_dict[key], scale, scale_2, source.convrot_groupsize, torch.bfloat16
        )
        state_dict.pop(f"{key.removesuffix('.weight')}.comfy_quant", None)


def published_state_dict(state_dict: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The model's tensors under their published names, every quantized layer marked.

    state_dict: by the layout's own keys. Packed q, k and v are split into views, which copies
    nothing."""
    out = {}
    for name, source in layout.tensors.items():
        tensor = state_dict[source.entry.key]
        out[name] = tensor if source.third is None else tensor.chunk(3)[source.third]
        if source.format:
            out[f"{name}_scale"] = scale_of(source, state_dict)
            if source.scale_2:
                out[f"{name}_scale_2"] = state_dict[source.scale_2.key]
            out[f"{name.removesuffix('.weight')}.comfy_quant"] = marker(
                source.format, source.convrot_groupsize
            )
    return out


def scale_of(source: Source, state_dict: dict[str, Tensor]) -> Tensor:
    """The `weight_scale` of one tensor, which may be a third of a packed one."""
    scale = state_dict[source.scale.key]
    if source.third is None or source.scale.count == 1:
        return scale
    if FORMATS[source.format].block:
        return split_block_scales(scale, source.entry.shape[0], 3)[source.third]
    return scale.chunk(3)[source.third]


def packed_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The network's tensors under ComfyUI's names, q, k and v packed, without a key prefix.

    Where some q, k and v can't be packed, being quantized in different ways or with block scales,
    all keep their published names, which every loader here reads."""
    packed, parts = PACKED
    ends = [part.removesuffix("weight") for part in parts]  # .attention.to_q.
    out, groups = {}, {}
    for key, tensor in state_dict.items():
        end = next((end for end in ends if end in key), None)
        if end is None:
            out[name_in("comfyui", key)[0]] = tensor
        else:
            layer, suffix = key.split(end)
            groups.setdefault(layer, {}).setdefault(suffix, []).append(tensor)
    for layer, suffixes in groups.items():
        for suffix, tensors in suffixes.items():
            together = pack(suffix, [tensor.to("cpu") for tensor in tensors], suffixes["weight"])
            if together is None:
                return state_dict
            out[layer + packed.removesuffix("weight") + suffix] = together
    return out


def pack(suffix: str, tensors: list[Tensor], weights: list[Tensor]) -> Tensor | None:
    """The tensors of q, k and v with one suffix as one; None where they can't be packed."""
    if len(tensors) != 3:
        return None
    if suffix == "weight":
        return torch.cat(tensors)
    if suffix == "comfy_quant":
        return tensors[0] if all(torch.equal(tensor, tensors[0]) for tensor in tensors) else None
    if suffix == "weight_scale" and all(
        scale.numel() in (1, len(weight)) for scale, weight in zip(tensors, weights)
    ):
        if all(scale.numel() == 1 and torch.equal(scale, tensors[0]) for scale in tensors):
            return tensors[0]
        return torch.cat(
            [scale.reshape(-1, 1).expand(len(weight), 1) for scale, weight in zip(tensors, weights)]
        )
    return None
