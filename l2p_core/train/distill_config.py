"""Every setting of a distillation, its default and what it changes: those of a training run, and
some of its own."""

from dataclasses import dataclass
from typing import ClassVar

from ..settings import MAX_BATCH, MAX_SIDE
from .config import TrainConfig, knob

# Settings of `train` that are of images, or of an objective that is not used here.
UNUSED = (
    "data",
    "caption_column",
    "trigger",
    "masked_loss",
    "unmasked_weight",
    "regularization",
    "regularization_weight",
    "max_pixels",
    "resolutions",
    "size_step",
    "buckets",
    "background",
    "recipe",
    "noise",
    "loss_weighting",
    "caption_dropout",
    "timestep_sampling",
    "shard",
)


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """What `distill` takes: settings of its own, and those of `train` but `UNUSED`."""

    REQUIRED: ClassVar = ("checkpoint", "prompts", "output")

    checkpoint: str = knob("", "the teacher, a whole L2P model; the student starts from it")
    prompts: str = knob(
        "",
        "a file of prompts, as l2p generate --prompts takes it; its columns height and width hold"
        " for their row",
    )
    student_steps: int = knob(
        8,
        "steps in which the student generates, without guidance. 0: it learns the guidance alone,"
        " and generates in as many steps as the teacher",
        high=1000,
    )
    teacher_substeps: int = knob(
        4, "guided steps of the teacher for each one of the student's", high=1000
    )
    teacher_guidance: float = knob(
        0.0, "the teacher's guidance scale; 0 for the checkpoint's default", high=100
    )
    cache: str = knob("", "folder for encoded prompts (default: encodings/ in the run's folder)")
    height: int = knob(0, "pixels; 0 for the trained resolution", high=MAX_SIDE)
    width: int = knob(0, "pixels; 0 for the trained resolution", high=MAX_SIDE)
    batch: int = knob(1, "prompts a process takes through the model at once", high=MAX_BATCH)
    accumulate: int = knob(
        8, "batches to a step, each at another sigma: their gradients are averaged"
    )
    steps: int = knob(2000, "optimizer steps in all")
    seed: int = knob(0, "of the order of prompts, the sigmas and the noise", high=2**64 - 1)
    shift: float = knob(3.0, "of the sigma schedule, which the student's images need too")
    schedule: str = knob(
        "linear",
        "learning rate: linear and cosine fall to 0 at the end; constant; published, a third of it"
        " for five steps",
        choices=("linear", "cosine", "constant", "published"),
    )
    weight_decay: float = knob(0.0, "on every parameter")
    max_grad_norm: float = knob(1.0, "gradients longer than this are shortened to it; 0: never")
    sample_prompts: tuple[str, ...] = knob(
        (), "generated each time from the same noise (default: the first four prompts)"
    )
    held_out: int = knob(
        0,
        "prompts, drawn by the seed, that are never trained on; every sample_every steps their"
        " loss goes to held_out.csv and loss.png",
    )

    def __post_init__(self) -> None:
        """Raises ValueError as `TrainConfig` does."""
        super().__post_init__()
        for name in UNUSED:
            default = TrainConfig.__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, and distillation has no use for it; leave"
                    " it out"
                )
        if self.teacher_substeps < 1:
            raise ValueError(f"teacher_substeps is {self.teacher_substeps}; expected 1 or more")
