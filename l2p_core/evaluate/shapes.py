"""The score of the bundled small model, over a folder in the layout of every benchmark."""

from ..images import read_image
from ..shapes.scenes import Scene
from ..shapes.score import score as shapes_score
from .layout import Written


def is_scored(images: list[Written]) -> bool:
    """Return True where every image has a scene of the small model's world to show."""
    return all("scene" in each.metadata for each in images)


def score(images: list[Written]) -> dict[str, float]:
    """Return the percent of images in which each attribute is right, and all at once ("right").

    Raises ValueError for images of other prompts than `shapes`."""
    if not is_scored(images):
        raise ValueError(
            "these images have no scene to show; expected a folder of l2p evaluate write shapes"
        )
    shown = [read_image(each.path).convert("RGB") for each in images]
    return shapes_score(shown, [Scene(**each.metadata["scene"]) for each in images])
