"""Leaving out most of the transformer at steps that change little."""
from torch import Tensor


class StepCache:
    """What the main layers after the first added at the last step that ran them, for one sampling of one batch.

    Where the first layer does nearly what it did then, the others are taken to add what they added (First Block Cache of
    ParaAttention, after TeaCache, arXiv 2411.19108). Keeps two tensors of the size of all tokens."""

    def __init__(self, threshold: float):
        """threshold: mean difference of what the first layer adds, as a share of its mean size, up to which it is "nearly"."""
        self.threshold, self.ran, self.skipped = threshold, 0, 0
        self.first: Tensor | None = None  # what the first layer added
        self.others: Tensor | None = None  # what went into the second; once all have run, what they added

    def recall(self, before: Tensor, after: Tensor) -> Tensor | None:
        """What comes out of all layers, by what went into the first and came out; None where the others must run."""
        first = after - before
        if self.first is not None and (first - self.first).abs().mean() <= self.threshold * self.first.abs().mean():
            self.skipped += 1
            return after + self.others
        self.first, self.others, self.ran = first, after, self.ran + 1
        return None

    def note(self, out: Tensor) -> None:
        """What came out of all layers, which have run."""
        self.others = out - self.others
