"""How far images of the same prompts and seeds lie apart: PSNR, SSIM, LPIPS."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..images import read_image, to_pixels
from .layout import Written

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian; pixels
K1, K2 = 0.01, 0.03  # SSIM's constants; these four are those of Wang et al. 2004

Lpips = Callable[[Image.Image, Image.Image], float]


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt and seed, and how far they lie apart."""

    name: str
    prompt: str
    one: Path
    other: Path
    squared_error: float  # mean over all levels
    ssim: float
    lpips: float | None = None

    @property
    def psnr(self) -> float:
        """In dB, with 255 as the peak; infinite where the images are the same."""
        return psnr_of(self.squared_error)


def psnr_of(squared_error: float) -> float:
    """Return the PSNR in dB of a mean squared error, with 255 as the peak."""
    return 10 * math.log10(PEAK**2 / squared_error) if squared_error else math.inf


def squared_error(one: Image.Image, other: Image.Image) -> float:
    """Return the mean squared difference of the levels of two RGB images of one size."""
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    return float(np.square(difference).mean())


def ssim(one: Image.Image, other: Image.Image) -> float:
    """Return the structural similarity of two RGB images of one size, 11 pixels or more a side.

    By Wang et al. 2004: a Gaussian window, on each channel, where the window fits."""
    x, y = (
        torch.from_numpy(np.array(each, np.float64)).permute(2, 0, 1)[:, None]
        for each in (one, other)
    )  # (3, 1, H, W)
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x**2
    var_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def _blurred(x: Tensor) -> Tensor:
    """(3, 1, H, W) → (3, 1, H - 10, W - 10), by the Gaussian window."""
    at = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
    weights = torch.exp(-0.5 * (at / SIGMA) ** 2)
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def load_lpips() -> Lpips | None:
    """Return LPIPS with AlexNet, or None, with a warning, where it can't be had.

    The package lpips fetches AlexNet's weights through torchvision when it is first used."""
    if find_spec("lpips") is None:
        return None
    try:
        import lpips

        model = lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:  # whatever a download raises
        warnings.warn(f"LPIPS is left out: {error}", stacklevel=2)
        return None

    @torch.no_grad()
    def distance(one: Image.Image, other: Image.Image) -> float:
        return float(model(to_pixels(one), to_pixels(other)))

    return distance


def compare(
    ours: list[Written], others: list[Written], lpips: Lpips | None = None, progress: bool = True
) -> list[Pair]:
    """Return the pairs of images of the same name. Raises ValueError where there are none, or
    where two differ in prompt or size."""
    by_name = {each.name: each for each in others}
    matched = [(each, by_name[each.name]) for each in ours if each.name in by_name]
    if not matched:
        raise ValueError(
            "the two folders have no image of the same name; expected the same prompts"
        )
    if lost := len(ours) + len(others) - 2 * len(matched):
        warnings.warn(f"{lost} images are in one folder only and are left out", stacklevel=2)
    pairs = []
    for one, other in tqdm(matched, unit="pair", disable=not progress):
        prompt = str(one.metadata.get("prompt", ""))
        if prompt != other.metadata.get("prompt", ""):
            raise ValueError(
                f"{one.path} and {other.path} have different prompts; compare images of the same"
                " prompts and seeds"
            )
        images = [read_image(each.path).convert("RGB") for each in (one, other)]
        if images[0].size != images[1].size or min(images[0].size) < WINDOW:
            sizes = " and ".join(f"{image.width} x {image.height}" for image in images)
            raise ValueError(
                f"{one.name} has {sizes} pixels; expected one size of {WINDOW} x {WINDOW} or more"
            )
        pairs.append(
            Pair(
                one.name,
                prompt,
                one.path,
                other.path,
                squared_error(*images),
                ssim(*images),
                lpips(*images) if lpips else None,
            )
        )
    return pairs


def summarize(pairs: list[Pair]) -> dict[str, Any]:
    """Return the figures of all pairs. PSNR is over all images together; None where they are all
    the same."""
    distances = [each.lpips for each in pairs if each.lpips is not None]
    return {
        "images": len(pairs),
        "same": sum(each.squared_error == 0 for each in pairs),
        "psnr": finite(psnr_of(sum(each.squared_error for each in pairs) / len(pairs))),
        "worst_psnr": finite(min(each.psnr for each in pairs)),
        "ssim": sum(each.ssim for each in pairs) / len(pairs),
        "worst_ssim": min(each.ssim for each in pairs),
        "lpips": sum(distances) / len(distances) if distances else None,
    }


def finite(value: float) -> float | None:
    """Return the number, or None where it is infinite: JSON has no such number."""
    return value if math.isfinite(value) else None


def worst(pairs: list[Pair], count: int = 10) -> list[Pair]:
    """Return the pairs that lie farthest apart by PSNR, the farthest first; none that are equal."""
    apart = [each for each in pairs if each.squared_error]
    return sorted(apart, key=lambda each: -each.squared_error)[:count]
