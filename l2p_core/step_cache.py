"""Skipping most of the transformer at steps that change little."""

import torch
from torch import Tensor

from .model import Block, Hooks


class StepCache(Hooks):
    """What the main layers after the first added at the last step that ran them, for each image.

    Where the first layer adds nearly what it added then, the others are taken to add what they
    added (First Block Cache of ParaAttention, after TeaCache, arXiv 2411.19108). Each image of a
    batch is decided by itself, so it does not depend on its neighbours. Keeps two tensors of the
    size of all tokens, for one sampling of one batch."""

    def __init__(self, threshold: float, layers: int, **hooks):
        """threshold: mean difference of what the first layer adds, relative to its mean size, up
        to which the other layers are skipped. layers: number of main layers. hooks: see `Hooks`."""
        super().__init__(**hooks)
        self.threshold, self.last = threshold, layers - 1
        self.ran = self.skipped = 0  # images, over all steps
        self.first: Tensor | None = None  # what the first layer added
        self.others: Tensor | None = None  # what all others added
        self.after_first: Tensor | None = None  # the first layer's output, at this step
        self.running: Tensor | None = None  # (B,), True for images whose layers run at this step

    def run_block(
        self,
        stack: str,
        index: int,
        block: Block,
        x: Tensor,
        rope: Tensor,
        lengths: Tensor | None,
        time: Tensor | None,
    ) -> Tensor:
        """Run a block, except for images that skip the main layers at this step."""
        if stack != "layers":
            return super().run_block(stack, index, block, x, rope, lengths, time)
        if index == 0:
            x = self._begin(x, super().run_block(stack, index, block, x, rope, lengths, time))
        else:
            part = self.running
            assert part is not None  # the first layer has set it
            if part.all():
                x = super().run_block(stack, index, block, x, rope, lengths, time)
            elif part.any():
                rope, time = (
                    each if each is None or len(each) == 1 else each[part] for each in (rope, time)
                )
                lengths = lengths if lengths is None else lengths[part.to(lengths.device)]
                x = x.clone()
                x[part] = super().run_block(stack, index, block, x[part], rope, lengths, time)
        if index == self.last:
            self._end(x)
        return x

    def _begin(self, before: Tensor, after: Tensor) -> Tensor:
        """Decide, by the first layer's input and output, which images run the others."""
        added = after - before
        if self.first is None:
            self.first, self.others = added, torch.zeros_like(added)
            self.running = torch.ones(len(added), dtype=torch.bool, device=added.device)
        else:
            change = (added - self.first).abs().mean(dim=(1, 2))
            self.running = change > self.threshold * self.first.abs().mean(dim=(1, 2))
            self.first[self.running] = added[self.running]
        running = int(self.running.sum())
        self.ran += running
        self.skipped += len(added) - running
        self.after_first = after
        return torch.where(self.running[:, None, None], after, after + self.others)

    def _end(self, x: Tensor) -> None:
        """Keep what the layers added to images that ran them."""
        assert self.others is not None  # the first layer has set it
        self.others[self.running] = (x - self.after_first)[self.running]
        self.after_first = None
