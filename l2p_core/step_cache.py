"""Leaving out most of the transformer at steps that change little."""
from collections.abc import Callable

from torch import Tensor


class StepCache:
    """What the main layers after the first added at the last step that ran them, for one sampling of one batch.

    Where the first layer does nearly what it did then, the others are taken to add what they added (First Block Cache of
    ParaAttention, after TeaCache, arXiv 2411.19108). Keeps two tensors of the size of all tokens."""

    def __init__(self, threshold: float):
        """threshold: mean difference of what the first layer adds, as a share of its mean size, up to which it is "nearly"."""
        self.threshold, self.ran, self.skipped = threshold, 0, 0
        self.first: Tensor | None = None
        self.others: Tensor | None = None

    def run(self, x: Tensor, after_first: Tensor, others: Callable[[Tensor], Tensor]) -> Tensor:
        """What comes out of all layers. x: what went into the first; others: all after it."""
        first = after_first - x
        if self.first is not None and (first - self.first).abs().mean() <= self.threshold * self.first.abs().mean():
            self.skipped += 1
            return after_first + self.others
        out = others(after_first)
        self.first, self.others, self.ran = first, out - after_first, self.ran + 1
        return out
