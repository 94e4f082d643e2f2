"""A checkpoint and its text encoder → whether they work here."""

from collections.abc import Iterator

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..l2p_core import doctor
from ..l2p_core.files.header import find_files
from ..l2p_core.images import to_images
from ..l2p_core.proof import Finding
from .load import (
    bundled_or,
    model_path,
    model_paths,
    stamps,
    text_encoder_path,
    tokenizer_for,
)

LINES = 15  # of a report, for the progress bar


class L2PCheckModel(io.ComfyNode):
    """Model and text encoder → a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PCheckModel",
            display_name="L2P Check Model",
            category="L2P/files",
            is_output_node=True,
            description=(
                "Tests whether a checkpoint and a text encoder work here, and names what is"
                " wrong: files, tensors, sign, timestep, scale or prompt. Unloads ComfyUI's models"
                " first."
            ),
            search_aliases=["doctor", "verify", "test checkpoint", "diagnose"],
            inputs=[
                bundled_or("checkpoint", tooltip="A whole L2P model, in any precision."),
                bundled_or(
                    "text_encoder", tooltip="The text encoder that the model was trained with."
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "An image to denoise; it is resized. Without an image, the node renders a"
                        " simple scene."
                    ),
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    optional=True,
                    tooltip=(
                        "What the image shows. If it is empty, the prompt of the rendered scene"
                        " is used."
                    ),
                ),
            ],
            outputs=[io.String.Output("report")],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, text_encoder: str, **_) -> list:
        encoder = find_files(text_encoder_path(text_encoder))[0]
        return stamps([*model_paths(checkpoint), *encoder])

    @classmethod
    def execute(cls, checkpoint, text_encoder, image=None, prompt="") -> io.NodeOutput:
        encoder = text_encoder_path(text_encoder)
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        findings = doctor.examine_checkpoint(
            checkpoint=model_path(checkpoint),
            text_encoder=encoder,
            tokenizer=tokenizer_for(encoder),
            device=str(comfy.model_management.get_torch_device()),
            image=None if image is None else to_images(image[:1].movedim(-1, 1) * 2 - 1)[0],
            prompt=prompt or None,
        )
        # the doctor's memory meter can't count inference tensors
        with torch.inference_mode(False), torch.no_grad():
            report = doctor.report(interruptible(findings))
        comfy.model_management.soft_empty_cache()
        return io.NodeOutput(report, ui=ui.PreviewText(report))


def interruptible(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Pass the findings on, with a progress bar. Stop ends it."""
    progress = comfy.utils.ProgressBar(LINES)
    for finding in findings:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update(1)
        yield finding


NODES = [L2PCheckModel]
