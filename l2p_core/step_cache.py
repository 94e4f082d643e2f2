"""Skipping most of the transformer at steps that change little."""

from torch import Tensor

from .model import Block, Hooks


class StepCache(Hooks):
    """What the main layers after the first added at the last step that ran them, for one sampling
    of one batch.

    Where the first layer adds nearly what it added then, the others are taken to add what they
    added (First Block Cache of ParaAttention, after TeaCache, arXiv 2411.19108). Keeps two tensors
    of the size of all tokens."""

    def __init__(self, threshold: float, layers: int, **hooks):
        """threshold: mean difference of what the first layer adds, relative to its mean size, below
        which the other layers are skipped. layers: number of main layers. hooks: see `Hooks`."""
        super().__init__(**hooks)
        self.threshold, self.last = threshold, layers - 1
        self.ran = self.skipped = 0
        self.skipping = False
        self.first: Tensor | None = None  # what the first layer added
        # what went into the second; once all have run, what they added
        self.others: Tensor | None = None

    def run_block(
        self,
        stack: str,
        index: int,
        block: Block,
        x: Tensor,
        rope: Tensor,
        mask: Tensor | None,
        time: Tensor | None,
    ) -> Tensor:
        """Run a block, unless it is a main layer of a step that skips it."""
        if stack != "layers":
            return super().run_block(stack, index, block, x, rope, mask, time)
        if index and self.skipping:
            return x
        out = super().run_block(stack, index, block, x, rope, mask, time)
        if index == 0:
            known = self.recall(x, out)
            self.skipping = known is not None
            out = out if known is None else known
        if index == self.last and not self.skipping:
            self.note(out)
        return out

    def recall(self, before: Tensor, after: Tensor) -> Tensor | None:
        """Return the output of all layers, by the input and output of the first; None where the
        others must run."""
        first = after - before
        if (
            self.first is not None
            and (first - self.first).abs().mean() <= self.threshold * self.first.abs().mean()
        ):
            self.skipped += 1
            return after + self.others
        self.first, self.others = first, after
        self.ran += 1
        return None

    def note(self, out: Tensor) -> None:
        """Keep the output of all layers, which have run."""
        self.others = out - self.others
