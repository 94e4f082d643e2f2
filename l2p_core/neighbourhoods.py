"""Attention within neighbourhoods, for images above the trained resolution.

Image tokens attend to those of their own window and to the prompt. Every second block shifts its
windows by half a window, so that neighbours meet (Swin Transformer, arXiv 2103.14030). Prompt
tokens attend to all."""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (B, heads, S, head) → (B, S, D)


class Neighbourhoods(NamedTuple):
    """The windows of one block."""

    height: int  # of the grid of image tokens
    width: int
    side: int  # of a window, in tokens
    shift: int  # width of the first window of each row and column, in tokens; 0 for a whole one

    def windows(self) -> list[tuple[slice, slice]]:
        """Rows and columns of the windows, which cover the grid and do not overlap."""

        def along(length: int) -> list[slice]:
            inside = range(self.shift or self.side, length, self.side)
            edges = [0, *inside, length]
            return [slice(start, stop) for start, stop in zip(edges, edges[1:])]

        return list(product(along(self.height), along(self.width)))


def attend_in_neighbourhoods(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    where: Neighbourhoods,
) -> Tensor:
    """Return `attend` of q, k and v, (B, heads, S, head) → (B, S, D), image tokens each within
    their window.

    The first tokens are the image's, in rows. lengths: (B,) tokens of each member, or None; what is
    beyond becomes 0."""
    if lengths is not None:
        out = q.new_zeros(len(q), q.shape[2], q.shape[1] * v.shape[3])
        for member, length in enumerate(lengths.tolist()):
            one = slice(member, member + 1)
            own_q, own_k, own_v = (each[one, :, :length] for each in (q, k, v))
            found = attend_in_neighbourhoods(attend, own_q, own_k, own_v, None, where)
            out[one, :length] = found
        return out

    grid, tokens = (where.height, where.width), where.height * where.width
    out = q.new_empty(len(q), q.shape[2], q.shape[1] * v.shape[3])
    image = out[:, :tokens].unflatten(1, grid)  # (B, h, w, D), a view
    for rows, columns in where.windows():

        def inside(x: Tensor, rows: slice = rows, columns: slice = columns) -> Tensor:
            return x[:, :, :tokens].unflatten(2, grid)[:, :, rows, columns].flatten(2, 3)

        keys, values = (torch.cat([inside(each), each[:, :, tokens:]], dim=2) for each in (k, v))
        found = attend(inside(q), keys, values)
        image[:, rows, columns] = found.unflatten(1, image[0, rows, columns].shape[:2])
    if q.shape[2] > tokens:
        out[:, tokens:] = attend(q[:, :, tokens:], k, v)
    return out
