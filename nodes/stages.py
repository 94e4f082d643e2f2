"""Stages of a generation above the trained resolution: their options, and the model in each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from comfy_api.latest import io

from ..l2p_core.settings import FIELDS, REFINEMENTS, checked
from ..l2p_core.stages import Stage, by_windows
from .comfy_model import NEIGHBOURHOOD
from .inputs import check_numbers, setting


class StageOptions(NamedTuple):
    """Settings of stages, under the names that `Settings` has for them."""

    stages: int
    stage_strength: float
    redraw: str
    stage_cfg_scale: float
    stage_attention: str


STAGES = io.Custom("L2P_STAGES")  # a StageOptions on the canvas
ONE_STAGE = StageOptions(*(FIELDS[name].default for name in StageOptions._fields))
HIDDEN = {"hidden": True}  # for ComfyUI's page: the input exists, and shows no widget
REDRAW_AND_OLDER = [*REFINEMENTS, *FIELDS["redraw"].metadata["aliases"]]


class L2PStages(io.ComfyNode):
    """Options of stages, for L2P KSampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PStages",
            display_name="L2P Stages",
            category="L2P",
            description=(
                "Options to generate above the trained resolution in stages, each twice as large"
                " as the previous one."
            ),
            search_aliases=["upscale", "hires fix", "4k", "tiled", "stages"],
            inputs=[
                setting("stages", default=2),
                setting("stage_strength", "stage_denoise"),
                setting("redraw"),
                setting(
                    "stage_cfg_scale",
                    "stage_cfg",
                    optional=True,
                    step=0.1,
                    round=0.01,
                    tooltip=(
                        "Guidance scale of every stage after the first. 1 turns guidance off and"
                        " halves their time; 0 means the cfg of L2P KSampler."
                    ),
                ),
                setting("stage_attention", optional=True),
            ],
            outputs=[STAGES.Output("stage_options")],
        )

    @classmethod
    def execute(
        cls,
        stages: int,
        stage_denoise: float,
        redraw: str,
        stage_cfg: float = ONE_STAGE.stage_cfg_scale,
        stage_attention: str = ONE_STAGE.stage_attention,
    ) -> io.NodeOutput:
        return io.NodeOutput(stages_of(stages, stage_denoise, redraw, stage_cfg, stage_attention))


def stages_of(
    stages: int,
    stage_denoise: float,
    redraw: str,
    stage_cfg: float = ONE_STAGE.stage_cfg_scale,
    stage_attention: str = ONE_STAGE.stage_attention,
) -> StageOptions:
    """Return the options of these inputs, an older word of redraw as today's. Raises ValueError
    for NaN."""
    check_numbers(stage_strength=stage_denoise, stage_cfg_scale=stage_cfg)
    redraw = str(checked("redraw", redraw))
    return StageOptions(stages, stage_denoise, redraw, stage_cfg, stage_attention)


def note_on_older_inputs(options: StageOptions) -> str | None:
    """Say so where an older workflow sets stages on L2P KSampler, which shows no widgets for
    them."""
    if options == ONE_STAGE:
        return None
    return (
        f"this workflow sets stages {options.stages}, stage_denoise {options.stage_strength:g} and"
        f" redraw {options.redraw} in L2P KSampler itself. To change them, connect the node L2P"
        " Stages"
    )


def for_stage(model, stage: Stage, multiple: int):
    """The model as it generates this stage."""
    model = model.clone()
    options = model.model_options["transformer_options"]
    if stage.neighbourhood:
        patch = model.model.diffusion_model.config.patch_size
        options[NEIGHBOURHOOD] = stage.neighbourhood // patch
    if stage.rope_scale != 1:
        rope = options.get("rope_options", {})  # a ScaleROPE node's
        options["rope_options"] = rope | {
            name: rope.get(name, 1.0) * stage.rope_scale for name in ("scale_x", "scale_y")
        }
    if stage.window:
        wrapped = model.model_options.get(
            "model_function_wrapper",
            lambda apply, given: apply(given["input"], given["timestep"], **given["c"]),
        )
        model.set_model_unet_function_wrapper(
            lambda apply, given: by_windows(
                lambda part: wrapped(apply, {**given, "input": part}),
                given["input"],
                stage.window,
                multiple,
            )
        )
    return model


@contextmanager
def counting_windows(model, window: int) -> Iterator[None]:
    """Have the memory of a pass counted as that of a window, 0 for the whole image."""
    model.model.window = window
    try:
        yield
    finally:
        model.model.window = 0


def shortage(model, plan: list[Stage], batch_size: int, have: int) -> str | None:
    """What is wrong, and what to do, where a device of so many bytes can't hold the largest pass;
    None where it can."""

    def need(stage: Stage) -> int:
        with counting_windows(model, stage.window):
            return model.memory_required([batch_size, 3, *stage[:2]])

    largest = max(plan, key=need)
    if need(largest) <= have:
        return None
    advice = [
        *["a smaller batch_size"] * (batch_size > 1),
        (
            "redraw tiled"
            if largest.strength < 1 and not largest.window
            else "a smaller size, or more stages with redraw tiled"
        ),
    ]
    return (
        f"generating {batch_size} x {largest.width} x {largest.height} holds about"
        f" {need(largest) / 1e9:.1f} GB beside the model, and the device has {have / 1e9:.1f} GB:"
        f" it will run out of memory, or be very slow. Take {', or '.join(advice)}"
    )


NODES = [L2PStages]
