"""Everything private that this pack uses of ComfyUI, in one place.

Private is what ComfyUI may change between two releases without notice. Each entry says why the pack
needs it. What is documented for node packs (`comfy_api`, `folder_paths`, `comfy.samplers`,
`ModelPatcher`) is used where it is needed."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import comfy.cli_args
import comfy.ldm.common_dit
import comfy.ldm.flux.model
import comfy.lora
import comfy.model_detection
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import comfy.samplers
import comfy.supported_models
import comfy.text_encoders.llama
import latent_preview
import torch
from comfy.ldm.modules import attention
from server import PromptServer
from torch import Tensor

from ..l2p_core import model as network
from ..l2p_core.files.lora import split_packed_lora
from ..l2p_core.files.quantization import int8_linear_on_cpu
from ..l2p_core.model import NORM_EPS, Attention

INSTALLED = "_l2p_installed"  # set on ComfyUI's own module: a pack may be imported twice
INT8_LAYOUT = "TensorWiseINT8Layout"
AREA_UNIT = 8  # pixels that Conditioning (Set Area) takes to be one element of any latent

# The vocabulary of Qwen's models, which lies beside ComfyUI's text encoders.
QWEN_TOKENIZER = Path(comfy.text_encoders.llama.__file__).parent / "qwen25_tokenizer"

pad_to_patch_size = comfy.ldm.common_dit.pad_to_patch_size  # as for its other transformers

# The transformer of FLUX.2, which `flux2` runs with the local decoder. Its layers' names and its
# methods `process_img` and `forward_orig` are relied on.
Flux = comfy.ldm.flux.model.Flux

# The text encoder of the bundled model: ComfyUI builds Qwen3 in the sizes it knows, from these two.
Llama, Qwen3, Qwen3Config = (
    comfy.text_encoders.llama.Llama2_,
    comfy.text_encoders.llama.Qwen3_4B,
    comfy.text_encoders.llama.Qwen3_4BConfig,
)


class LoraKeys(dict):
    """Layers as LoRA files name them → the model's weights; of an L2P model, whose q, k and v are
    not packed."""


def install(
    model_classes: Iterable[type],
    find_prefix: Callable,
    detect: Callable,
    lora_keys: Callable,
    area_unit: Callable,
) -> None:
    """Make ComfyUI's loaders and LoRA nodes recognise L2P models, and its samplers their areas.

    There is no public way to add a model class. Core looks these five functions up on their modules
    at each call, so they are wrapped there; for every other model they do what they did.

    model_classes: core's descriptions of the models. find_prefix: state dict → key prefix, or None
    where it is no L2P model. detect: state dict, key prefix, metadata → `unet_config`, or None.
    lora_keys: model → `LoraKeys`, or None. area_unit: model → how many elements of its latent the
    unit of Conditioning (Set Area) is, which core takes to be 1."""
    detection = comfy.model_detection
    if getattr(detection, INSTALLED, False):
        return
    core_prefix, core_detect = detection.unet_prefix_from_state_dict, detection.detect_unet_config
    core_keys, core_load = comfy.lora.model_lora_keys_unet, comfy.lora.load_lora
    core_conds = comfy.samplers.process_conds

    def unet_prefix_from_state_dict(state_dict):
        prefix = find_prefix(state_dict)
        return core_prefix(state_dict) if prefix is None else prefix

    def detect_unet_config(state_dict, key_prefix, metadata=None):
        found = detect(state_dict, key_prefix, metadata)
        return core_detect(state_dict, key_prefix, metadata=metadata) if found is None else found

    def model_lora_keys_unet(model, key_map={}):
        keys = core_keys(model, key_map)
        ours = lora_keys(model)
        return keys if ours is None else LoraKeys({**ours, **keys})

    def process_conds(model, noise, conds, *args, **options):
        unit = area_unit(model)
        if unit != 1:
            conds = {kind: [scaled_area(each, unit) for each in conds[kind]] for kind in conds}
        return core_conds(model, noise, conds, *args, **options)

    def load_lora(lora, to_load, *args, **options):
        lora = split_packed_lora(lora) if isinstance(to_load, LoraKeys) else lora
        return core_load(lora, to_load, *args, **options)

    comfy.supported_models.models[:0] = model_classes
    detection.unet_prefix_from_state_dict = unet_prefix_from_state_dict
    detection.detect_unet_config = detect_unet_config
    comfy.lora.model_lora_keys_unet = model_lora_keys_unet
    comfy.lora.load_lora = load_lora
    comfy.samplers.process_conds = process_conds
    setattr(detection, INSTALLED, True)


def scaled_area(condition: dict, unit: int) -> dict:
    """A condition inside a sampler, its area, which was in units, in pixels."""
    area = condition.get("area")
    if area is None or area[0] == "percentage":
        return condition
    return {**condition, "area": tuple(unit * length for length in area)}


def wants_preview() -> bool:
    """Whether images are shown as they are generated: unless the user chose the preview method
    none, in the page's settings or on the command line.

    None is also ComfyUI's default, so that what it holds now does not say whether it was chosen.
    The page's choice comes with the prompt that runs, and no node is given that."""
    server = getattr(PromptServer, "instance", None)  # none where ComfyUI is used as a library
    running = server.prompt_queue.get_current_queue_volatile()[0] if server else []
    chosen = next((entry[3].get("preview_method") for entry in running), None)
    if chosen in (None, "default"):
        on_command_line = any(each.startswith("--preview-method") for each in sys.argv)
        none = latent_preview.LatentPreviewMethod.NoPreviews
        return not (on_command_line and comfy.cli_args.args.preview_method == none)
    return chosen != "none"


def has_kernels(formats: set[str]) -> bool:
    """Whether this ComfyUI computes with all these formats.

    INT8, which it has since v0.27, is told by its own layout: other packs registered the name
    before."""
    available = getattr(comfy.quant_ops, "_CK_AVAILABLE", True)
    return (
        available
        and hasattr(comfy.quant_ops, INT8_LAYOUT)
        and formats <= set(comfy.quant_ops.QUANT_ALGOS)
    )


def attend(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    """Attention over (B, heads, S, head) → (B, S, D) by the function that the user chose, overrides
    included."""
    return attention.optimized_attention_masked(
        q, k, v, q.shape[1], None, skip_reshape=True, transformer_options=options
    )


def fused_rotation() -> Callable | None:
    """comfy-kitchen's kernel that normalizes and rotates queries and keys; None before v0.29."""
    return getattr(getattr(comfy.quant_ops, "ck", None), "rms_rope", None)


def norm_and_rotate(
    layer: Attention, q: Tensor, k: Tensor, rope: Tensor, matrices: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`Hooks.norm_and_rotate` by comfy-kitchen's fused kernel, which ComfyUI has since v0.29 and
    uses for Z-Image. matrices: `Hooks.matrices`."""
    fused = fused_rotation()
    if fused is None or q.requires_grad:
        return network.norm_and_rotate(layer, q, k, rope)
    q_weight, _, q_stream = comfy.ops.cast_bias_weight(layer.norm_q, q, offloadable=True)
    k_weight, _, k_stream = comfy.ops.cast_bias_weight(layer.norm_k, k, offloadable=True)
    q, k = fused(q, k, matrices(rope), q_weight, k_weight, NORM_EPS)
    comfy.ops.uncast_bias_weight(layer.norm_q, q_weight, None, q_stream)
    comfy.ops.uncast_bias_weight(layer.norm_k, k_weight, None, k_stream)
    return q, k


def scaled_norm(norm: torch.nn.RMSNorm, x: Tensor, factor: Tensor) -> Tensor:
    """`Hooks.scaled_norm` with the weight where and as ComfyUI computes with it."""
    weight, _, stream = comfy.ops.cast_bias_weight(norm, x, offloadable=True)
    out = network.scaled_norm(x, weight, factor)
    comfy.ops.uncast_bias_weight(norm, weight, None, stream)
    return out


def joint_int8(x: Tensor, layers: tuple[torch.nn.Module, ...]) -> Tensor | None:
    """Apply INT8 linears whose weights lie one after another in memory as one, so that the input is
    quantized once.

    That is how packed q, k and v lie on a CPU, where quantizing takes a noticeable share of the
    time. Returns (..., all rows), or None where the layers have to run one by one."""
    weights = [getattr(layer, "weight", None) for layer in layers]
    if x.device.type != "cpu" or any(
        getattr(weight, "_layout_cls", None) != INT8_LAYOUT for weight in weights
    ):
        return None
    if any(layer.weight_function or layer.bias_function for layer in layers):
        return None
    parts, params = [weight._qdata for weight in weights], [weight._params for weight in weights]
    first = parts[0]
    adjacent = all(
        part.is_contiguous()
        and part.shape == first.shape
        and part.data_ptr() == first.data_ptr() + place * first.nbytes
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for place, part in enumerate(parts)
    )
    rotations = {(each.convrot, each.convrot_groupsize) for each in params}
    if not adjacent or len(rotations) > 1:
        return None
    rows, inputs = first.shape
    weight = first.as_strided((len(parts) * rows, inputs), (inputs, 1))
    scale = torch.cat([each.scale.reshape(-1).expand(rows) for each in params])
    ((convrot, groupsize),) = rotations
    return int8_linear_on_cpu(x, weight, scale, None, groupsize if convrot else 0)


def run_wrapped(
    forward: Callable, network: torch.nn.Module, options: dict, *args, **kwargs
) -> Tensor:
    """Run `forward` inside the DIFFUSION_MODEL wrappers that nodes such as EasyCache put around
    it."""
    wrappers = comfy.patcher_extension.get_all_wrappers(
        comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
    )
    if wrappers:
        image, *args = args
        args = (
            image.clone(),
            *args,
        )  # EasyCache adds to it in place, and in float32 it is the sampler's own tensor
    executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(
        forward, network, wrappers
    )
    return executor.execute(*args, transformer_options=options, **kwargs)


def reject_controlnet(options: dict, control: object) -> None:
    """Raise ValueError for ControlNets: those of Z-Image read latents of 16 channels, others a
    UNet's blocks."""
    patches = (patch for listed in options.get("patches", {}).values() for patch in listed)
    if any(type(patch).__name__ == "ZImageControlPatch" for patch in patches):
        raise ValueError(
            "a Z-Image ControlNet is connected, which reads latents of 16 channels, but an L2P"
            " model generates pixels. Remove the ControlNet, or use Z-Image itself"
        )
    if control is not None:
        raise ValueError(
            "a ControlNet is connected, and there is none for L2P models yet. Remove it"
        )
