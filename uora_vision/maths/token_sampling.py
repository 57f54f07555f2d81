"""Token sampling: the gradients of b and d from one token drawn out of every few that follow each other.

Shapes: x (..., in), or (N, in) where rows are taken; drawn (runs,) rows of it; d (roles, r).
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(x: Tensor, every: int) -> Tensor | None:
    """One row of each `every` of x that follow each other, (runs,); the last run may be shorter. None for every = 1.

    Also where no gradient is asked for: the forward of a checkpoint must leave the generator as its recomputation does.
    """
    if every == 1:
        return None
    rows = x.numel() // x.shape[-1]
    offset, rest = torch.randint(every, (-(-rows // every),), device=x.device), rows % every
    if rest:
        offset[-1:] = torch.randint(rest, (1,), device=x.device)
    return offset.add_(torch.arange(0, rows, every, device=x.device))


def depending(d: Tensor, drawn: Tensor | None) -> Tensor:
    """d, in a way that a compiler takes to depend on the draw.

    What the output does not depend on, torch.compile computes in the backward, and random numbers then once more: the
    rows of g would be others than those of u.
    """
    if drawn is None or not torch.compiler.is_compiling():
        return d
    return torch.where((drawn < 0).any(), torch.nan, d)


def weighted_rows(x: Tensor, drawn: Tensor, every: int) -> Tensor:
    """The drawn rows of x, (runs, in), times the lengths of their runs: their sums have those of all rows as mean."""
    rows, rest = x[drawn].mul_(every), len(x) % every
    if rest:
        rows[-1:].mul_(rest / every)
    return rows
