"""Files to MODEL and CLIP."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.text_encoders.flux
import comfy.text_encoders.z_image
import comfy.utils
import folder_paths
import torch
from comfy import sd1_clip
from comfy.supported_models_base import ClipTarget
from comfy_api.latest import io
from transformers import Qwen2Tokenizer

from ..l2p_core.backbones import FLUX2_KLEIN
from ..l2p_core.config import Z_IMAGE_PROMPTS, PromptFormat
from ..l2p_core.files.content import identify_file, left_by_system
from ..l2p_core.files.header import SHARD_NAME, CheckpointError, find_files, reject_zeros
from ..l2p_core.files.layout import Layout, read_layout
from ..l2p_core.files.quantization import BESIDE_WEIGHTS, dequantize_all
from ..l2p_core.pipeline import BUNDLED_MODEL
from ..l2p_core.shapes.parse import read_prompt
from ..l2p_core.text import check_layers, padding_id, qwen3_sizes
from ..l2p_core.tokenizer import find_tokenizer, load_tokenizer
from . import comfyui, versions
from .comfy_model import QWEN3_4B_WIDTH, published_state_dict
from .detection import check_whole
from .prompt import note

BUNDLED = "L2P shapes (bundled small model)"
# What an L2P model is made from → how it takes prompts, and ComfyUI's type of text encoder for it.
LATENT_MODELS = {
    "Z-Image": (Z_IMAGE_PROMPTS, comfy.sd.CLIPType.LUMINA2),
    FLUX2_KLEIN.title: (FLUX2_KLEIN.prompts, comfy.sd.CLIPType.FLUX2),
}
Z_IMAGE = next(iter(LATENT_MODELS))
DTYPES = {
    "automatic": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


class L2PCheckpointLoader(io.ComfyNode):
    """A checkpoint file → MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PCheckpointLoader",
            display_name="Load L2P Checkpoint",
            category="L2P",
            description=(
                "Loads an L2P model of any kind: merged, INT8, shards, 1K to 10K, with any tensor"
                " names."
            ),
            search_aliases=["latent to pixel", "pixel space", "z-image l2p", "load model", "int8"],
            inputs=[
                bundled_or(
                    "checkpoint",
                    tooltip=(
                        "A file in models/checkpoints or models/diffusion_models. For a sharded"
                        " model, choose any shard."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(DTYPES),
                    default="automatic",
                    advanced=True,
                    tooltip=(
                        "The dtype of the weights in memory. automatic: the fastest one on this"
                        " device. INT8 and FP8 files keep their 8-bit weights with every choice."
                    ),
                ),
                io.Combo.Input(
                    "convrot",
                    options=["as marked", "4", "16", "64", "256", "1024"],
                    default="as marked",
                    advanced=True,
                    tooltip=(
                        "Group size of rotated INT8 weights, for a file without a marker for the"
                        " rotation."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, **_) -> list:
        return stamps(model_paths(checkpoint))

    @classmethod
    def execute(
        cls, checkpoint: str, weight_dtype: str = "automatic", convrot: str = "as marked"
    ) -> io.NodeOutput:
        arguments = (
            model_paths(checkpoint),
            DTYPES[weight_dtype],
            int(convrot) if convrot.isdecimal() else None,
        )
        model = load_model(*arguments)
        model.cached_patcher_init = (
            load_model,
            arguments,
        )  # ComfyUI loads the model again for a second GPU
        note(cls, note_on_settings(settings_of(read_layout(arguments[0]))))
        return io.NodeOutput(model)


class L2PTextEncoderLoader(io.ComfyNode):
    """A text encoder → CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PTextEncoderLoader",
            display_name="Load Z-Image Text Encoder",
            category="L2P",
            description=(
                "Loads Qwen3-4B, the text encoder of Z-Image, FLUX.2-klein and L2P:"
                " qwen_3_4b.safetensors, or the text_encoder folder from Hugging Face."
            ),
            search_aliases=["qwen3", "clip", "load clip", "prompt encoder"],
            inputs=[
                bundled_or(
                    "text_encoder",
                    tooltip=(
                        "A file or Hugging Face folder in models/text_encoders. The bundled text"
                        " encoder works only with the bundled small model."
                    ),
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    advanced=True,
                    tooltip=(
                        "cpu keeps the text encoder out of GPU memory; a prompt then takes some"
                        " seconds."
                    ),
                ),
                io.Combo.Input(
                    "latent_model",
                    options=list(LATENT_MODELS),
                    default=Z_IMAGE,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "The latent model that the L2P model was made from. It decides the prompt"
                        " template and the hidden states. All published L2P models are made from"
                        " Z-Image."
                    ),
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, text_encoder: str, **_) -> list:
        return stamps(find_files(text_encoder_path(text_encoder))[0])

    @classmethod
    def execute(
        cls, text_encoder: str, device: str = "default", latent_model: str = Z_IMAGE
    ) -> io.NodeOutput:
        cpu = torch.device("cpu")
        options = {"load_device": cpu, "offload_device": cpu} if device == "cpu" else {}
        path = text_encoder_path(text_encoder)
        clip = load_text_encoder(path, options, latent_model)
        arguments = (path, options, latent_model)
        clip.patcher.cached_patcher_init = (text_encoder_patcher, arguments)
        if text_encoder == BUNDLED:
            clip.l2p_read_prompt = read_prompt  # for L2P Text Encode
        return io.NodeOutput(clip)


def settings_of(layout: Layout) -> dict[str, str | int | float]:
    """What to generate with where the inputs of the nodes begin with other values: the settings
    that a checkpoint names, a distilled one, and those of another latent model than Z-Image."""
    if layout.backbone is None:
        return layout.default_settings
    config = layout.config
    steps, guidance = config.steps_and_guidance
    of_model = {
        "num_inference_steps": steps,
        "cfg_scale": guidance,
        "shift": round(config.shift, 2),
    }
    return {**of_model, **layout.default_settings}


def note_on_settings(settings: Mapping[str, str | int | float]) -> str | None:
    """What to set in the sampler."""
    names = {"num_inference_steps": "steps", "cfg_scale": "cfg", "sampler": "sampler_name"}
    told = ", ".join(f"{names.get(name, name)} {value}" for name, value in settings.items())
    return f"This checkpoint is made for {told}. Set them in the sampler" if told else None


def bundled_or(name: str, *, tooltip: str) -> io.Combo.Input:
    """The input `checkpoint` or `text_encoder`: a choice of the bundled one and of ComfyUI's
    files."""
    listed = {"checkpoint": model_files, "text_encoder": text_encoders}[name]
    return io.Combo.Input(name, options=[BUNDLED, *listed()], tooltip=tooltip)


def model_files() -> list[str]:
    """Model files, of whatever folder ComfyUI keeps them in, each once."""
    names = [
        name
        for folder in ("checkpoints", "diffusion_models")
        for name in folder_paths.get_filename_list(folder)
        if name.endswith(".safetensors") and not left_by_system(Path(name))
    ]
    return list(dict.fromkeys(names))


def model_paths(name: str) -> list[Path]:
    """The model or LoRA of that name, or all shards of the model it is one of."""
    if name == BUNDLED:
        return [BUNDLED_MODEL / "transformer.safetensors"]
    found = (
        folder_paths.get_full_path(folder, name)
        for folder in ("diffusion_models", "checkpoints", "loras")
    )
    path = Path(
        next(filter(None, found), None)
        or folder_paths.get_full_path_or_raise("diffusion_models", name)
    )
    if not SHARD_NAME.search(path.name):
        return [path]
    stem = path.name[: -len("-00001-of-00001.safetensors")]
    return sorted(
        path.parent.glob(f"{glob.escape(stem)}-{'[0-9]' * 5}-of-{path.name.rpartition('-')[2]}")
    )


def model_path(name: str) -> Path:
    """The model of that name as the library takes it: its file, or the index of its shards, or the
    folder of shards that have none."""
    first, *others = model_paths(name)
    if not others:
        return first
    index = first.with_name(f"{first.name.rpartition('-of-')[0][:-6]}.safetensors.index.json")
    return index if index.is_file() else first.parent


def stamps(files: list[Path]) -> list[tuple]:
    """What ComfyUI tells changed files by, so that they are read again."""
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]


def load_model(
    paths: list[Path],
    dtype: torch.dtype | None,
    convrot_groupsize: int | None,
    disable_dynamic: bool = False,
):
    """A MODEL of these files. Raises CheckpointError, saying what they are, where they hold no
    whole L2P model."""
    layout = read_layout(paths, convrot_groupsize)
    check_whole(layout)
    state_dict = {}
    for file in layout.files:
        state_dict |= comfy.utils.load_torch_file(str(file))
    model = comfy.sd.load_diffusion_model_state_dict(
        published_state_dict(state_dict, layout),
        {"dtype": dtype} if dtype else {},
        metadata=layout.metadata,
        disable_dynamic=disable_dynamic,
    )
    if model is None:
        raise CheckpointError(
            f"ComfyUI v{versions.VERSION} did not recognise {layout.path.name} as an L2P model,"
            " though it is one. Another node pack may have replaced ComfyUI's model detection;"
            f" this pack was tested with {versions.TESTED}. Try again with the other packs disabled"
        )
    return model


def text_encoders() -> list[str]:
    """Files, and Hugging Face folders of a Qwen3 or of a whole Z-Image, in ComfyUI's folders of
    text encoders."""
    folders = {
        str(folder.relative_to(root))
        for root in map(Path, folder_paths.get_folder_paths("text_encoders"))
        for config in (*root.glob("*/config.json"), *root.glob("*/text_encoder/config.json"))
        for folder in [config.parent]
    }
    files = [
        name
        for name in folder_paths.get_filename_list("text_encoders")
        if name.endswith(".safetensors") and not left_by_system(Path(name))
    ]
    return [*(name for name in files if str(Path(name).parent) not in folders), *sorted(folders)]


def text_encoder_path(name: str) -> Path:
    """Where that text encoder is. Raises CheckpointError where it no longer exists."""
    if name == BUNDLED:
        return BUNDLED_MODEL / "text_encoder"
    listed = text_encoders()  # a name that a link brings is not one of these by itself
    for root in folder_paths.get_folder_paths("text_encoders"):
        if name in listed and (path := Path(root) / name).exists():
            return path
    raise CheckpointError(
        f"the text encoder {name} is no longer in models/text_encoders. Press R to list what is"
        " there"
    )


def tokenizer_for(encoder: Path) -> Path:
    """The tokenizer's folder: that of the text encoder, or ComfyUI's own for Qwen3-4B in a file."""
    try:
        return find_tokenizer(encoder, None)
    except CheckpointError:
        return comfyui.QWEN_TOKENIZER


def load_text_encoder(
    path: Path, options: dict, latent_model: str, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """A CLIP of a Qwen3 text encoder. options: ComfyUI's, such as load_device. latent_model: one
    of LATENT_MODELS. Raises CheckpointError."""
    prompts, clip_type = LATENT_MODELS[latent_model]
    files = find_files(path)[0]
    kept, metadata = {}, {}
    for file in files:
        if found := identify_file(file):
            raise CheckpointError(f"{file.name} is {found.name}. {found.advice}")
        reject_zeros(file)
        tensors, its = comfy.utils.load_torch_file(str(file), safe_load=True, return_metadata=True)
        kept |= tensors
        metadata |= its or {}
    norm = kept.get("model.norm.weight", kept.get("norm.weight"))
    is_4b = norm is not None and len(norm) == QWEN3_4B_WIDTH
    if is_4b:
        state_dict = comfy.utils.convert_old_quants(kept, metadata=metadata)[0]
    else:
        state_dict = without_scales(kept, path)
    embeddings = folder_paths.get_folder_paths("embeddings")
    names = {
        key if key.startswith(("model.", "lm_head.")) else f"model.{key}": key for key in state_dict
    }
    if "model.layers.0.self_attn.q_norm.weight" not in names:
        raise CheckpointError(
            f"{path.name} is no Qwen3 text encoder: it lacks q_norm. Give qwen_3_4b.safetensors, or"
            " the text_encoder/ folder of Tongyi-MAI/Z-Image-Turbo"
        )
    state_dict = {name: state_dict[key] for name, key in names.items()}
    if is_4b:
        return comfy.sd.load_text_encoder_state_dicts(
            [state_dict], embeddings, clip_type, options, disable_dynamic
        )
    target = ClipTarget(*small_qwen3(state_dict, find_tokenizer(path, None), prompts))
    count = sum(tensor.numel() for tensor in state_dict.values())
    return comfy.sd.CLIP(
        target,
        embeddings,
        parameters=count,
        state_dict=[state_dict],
        model_options=options,
        disable_dynamic=disable_dynamic,
    )


def without_scales(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an encoder of another width than ComfyUI's own, FP8 weights times their
    scales. Raises CheckpointError for other quantizations."""
    if not any(key.endswith(BESIDE_WEIGHTS) for key in tensors):
        return tensors
    try:
        return dequantize_all(tensors, torch.bfloat16)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path.name} is quantized in a way that is not supported here ({error}). Give its BF16"
            " version"
        ) from None


def text_encoder_patcher(
    path: Path, options: dict, latent_model: str, disable_dynamic: bool = False
):
    """What ComfyUI loads again, for a second GPU or without dynamic memory."""
    return load_text_encoder(path, options, latent_model, disable_dynamic).patcher


def small_qwen3(
    state_dict: dict[str, torch.Tensor],
    tokenizer_folder: Path,
    prompts: PromptFormat = Z_IMAGE_PROMPTS,
) -> tuple[type, type]:
    """ComfyUI's classes of tokenizer and text encoder for a Qwen3 of other sizes than 4B. Raises
    CheckpointError."""
    sizes = qwen3_sizes(
        {key.removeprefix("model."): tuple(tensor.shape) for key, tensor in state_dict.items()}
    )
    head_dim = sizes.pop("head_dim")
    check_layers(sizes["num_hidden_layers"], prompts)
    layers: dict = {"layer": "hidden", "layer_idx": prompts.hidden_states[0]}
    padding, base = -1, sd1_clip.SD1ClipModel
    if len(prompts.hidden_states) > 1:
        layers = {"layer": list(prompts.hidden_states), "layer_idx": None}
        base = comfy.text_encoders.flux.Flux2TEModel  # joins the three along the width
    if prompts.pad_to:
        padding = padding_id(load_tokenizer(tokenizer_folder), sizes["vocab_size"])

    class Qwen3(comfyui.Qwen3):
        def __init__(self, _, dtype, device, operations):
            torch.nn.Module.__init__(self)
            config = comfyui.Qwen3Config(**sizes)
            config.head_dim = head_dim
            self.num_layers, self.dtype = config.num_hidden_layers, dtype
            self.model = comfyui.Llama(config, device=device, dtype=dtype, ops=operations)

    class Encoder(sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):
            super().__init__(
                device,
                **layers,
                textmodel_json_config={},
                dtype=dtype,
                model_class=Qwen3,
                special_tokens={"pad": padding},
                layer_norm_hidden_state=False,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options,
            )

    class EncoderModel(base):
        def __init__(self, device="cpu", dtype=None, model_options={}):
            super().__init__(
                device=device,
                dtype=dtype,
                model_options=model_options,
                name="qwen3_4b",
                clip_model=Encoder,
            )

    class Words(sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}):
            super().__init__(
                str(tokenizer_folder),
                99999999,
                False,
                embedding_directory,
                sizes["hidden_size"],
                "qwen3_4b",
                Qwen2Tokenizer,
                False,
                False,
                False,
                max(prompts.pad_to, 1),
                max(padding, 0),
                tokenizer_data=tokenizer_data,
            )

    class Tokenizer(comfy.text_encoders.z_image.ZImageTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}):
            sd1_clip.SD1Tokenizer.__init__(
                self, embedding_directory, tokenizer_data, name="qwen3_4b", tokenizer=Words
            )
            self.llama_template = prompts.template.replace("{prompt}", "{}")

    return Tokenizer, EncoderModel


NODES = [L2PCheckpointLoader, L2PTextEncoderLoader]
