"""Training from the canvas: the run of `l2p train`, in a process of its own."""

import glob
import importlib
import importlib.util
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..l2p_core.files.atomic import atomic_write
from ..l2p_core.files.header import CheckpointError
from ..l2p_core.images import open_image
from ..l2p_core.train.config import TrainConfig
from ..l2p_core.train.presets import CARDS, preset
from ..l2p_core.train.process import PREVIEW_WIDTH, TrainingProcess, stacked
from ..l2p_core.train.resume import check_run
from ..quant.merge import merge
from .datasets import (
    FROM_GRAPH,
    TRAINING,
    dataset_folders,
    dataset_path,
    save_images,
    stamps_below,
)
from .files import bar, check_plain_name, model_folder
from .load import (
    bundled_or,
    model_path,
    model_paths,
    stamps,
    text_encoder_path,
    tokenizer_for,
)
from .prompt import note

LAYERS = {"shallow": "5:-5", "whole": ""}
POLL = 0.3  # seconds between two looks at a run
PREVIEW_EVERY = 2.0  # seconds

ENCODER_TOOLTIP = (
    "Encodes the captions before training: a file or folder of models/text_encoders. The bundled"
    " one belongs to the bundled small model alone."
)
DATASET_TOOLTIP = (
    "A folder in ComfyUI's input, or one in its output that also holds captions: images with a"
    " .txt of the same name beside each image, or with a metadata.csv. 'images of the graph' uses"
    " what is connected to images and prompts."
)
OUTPUT = io.String.Input(
    "output",
    default="my_training",
    tooltip=(
        "Name of the result, and of the run's folder in output/l2p_training. A second Run with"
        " this name resumes the run."
    ),
)
STEPS = io.Int.Input(
    "steps",
    default=1000,
    min=1,
    max=10_000_000,
    tooltip="Total number of optimizer steps. Raise it later to continue a finished run.",
)
BATCH = io.Int.Input("batch", default=1, min=1, max=256, tooltip="Number of images in each step.")
TRIGGER = io.String.Input(
    "trigger",
    default="",
    tooltip=(
        "A word that every caption gets. It replaces [trigger] in a caption, or is put before the"
        " caption."
    ),
)
SAMPLE_PROMPTS = io.String.Input(
    "sample_prompts",
    multiline=True,
    default="",
    tooltip=(
        "Prompts of samples that are generated during training, one per line. If it is empty, the"
        " first four captions are used."
    ),
)
SAMPLE_EVERY = io.Int.Input(
    "sample_every",
    default=250,
    min=0,
    max=10_000_000,
    tooltip="Number of steps between two rows of samples. 0 generates no samples.",
)
SEED = io.Int.Input(
    "seed",
    default=0,
    min=0,
    max=0xFFFFFFFFFFFFFFFF,
    advanced=True,
    control_after_generate=False,
    tooltip="Seed of the order of the images and of the noise.",
)
IMAGES = io.Image.Input(
    "images", optional=True, tooltip="Images to train on, if dataset is 'images of the graph'."
)
PROMPTS = io.String.Input(
    "prompts",
    optional=True,
    force_input=True,
    tooltip="Captions of the connected images: a list, one line per image, or one caption for all.",
)


class L2PTrainLoRA(io.ComfyNode):
    """Images and captions → a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PTrainLoRA",
            display_name="L2P Train LoRA",
            category="L2P/training",
            is_input_list=True,
            is_output_node=True,
            description=(
                "Trains a LoRA of an L2P model and puts it into models/loras. Stop saves the run,"
                " and the next Run resumes it."
            ),
            search_aliases=["train", "training", "fine-tune", "lora", "dataset"],
            inputs=[
                bundled_or(
                    "checkpoint", tooltip="The L2P model that the LoRA is for, not quantized."
                ),
                bundled_or("text_encoder", tooltip=ENCODER_TOOLTIP),
                io.Combo.Input(
                    "dataset", options=[FROM_GRAPH, *dataset_folders()], tooltip=DATASET_TOOLTIP
                ),
                OUTPUT,
                io.Combo.Input(
                    "preset",
                    options=list(CARDS),
                    default="16gb",
                    tooltip=(
                        "Memory of the GPU. Chooses settings with which the 1K model fits at 1024"
                        " x 1024 and batch 1; the memory is counted, not measured. No effect on a"
                        " CPU."
                    ),
                ),
                STEPS,
                io.Int.Input(
                    "lora_rank",
                    default=16,
                    min=1,
                    max=512,
                    tooltip=(
                        "Rank of the LoRA. A higher rank can learn more, but needs more images."
                    ),
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="Learning rate of AdamW. 0.0001 is usual for a LoRA.",
                ),
                BATCH,
                TRIGGER,
                SAMPLE_PROMPTS,
                SAMPLE_EVERY,
                SEED,
                IMAGES,
                PROMPTS,
            ],
            outputs=[
                io.AnyType.Output("lora_name"),
                io.Image.Output("samples"),
                io.Image.Output("loss"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **given: list) -> list:
        return fingerprint(given)

    @classmethod
    def execute(cls, images=None, prompts=None, **given: list) -> io.NodeOutput:
        """Train. Returns the name for Load LoRA, the samples and the loss as IMAGEs."""
        asked = {name: value[0] for name, value in given.items()}
        folder = Path(folder_paths.get_folder_paths("loras")[0])
        settings = for_card(asked.pop("preset"), {"lora_rank": asked.pop("lora_rank")})

        def publish(step_file: Path) -> str:
            file = folder / published_name(asked["output"], step_file)
            with step_file.open("rb") as source, atomic_write(file) as target:
                shutil.copyfileobj(source, target)
            folder_paths.filename_list_cache.pop("loras", None)
            note(cls, f"{file.name} is in models/loras")
            return file.name

        return train(cls, asked, settings, images, prompts, folder, publish, True)


class L2PTrain(io.ComfyNode):
    """Images and captions → a trained model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PTrain",
            display_name="L2P Train",
            category="L2P/training",
            is_input_list=True,
            is_output_node=True,
            description=(
                "Trains an L2P model's own weights: its shallow layers, as published, or the whole"
                " model. At the end the model is in models/diffusion_models. Stop saves the run,"
                " and the next Run resumes it."
            ),
            search_aliases=["train", "training", "fine-tune", "finetune", "dataset"],
            inputs=[
                bundled_or(
                    "checkpoint",
                    tooltip="The pixel initialisation, or any whole L2P model, not quantized.",
                ),
                bundled_or("text_encoder", tooltip=ENCODER_TOOLTIP),
                io.Combo.Input(
                    "dataset", options=[FROM_GRAPH, *dataset_folders()], tooltip=DATASET_TOOLTIP
                ),
                OUTPUT,
                io.Combo.Input(
                    "preset",
                    options=list(CARDS),
                    default="24gb",
                    tooltip=(
                        "Memory of the GPU. Chooses settings with which the 1K model fits at 1024"
                        " x 1024 and batch 1; the memory is counted, not measured. 80gb trains as"
                        " published. No effect on a CPU."
                    ),
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYERS),
                    default="shallow",
                    tooltip=(
                        "shallow: all but the main layers 5 to n - 6, as published. whole: every"
                        " weight; needs the preset 80gb or 24gb."
                    ),
                ),
                STEPS,
                io.Float.Input(
                    "learning_rate",
                    default=5e-5,
                    min=1e-7,
                    max=1.0,
                    step=1e-7,
                    tooltip="Learning rate of AdamW. The published value is 0.00005.",
                ),
                BATCH,
                TRIGGER,
                SAMPLE_PROMPTS,
                SAMPLE_EVERY,
                SEED,
                IMAGES,
                PROMPTS,
            ],
            outputs=[
                io.AnyType.Output("checkpoint_name"),
                io.Image.Output("samples"),
                io.Image.Output("loss"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **given: list) -> list:
        return fingerprint(given)

    @classmethod
    def execute(cls, images=None, prompts=None, **given: list) -> io.NodeOutput:
        """Train. Returns the name for Load L2P Checkpoint, the samples and the loss as IMAGEs."""
        asked = {name: value[0] for name, value in given.items()}
        folder = model_folder()
        settings = for_card(asked.pop("preset"), {"freeze": LAYERS[asked.pop("layers")]})
        base = model_paths(asked["checkpoint"])

        def publish(step_file: Path) -> str:
            file = folder / published_name(asked["output"], step_file)
            made = file.stat().st_mtime_ns if file.exists() else 0
            if made < step_file.stat().st_mtime_ns:
                folder.mkdir(parents=True, exist_ok=True)
                note(cls, f"writing {file.name}")
                merge(step_file, base, file, progress=bar())
            folder_paths.filename_list_cache.pop("diffusion_models", None)
            note(cls, f"{file.name} is in models/diffusion_models")
            return file.name

        return train(cls, asked, settings, images, prompts, folder, publish, False)


def for_card(memory: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of a preset; without them on a CPU, as they save a GPU's memory."""
    return settings if on_cpu() else {**preset(memory, settings), **settings}


def on_cpu() -> bool:
    """Whether ComfyUI computes on the CPU."""
    return comfy.model_management.get_torch_device().type == "cpu"


def fingerprint(given: dict[str, list]) -> list:
    """What tells ComfyUI that files changed which an input names."""
    files = model_paths(given["checkpoint"][0])
    return [*stamps(files), *stamps_below(given["dataset"][0])]


def published_name(output: str, step_file: Path) -> str:
    """The result's name in ComfyUI's folders. It holds the step: a loader keeps a file that it has
    read by its name, and would not see that it changed."""
    return f"{output}-{step_file.stem.replace('-', '')}.safetensors"


def train(
    node: type[io.ComfyNode],
    asked: dict[str, Any],
    settings: dict[str, Any],
    images: list[torch.Tensor] | None,
    prompts: list[str] | None,
    folder: Path,
    publish: Callable[[Path], str],
    publish_stopped: bool,
) -> io.NodeOutput:
    """Train in a process of its own, and return what a training node does.

    asked: the node's inputs. settings: of `TrainConfig`. folder: where the result goes. publish:
    puts a step file there and returns its name; publish_stopped: also that of a stopped run.
    Raises ValueError or CheckpointError before anything is done, TrainingError where it failed."""
    asked["output"] = asked["output"].strip()
    check_plain_name("output", asked["output"], folder)
    runs = Path(folder_paths.get_output_directory()) / TRAINING
    run = runs / asked["output"]
    reject_taken(asked["output"], folder, run)
    check_packages(settings)

    config = TrainConfig(
        **{
            **asked_settings(asked),
            **settings,
            "data": (str(data_folder(asked, images, prompts, run)),),
            "output": str(run),
            "cache": str(runs / ".encodings"),  # no run has such a name
        }
    )
    check_run(run, config)
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    training = TrainingProcess(config)
    try:
        follow(training, node)
    except comfy.model_management.InterruptProcessingException:
        note(node, "stopping: the run is saved")
        step_file = stopped(training)
        if step_file and publish_stopped:
            publish(step_file)
        raise
    finally:
        training.stop()
    step_file = training.result()
    if step_file is None:
        raise ValueError(f"the run was stopped before its first step; {training.log} says why")
    name = publish(step_file)
    samples, loss = run_image(run / "samples.png"), run_image(run / "loss.png")
    seen = stacked([samples, loss], PREVIEW_WIDTH)
    return io.NodeOutput(
        name,
        to_image(samples),
        to_image(loss),
        ui=ui.PreviewImage(to_image(seen), cls=node),
    )


def asked_settings(asked: dict[str, Any]) -> dict[str, Any]:
    """Settings of `TrainConfig` that a training node asks for."""
    encoder = text_encoder_path(asked["text_encoder"])
    lines = [line.strip() for line in asked["sample_prompts"].splitlines()]
    return {
        "checkpoint": str(model_path(asked["checkpoint"])),
        "text_encoder": str(encoder),
        "tokenizer": str(tokenizer_for(encoder)),
        "steps": asked["steps"],
        "batch": asked["batch"],
        "learning_rate": asked["learning_rate"],
        "trigger": asked["trigger"].strip(),
        "sample_prompts": tuple(line for line in lines if line),
        "sample_every": asked["sample_every"],
        "save_every": 250,
        "seed": asked["seed"],
        "schedule": "cosine",
        "device": "cpu" if on_cpu() else "",
        "mixed_precision": "no" if on_cpu() else "bf16",
    }


def data_folder(
    asked: dict[str, Any],
    images: list[torch.Tensor] | None,
    prompts: list[str] | None,
    run: Path,
) -> Path:
    """The folder to train on. Raises ValueError where it is not clear what to train on."""
    if asked["dataset"] != FROM_GRAPH:
        if images:
            raise ValueError(
                f"dataset is {asked['dataset']}, and images are connected. Disconnect them, or set"
                f" dataset to {FROM_GRAPH!r}"
            )
        return dataset_path(asked["dataset"])
    if not images:
        raise ValueError(
            "there is nothing to train on: choose a folder as the dataset, or connect images and"
            " prompts"
        )
    return save_images(images, prompts or [], asked["trigger"], run)


def reject_taken(output: str, folder: Path, run: Path) -> None:
    """Raise CheckpointError where results of that name are there, and no run that they are of."""
    taken = sorted(folder.glob(f"{glob.escape(output)}-step*.safetensors"))
    if taken and not (run / "resume.pt").exists():
        raise CheckpointError(
            f"{taken[0].name} is in {folder} already, from a run that is gone. Give another output,"
            " or take that file away"
        )


def check_packages(settings: dict[str, Any]) -> None:
    """Raise ImportError, which names the command, where packages are missing that training
    needs."""
    needed = ["accelerate", *(["peft"] if "lora_rank" in settings else [])]
    if settings.get("optimizer") == "adamw8bit" or settings.get("quantize_frozen") == "nf4":
        needed.append("bitsandbytes")
    importlib.invalidate_caches()  # they may have been installed while ComfyUI runs
    missing = [name for name in dict.fromkeys(needed) if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"this training needs {' and '.join(missing)}, which ComfyUI's Python lacks. Install"
            f" {'it' if len(missing) == 1 else 'them'}, then press Run again: {sys.executable} -m"
            f" pip install {' '.join(missing)}"
        )


def follow(training: TrainingProcess, node: type[io.ComfyNode]) -> None:
    """Show a run on the canvas until it ends. Raises InterruptProcessingException on Stop."""
    progress = comfy.utils.ProgressBar(training.config.steps)
    shown, said = 0.0, ""
    while training.is_running():
        comfy.model_management.throw_exception_if_processing_interrupted()
        rows = training.rows()
        if (status := training.status(rows)) != said:
            note(node, status, log=False)
            said = status
        if rows and time.monotonic() - shown >= PREVIEW_EVERY:
            image = training.preview(rows)
            progress.update_absolute(rows[-1].step, preview=("JPEG", image, PREVIEW_WIDTH))
            shown = time.monotonic()
        time.sleep(POLL)


def stopped(training: TrainingProcess) -> Path | None:
    """Wait for a run that is asked to stop, and return its newest step file. Another Stop ends it
    without saving."""
    training.stop()
    while training.is_running():
        if comfy.model_management.processing_interrupted():
            comfy.model_management.interrupt_current_processing(False)
            training.kill()
            return None
        time.sleep(POLL)
    return training.result()


def run_image(file: Path) -> Image.Image:
    """An image of the run's folder; a white one where there is none."""
    if not file.is_file():
        return Image.new("RGB", (PREVIEW_WIDTH, 16), "white")
    with open_image(file, ("PNG",)) as image:
        return image.convert("RGB")


def to_image(image: Image.Image) -> torch.Tensor:
    """An IMAGE of one image, (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)[None]


NODES = [L2PTrainLoRA, L2PTrain]
