"""Whether generated images vary as the training scenes do: a test of fit.

Where a prompt leaves something open, its images should be draws from the training scenes that agree
with it. Three things are compared with what such draws would give, for many prompts with a few
seeds each: how often two images of one prompt repeat each other, how often each combination of size
and place comes, and, where positions are free, how they are distributed."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from .exact import ExactDenoiser
from .world import Prompt, Scene

VALID = 0.95  # share of images that must be as the prompt says
DISTANCE = (0.9, 1.1)  # of the mean distance within a prompt over that of training
FREE_POSITIONS = 20  # more than so many positions of a size count as free


@dataclass(frozen=True)
class Fit:
    """The measured numbers, and what each is allowed to be.

    repeats: share of equal pairs within a prompt. chi2: of the combinations of size and place.
    uneven: largest Kolmogorov-Smirnov distance of x and y. distance: see DISTANCE. The last two are
    None where positions are not free."""

    valid: float
    repeats: float
    expected_repeats: float
    repeats_tolerance: float
    chi2: float
    chi2_limit: float
    uneven: float | None = None
    uneven_limit: float | None = None
    distance: float | None = None

    def failures(self) -> list[str]:
        """Name what is outside its limit."""
        faults = []
        if self.valid < VALID:
            faults.append("valid")
        if abs(self.repeats - self.expected_repeats) > self.repeats_tolerance:
            faults.append("repeats")
        if self.chi2 > self.chi2_limit:
            faults.append("chi2")
        if (
            self.uneven is not None
            and self.uneven_limit is not None
            and self.uneven > self.uneven_limit
        ):
            faults.append("uneven")
        if self.distance is not None and not DISTANCE[0] <= self.distance <= DISTANCE[1]:
            faults.append("distance")
        return faults


def fit(
    scenes: Sequence[Sequence[Scene | None]], prompts: Sequence[Prompt], exact: ExactDenoiser
) -> Fit:
    """Compare the scenes that images show with the training scenes of their prompts.

    scenes: for each prompt what the judge found with each seed; None where it is not as the prompt
    says. exact: of the training scenes."""
    world = exact.world
    free = max(len(world.positions(size)) for size in world.sizes) > FREE_POSITIONS
    pairs = repeated = 0
    expected_repeats: list[float] = []
    modes: Counter[tuple[str, str]] = Counter()
    expected: Counter[tuple[str, str]] = Counter()
    ranks: tuple[list[float], list[float]] = ([], [])
    distances: list[tuple[float, float]] = []
    for found, prompt in zip(scenes, prompts, strict=True):
        valid = [scene for scene in found if scene is not None]
        weights = exact.blind([prompt]).weights[0].double().numpy()  # (M, C, C)
        by_mask = weights.sum((1, 2))
        for one, other in combinations(valid, 2):
            pairs += 1
            repeated += one == other
            expected_repeats.append(float((weights**2).sum()))
        for scene in valid:
            (only,) = scene.objects
            modes[only.size, world.place(-1, only.x, only.y)] += 1
        for (_, size, position), weight in zip(exact.keys, by_mask):
            if weight:
                expected[size, world.place(-1, *position)] += weight * len(valid)
        if free:
            _add_positions(valid, by_mask, exact, ranks, distances)
    r0 = float(np.mean(expected_repeats)) if pairs else 0.0
    chi2 = sum((modes[mode] - count) ** 2 / count for mode, count in expected.items())
    count = sum(map(len, scenes))
    measured = Fit(
        sum(scene is not None for each in scenes for scene in each) / count,
        repeated / pairs if pairs else math.nan,
        r0,
        3 * math.sqrt(r0 * (1 - r0) / pairs) if pairs else 0.0,
        chi2,
        chi2_quantile(len(expected) - 1),
    )
    if not free:
        return measured
    return replace(
        measured,
        uneven=max(_distance_to_even(each) for each in ranks),
        uneven_limit=1.95 / math.sqrt(len(ranks[0])),
        distance=sum(found for found, _ in distances) / sum(wanted for _, wanted in distances),
    )


def _add_positions(
    valid: list[Scene],
    by_mask: np.ndarray,
    exact: ExactDenoiser,
    ranks: tuple[list[float], list[float]],
    distances: list[tuple[float, float]],
) -> None:
    """Add each position's rank among those of training, and distances found and expected.

    A rank is the share of training left of (or above) it, plus half of the share at it."""
    places = np.array([position for _, _, position in exact.keys], dtype=float)
    for scene in valid:
        (only,) = scene.objects
        for axis, value in enumerate((only.x, only.y)):
            below = by_mask[places[:, axis] < value - 0.5].sum()
            at = by_mask[np.abs(places[:, axis] - value) <= 0.5].sum()
            ranks[axis].append(float(below + at / 2))
    pairs = list(combinations(valid, 2))
    if not pairs:
        return
    rng = np.random.default_rng(0)
    one, other = rng.choice(len(places), (2, 500), p=by_mask / by_mask.sum())
    typical = float(np.linalg.norm(places[one] - places[other], axis=1).mean())
    for first, second in pairs:
        a, b = first.objects[0], second.objects[0]
        distances.append((math.dist((a.x, a.y), (b.x, b.y)), typical))


def _distance_to_even(ranks: list[float]) -> float:
    """The Kolmogorov-Smirnov distance of numbers in 0..1 to the even distribution."""
    ordered = np.sort(ranks)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


def chi2_quantile(freedom: int, z: float = 3.0902) -> float:
    """The chi-squared quantile by Wilson and Hilferty (1931); z of 3.0902 is that of 0.999."""
    share = 2 / (9 * max(freedom, 1))
    return max(freedom, 1) * (1 - share + z * math.sqrt(share)) ** 3
