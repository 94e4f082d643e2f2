"""Checkpoint files to checkpoint files, inside ComfyUI's model folders."""

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..l2p_core.files.atomic import readable_bytes
from ..l2p_core.files.header import CheckpointError
from ..l2p_core.files.quantization import FORMATS
from ..quant import convert, merge, quantize
from ..quant.stream import Progress
from .load import model_files, model_paths, stamps

FILENAME = io.String.Input(
    "filename",
    default="",
    tooltip=(
        "Name of the new file in models/diffusion_models. If it is empty, the file gets the name"
        " of the source and a suffix."
    ),
)
OVERWRITE = io.Boolean.Input(
    "overwrite", default=False, advanced=True, tooltip="Replace an existing file of that name."
)
DTYPE = io.Combo.Input(
    "dtype",
    options=["as they are", *merge.DTYPES],
    default="as they are",
    tooltip="One dtype for all tensors. bf16 reduces the published 1K model from 20 GB to 12 GB.",
)


class L2PQuantizeCheckpoint(io.ComfyNode):
    """A model file → an INT8, FP8 or 4-bit one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PQuantizeCheckpoint",
            display_name="L2P Quantize Checkpoint",
            category="L2P/files",
            is_output_node=True,
            description=(
                "Writes a whole L2P model with its large linears in 8 or 4 bits, a third of the"
                " size or less, and reports the error of each tensor. Needs little memory for a"
                " file of any size."
            ),
            search_aliases=["int8", "fp8", "shrink", "compress"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=model_files(),
                    tooltip="A whole L2P model that is not quantized yet.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="int8_tensorwise",
                    tooltip=(
                        "int8_tensorwise runs on any recent GPU and on the CPU. float8 is for RTX"
                        " 40 and newer; mxfp8 and nvfp4 (4 bits) are for RTX 50 and newer."
                    ),
                ),
                io.Combo.Input(
                    "granularity",
                    options=list(FORMATS["int8_tensorwise"].granularities),
                    default="row",
                    tooltip=(
                        "For INT8: one scale for each tensor or each row, or for each row after a"
                        " rotation that spreads outliers (convrot). The other formats ignore it."
                    ),
                ),
                io.Combo.Input(
                    "preset",
                    options=list(quantize.PRESETS),
                    default="card",
                    tooltip=(
                        "card: the linears of all main layers but the first; small: of all blocks."
                    ),
                ),
                FILENAME,
                OVERWRITE,
            ],
            outputs=[io.String.Output("filename"), io.String.Output("report")],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, filename: str, **_) -> list:
        return stamps_of_others(model_paths(checkpoint), filename)

    @classmethod
    def execute(cls, checkpoint, format, granularity, preset, filename, overwrite) -> io.NodeOutput:
        source, output = source_and_output(
            checkpoint, filename, format.replace("_tensorwise", ""), overwrite
        )
        options = quantize.Options(
            format, granularity if format == "int8_tensorwise" else None, preset
        )
        return written(
            output, quantize.table(quantize.quantize(source, output, options, progress=bar()))
        )


class L2PConvertCheckpoint(io.ComfyNode):
    """A latent model → a pixel initialisation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PConvertCheckpoint",
            display_name="L2P Convert Checkpoint",
            category="L2P/files",
            is_output_node=True,
            description=(
                "Makes a pixel initialisation, from which training starts, from Z-Image or from"
                " an L2P model with smaller patches. It cannot generate images before it is"
                " trained."
            ),
            search_aliases=["pixel initialisation", "z-image to l2p", "train"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=model_files(),
                    tooltip=(
                        "Z-Image or Z-Image-Turbo (any shard of a sharded model), or an L2P model"
                        " with smaller patches."
                    ),
                ),
                io.Combo.Input(
                    "patch",
                    options=["16", "64", "128", "160"],
                    default="16",
                    tooltip=(
                        "Side of a patch in pixels: 16 for 1K images, 64 for 4K, 128 for 8K, 160"
                        " for 10K."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip=(
                        "Seed of the new tensors. The same seed gives the same file on every"
                        " machine."
                    ),
                ),
                FILENAME,
                OVERWRITE,
            ],
            outputs=[io.String.Output("filename")],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, filename: str, **_) -> list:
        return stamps_of_others(model_paths(checkpoint), filename)

    @classmethod
    def execute(cls, checkpoint, patch, seed, filename, overwrite) -> io.NodeOutput:
        source, output = source_and_output(checkpoint, filename, f"l2p-patch{patch}", overwrite)
        convert.convert(source, output, int(patch), seed, progress=bar())
        return written(output)


class L2PMergeCheckpoint(io.ComfyNode):
    """A trained part or a LoRA, and its model → a model file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PMergeCheckpoint",
            display_name="L2P Merge Checkpoint",
            category="L2P/files",
            is_output_node=True,
            description=(
                "Writes a whole model: puts trained tensors into the pixel initialisation that"
                " training started from, or adds a LoRA to its model."
            ),
            search_aliases=["trained part", "whole model", "bf16"],
            inputs=[
                io.Combo.Input(
                    "trained",
                    options=list(dict.fromkeys([*model_files(), *lora_files()])),
                    tooltip="The tensors that training saved, or a LoRA.",
                ),
                io.Combo.Input(
                    "base",
                    options=model_files(),
                    tooltip=(
                        "The pixel initialisation that training started from, or the LoRA's model."
                    ),
                ),
                DTYPE,
                FILENAME,
                OVERWRITE,
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="Strength of a LoRA. Keep 1 for trained tensors.",
                ),
            ],
            outputs=[io.String.Output("filename")],
        )

    @classmethod
    def fingerprint_inputs(cls, trained: str, base: str, filename: str, **_) -> list:
        return stamps_of_others([*model_paths(trained), *model_paths(base)], filename)

    @classmethod
    def execute(cls, trained, base, dtype, filename, overwrite, strength=1.0) -> io.NodeOutput:
        part, output = source_and_output(trained, filename, "merged", overwrite)
        merge.merge(
            part,
            model_paths(base),
            output,
            None if dtype == "as they are" else dtype,
            strength=None if strength == 1 else strength,
            progress=bar(),
        )
        return written(output)


def lora_files() -> list[str]:
    """The files of models/loras."""

    return [
        name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")
    ]


def source_and_output(
    checkpoint: str, filename: str, suffix: str, overwrite: bool
) -> tuple[list[Path], Path]:
    """The input's files, and the output in ComfyUI's models/diffusion_models. Raises
    CheckpointError for a name that leads out of it or is taken."""
    sources = model_paths(checkpoint)
    folder = model_folder()
    name = filename.strip() or f"{sources[0].stem}-{suffix}"
    name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    output = folder / name
    check_plain_name("filename", name, folder)
    if not overwrite and output.exists():
        raise CheckpointError(
            f"{name} is in {folder} already. Give another filename, or turn overwrite on"
        )
    if not overwrite and name in model_files():
        raise CheckpointError(
            f"{model_paths(name)[0]} has that name, and the loaders would list only the new {name}."
            " Give another filename"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return sources, output


def model_folder() -> Path:
    """ComfyUI's models/diffusion_models."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("diffusion_models")]
    named = (folder for folder in folders if folder.name == "diffusion_models")
    return next(named, folders[0])  # the first is models/unet


def check_plain_name(setting: str, name: str, folder: Path) -> None:
    """Raise CheckpointError for a name that leads out of the folder, or is hidden in it."""
    if not name or Path(name).name != name or "\\" in name or ":" in name or name.startswith("."):
        raise CheckpointError(
            f"{setting} is {name!r}; expected a plain name, which is put into {folder}"
        )


def stamps_of_others(sources: list[Path], filename: str) -> list[tuple]:
    """Of the inputs that the node does not write itself."""
    return stamps(
        [file for file in sources if file.stem != filename.strip().removesuffix(".safetensors")]
    )


def bar() -> Progress:
    """A node's progress, which Stop ends."""
    progress = comfy.utils.ProgressBar(1)

    def advance(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update_absolute(done, total)

    return advance


def written(output: Path, report: str | None = None) -> io.NodeOutput:
    """Name of the new file, which the loaders list from now on, and what to tell the user."""
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    said = report or f"{output}: {readable_bytes(output.stat().st_size)}"
    return io.NodeOutput(output.name, *([report] if report else []), ui=ui.PreviewText(said))


NODES = [L2PQuantizeCheckpoint, L2PConvertCheckpoint, L2PMergeCheckpoint]
