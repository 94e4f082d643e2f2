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
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "steps",
        "batch",
        "accumulate",
        "save_every",
        "learning_rate",
    )

    checkpoint: str = knob("", "the teacher, a whole L2P model; the student starts from it")
    prompts: str = knob(
        "",
        "a prompt file, as for l2p generate --prompts; its columns height and width apply to"
        " their row",
    )
    student_steps: int = knob(
        8,
        "number of steps in which the student generates, without guidance. 0: the student learns"
        " guidance alone, and generates in as many steps as the teacher",
        high=1000,
    )
    teacher_substeps: int = knob(
        4, "guided steps of the teacher for each step of the student", high=1000
    )
    teacher_guidance: float = knob(
        0.0, "the teacher's guidance scale; 0 for the checkpoint's default", high=100
    )
    cache: str = knob("", "folder for encoded prompts (default: encodings/ in the run's folder)")
    height: int = knob(0, "height in pixels; 0 for the trained resolution", high=MAX_SIDE)
    width: int = knob(0, "width in pixels; 0 for the trained resolution", high=MAX_SIDE)
    batch: int = knob(1, "prompts per process and pass", high=MAX_BATCH)
    accumulate: int = knob(
        8, "batches per step, each at another sigma: their gradients are averaged"
    )
    steps: int = knob(2000, "total number of optimizer steps")
    seed: int = knob(0, "seed of the order of prompts, the sigmas and the noise", high=2**64 - 1)
    shift: float = knob(
        0.0,
        "shift of the sigma schedule, which becomes the student's default; 0 for the checkpoint's",
    )
    schedule: str = knob(
        "linear",
        "learning-rate schedule. linear and cosine: decay to 0; constant; published: a third of the"
        " rate for the first five steps, then the full rate",
        choices=("linear", "cosine", "constant", "published"),
    )
    weight_decay: float = knob(0.0, "weight decay of every parameter")
    max_grad_norm: float = knob(1.0, "clip gradients to this norm; 0: no clipping")
    sample_prompts: tuple[str, ...] = knob(
        (),
        "prompts of the samples, which have the same noise each time (default: the first four"
        " prompts)",
    )
    held_out: int = knob(
        0,
        "number of prompts in the validation set, chosen by the seed. Every sample_every steps the"
        " validation loss is written to held_out.csv and loss.png",
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
