"""The shipped workflows, and variants of them that the bundled small model draws in seconds."""

import copy
import io
import json
import re
from pathlib import Path

import torch
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS, L2PConfig
from comfyui_l2p.l2p_core.model import L2PTransformer
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from PIL import Image
from safetensors.torch import load_file, save_file

WORKFLOWS = Path(__file__).parents[1] / "workflows"
# API form → title: the name of the canvas form, under which the template browser shows it.
TITLES = {
    "demo": "01 Demo, nothing to download",
    "text_to_image": "02 Text to image",
    "image_to_image": "03 Image to image",
    "inpaint": "04 Inpaint",
    "lora": "05 LoRA",
    "batch_of_prompts": "06 Batch of prompts",
    "upscale_to_4k": "07 Upscale to 4K",
    "4k_checkpoint": "08 4K checkpoint",
    "int8": "09 INT8 model",
    "small_cards": "10 Small cards",
    "latent_draft": "11 Latent draft, pixel finish",
    "core_nodes": "12 Core nodes",
    "train_lora": "13 Train a LoRA",
    "training_images": "14 Training images",
}
NAMES = list(TITLES)
CHINESE = "### 中文"  # the heading of a note's Chinese part
BUNDLED = "L2P shapes (bundled small model)"
SMALL, TINY_4K, LORA, INPUT_IMAGE = (
    "l2p_shapes.safetensors",
    "tiny_4k.safetensors",
    "shapes_lora.safetensors",
    "shapes_input.png",
)
HUB = "https://huggingface.co"
# The weights that workflows name: where ComfyUI's page downloads each, and into which folder.
DOWNLOADS = {
    "model-1k-merge.safetensors": (
        f"{HUB}/zhen-nan/L2P/resolve/main/model-1k-merge.safetensors",
        "diffusion_models",
    ),
    "model-1k-merge-INT8.safetensors": (
        f"{HUB}/Abiray/L2P-model-1k-merge-INT8/resolve/main/model-1k-merge-INT8.safetensors",
        "diffusion_models",
    ),
    "l2p_4k_sft.safetensors": (
        f"{HUB}/HaojunChen/PixVerve-L2P/resolve/main/l2p_4k_sft.safetensors",
        "diffusion_models",
    ),
    **{
        name: (f"{HUB}/Comfy-Org/z_image_turbo/resolve/main/split_files/{folder}/{name}", folder)
        for name, folder in (
            ("qwen_3_4b.safetensors", "text_encoders"),
            ("qwen_3_4b_fp8_mixed.safetensors", "text_encoders"),
            ("z_image_turbo_bf16.safetensors", "diffusion_models"),
            ("ae.safetensors", "vae"),
        )
    },
}
SIDES = {1024: 96, 2048: 192, 4096: 384}
PROMPT = "a large red circle on a blue background, left"


def api(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def canvas(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{TITLES[name]}.json").read_text(encoding="utf-8"))


def notes() -> dict[str, list[str]]:
    """What the notes on each canvas say, English and Chinese: its section in
    workflows/README.md."""
    page = (WORKFLOWS / "README.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    texts = dict(zip(sections[::2], sections[1::2]))
    return {
        name: [part.strip() for part in texts[title].split(CHINESE)]
        for name, title in TITLES.items()
    }


def add_downloads(graph: dict) -> None:
    """Tell the page, in a canvas form, where each file that a loader names is downloaded."""
    for node in graph["nodes"]:
        named = [value for value in node.get("widgets_values", ()) if value in DOWNLOADS]
        if named:
            node["properties"]["models"] = [
                {"name": name, "url": DOWNLOADS[name][0], "directory": DOWNLOADS[name][1]}
                for name in named
            ]


def write_models(models: Path, patch_64: bool = True) -> None:
    """Put what `small` names where a server looks for it. A model of patch 64 has random weights:
    none is bundled."""
    small = load_file(BUNDLED_MODEL / "transformer.safetensors")
    save_file(small, models / "diffusion_models" / SMALL)
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name in [
        name
        for name in small
        if name.startswith("layers.") and name.endswith((".to_q.weight", ".w1.weight"))
    ]:
        rows, columns = small[name].shape
        layer = f"diffusion_model.{name.removesuffix('.weight')}"
        lora[f"{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
        lora[f"{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.5
    save_file(lora, models / "loras" / LORA)
    if patch_64:
        torch.manual_seed(0)
        width = small["cap_embedder.0.weight"].shape[0]
        narrow = tuple(
            stage._replace(enc=min(stage.enc, 8), up=8, dec=8) for stage in PUBLISHED_DECODERS[64]
        )
        config = L2PConfig(
            patch_size=64,
            dim=96,
            n_heads=3,
            n_layers=2,
            n_refiner_layers=1,
            ffn_dim=128,
            cap_feat_dim=width,
            decoder=narrow,
            bottleneck_dim=16,
        )
        save_file(L2PTransformer(config).state_dict(), models / "checkpoints" / TINY_4K)


def input_image(image: Image.Image) -> bytes:
    """An image as PNG, its right half see-through: what Load Image gives as mask."""
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (image.width // 2, 0, *image.size))
    image = image.convert("RGB")
    image.putalpha(alpha)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def small(
    name: str | dict, steps: int = 2, prompt: str = PROMPT, model_4k: str = TINY_4K, **inputs
) -> dict:
    """That workflow with the small model, its sizes, so many steps and that prompt.

    name: or a graph in API form. inputs: more of the samplers' inputs."""
    graph = copy.deepcopy(name if isinstance(name, dict) else api(name))
    for node in graph.values():
        values = node["inputs"]
        for key, value in values.items():
            match node["class_type"], key:
                case "L2PCheckpointLoader", "checkpoint":
                    values[key] = model_4k if name == "4k_checkpoint" else BUNDLED
                case "UNETLoader", "unet_name":
                    values[key] = SMALL
                case "L2PTextEncoderLoader", "text_encoder":
                    values[key] = BUNDLED
                case "VAELoader", "vae_name":
                    values[key] = "pixel_space"
                case "L2PTrainLoRA", "sample_every":
                    values[key] = 0
                case "L2PTrainLoRA", "batch":
                    values[key] = 2
                case "LoraLoaderModelOnly", "lora_name" if isinstance(value, str):
                    values[key] = LORA
                case "LoadImage", "image":
                    values[key] = INPUT_IMAGE
                case "EmptyL2PLatentImage", "size":
                    values[key] = "custom"
                case "L2PPromptList", "prompts":
                    values[key] = prompt
                case ("L2PTextEncode", "prompt") | (
                    "CLIPTextEncode",
                    "text",
                ) if value and isinstance(value, str):
                    values[key] = prompt
                case _, "width" | "height":
                    values[key] = (
                        SIDES.get(value, value)
                        if name != "4k_checkpoint"
                        else 128
                        if model_4k == TINY_4K
                        else 96
                    )
                case _, "steps":
                    values[key] = steps
        if node["class_type"] == "CLIPLoader":  # builds Qwen3-4B and no smaller one
            node.update(
                class_type="L2PTextEncoderLoader",
                inputs={"text_encoder": BUNDLED, "device": "default"},
            )
        if node["class_type"] == "L2PKSampler":
            values.update(inputs)
    return graph
