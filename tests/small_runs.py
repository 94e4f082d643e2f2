"""What the tests of training share: a folder of images, and settings of a run of six steps over
it."""

import csv
from pathlib import Path

from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.shapes.scenes import render, scenes
from comfyui_l2p.l2p_core.train.config import TrainConfig

CHECKPOINT = BUNDLED_MODEL / "transformer.safetensors"


class Killed(BaseException):
    pass


def make_data(folder: Path, seeds: bool = True) -> Path:
    """Six images, four of them squares, with captions and seeds."""
    (folder / "images").mkdir(parents=True)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file_name", "text", *(["seed"] if seeds else [])])
        for number, scene in enumerate(scenes()[:600:100]):
            image = render(scene) if number < 4 else render(scene).resize((128, 64))
            image.save(folder / "images" / f"{number}.png")
            rows.writerow([f"{number}.png", scene.caption(), *([1000 + number] if seeds else [])])
    return folder


def config(data: Path, **changes: object) -> TrainConfig:
    return TrainConfig(
        **{
            "checkpoint": str(CHECKPOINT),
            "data": str(data),
            "output": str(data.parent / "run"),
            "steps": 6,
            "batch": 2,
            "freeze": "1:-1",
            "mixed_precision": "no",
            "device": "cpu",
            "save_every": 3,
            "sample_every": 0,
            "learning_rate": 1e-3,
            **changes,
        }
    )


def losses(output: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's log."""
    with (output / "log.csv").open() as stream:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(stream)]
