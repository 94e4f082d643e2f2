"""Where else a run is followed: TensorBoard, and Weights & Biases."""

import hashlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .config import TrainConfig, to_toml

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def import_wandb() -> Any:
    """Return the module wandb. Raises ImportError that says how to get it."""
    try:
        import wandb
    except ImportError:
        raise ImportError(
            "wandb_project needs Weights & Biases: pip install 'comfyui-l2p[wandb]'"
        ) from None
    return wandb


class Boards:
    """Both as one: TensorBoard where it is installed, Weights & Biases where a project is named.

    The latter follows its own environment variables; WANDB_MODE=offline writes to the run's folder
    alone."""

    def __init__(self, config: TrainConfig, step: int):
        """step: where the run resumes; TensorBoard forgets what was logged after it."""
        folder = Path(config.output)
        self.tensorboard: SummaryWriter | None = None
        with suppress(ImportError):
            from torch.utils import tensorboard

            self.tensorboard = tensorboard.SummaryWriter(
                folder / "tensorboard", purge_step=step + 1
            )
            self.tensorboard.add_text("settings", f"```\n{to_toml(config)}```", step)
        self.wandb: Any = None
        if config.wandb_project:
            name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            self.wandb = import_wandb().init(
                project=config.wandb_project,
                name=folder.name,
                id=name,  # so that a resumed run stays one run
                resume="allow",
                dir=str(folder),
                config=asdict(config),
            )

    def add_numbers(self, numbers: dict[str, float], step: int) -> None:
        """Log numbers of a step by their names."""
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def add_samples(self, sheet: Image.Image, step: int) -> None:
        """Log the samples of a step, one image."""
        if self.tensorboard:
            pixels = np.asarray(sheet.convert("RGB"))
            self.tensorboard.add_image("samples", pixels, step, dataformats="HWC")
        if self.wandb:
            self.wandb.log({"samples": import_wandb().Image(sheet)}, step=step)

    def close(self) -> None:
        """Write what is left."""
        if self.tensorboard:
            with suppress(OSError):  # a full disk, which the next save names
                self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
