"""What redraws made of a bank: a log from which, with the seed, its matrices are rebuilt.

Shapes: of a redraw of k rows, indices, draws and alpha (k,); of a packed log of n rows, entries (n, 5), alpha (n,).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import FormatError

Interpolation = Literal["linear", "spherical"]

_INTERPOLATIONS: tuple[Interpolation, ...] = ("linear", "spherical")


@dataclass(frozen=True)
class Redraw:
    """Rows of one matrix redrawn at one step.

    Args:
        step: optimizer step, counted from 1.
        matrix: name of the matrix, such as `A768`, or `blocks.0.attn.qkv.q/A` for a layer's own copy.
        indices: (k,) int64, ascending: which directions.
        draws: (k,) int64: how often each has been drawn in this matrix, this time included.
        alpha: (k,) float64: share that is kept of each old row.
        interpolation: how old and fresh rows are joined.
    """

    step: int
    matrix: str
    indices: Tensor
    draws: Tensor
    alpha: Tensor
    interpolation: Interpolation


@dataclass
class BankState:
    """What redraws have made of a bank; nothing for a bank as it was first drawn.

    Args:
        log: the redraws, in order.
        draws: by matrix, how often each direction was drawn again, (r,) int64.
        rows: by shared matrix, the directions that changed (k,) and what they are now (k, width), float32 on the CPU.
        own: by a layer's own matrix, its rows (k, width), float32 on the CPU, for the directions that were drawn.
    """

    log: list[Redraw] = field(default_factory=list)
    draws: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)


def pack_log(log: list[Redraw]) -> tuple[dict[str, Tensor], list[str]]:
    """A log as tensors for a file: `entries` (n, 5) int32 (step, matrix, index, draw, interpolation), `alpha` (n,)
    float64, and the names of the matrices."""
    names = sorted({event.matrix for event in log})
    number = {name: i for i, name in enumerate(names)}
    entries = [
        torch.stack(
            [
                torch.full_like(e.indices, e.step),
                torch.full_like(e.indices, number[e.matrix]),
                e.indices,
                e.draws,
                torch.full_like(e.indices, _INTERPOLATIONS.index(e.interpolation)),
            ],
            dim=1,
        )
        for e in log
    ]
    empty = torch.zeros(0, 5, dtype=torch.int64)
    alpha = torch.cat([e.alpha for e in log]) if log else torch.zeros(0, dtype=torch.float64)
    return {"entries": torch.cat([empty, *entries]).to(torch.int32), "alpha": alpha}, names


def unpack_log(tensors: dict[str, Tensor], names: list[str]) -> list[Redraw]:
    """Inverse of `pack_log`.

    Raises:
        FormatError: the tensors are not a log.
    """
    entries, alpha = tensors["entries"].to(torch.int64), tensors["alpha"]
    if entries.dim() != 2 or entries.shape[1] != 5 or alpha.shape != entries.shape[:1]:
        raise FormatError(f"the log of redraws has shapes {tuple(entries.shape)} and {tuple(alpha.shape)}")
    if len(entries) and (entries.min() < 0 or entries[:, 1].max() >= len(names) or entries[:, 4].max() > 1):
        raise FormatError("the log of redraws holds numbers out of range; the file is damaged")
    key = entries[:, [0, 1, 4]]
    starts = torch.ones(len(key), dtype=torch.bool)
    starts[1:] = (key[1:] != key[:-1]).any(1) | (entries[1:, 2] <= entries[:-1, 2])
    bounds = [*starts.nonzero().squeeze(1).tolist(), len(key)]
    return [
        Redraw(
            int(rows[0, 0]),
            names[int(rows[0, 1])],
            rows[:, 2],
            rows[:, 3],
            alpha[i:j],
            _INTERPOLATIONS[int(rows[0, 4])],
        )
        for i, j in itertools.pairwise(bounds)
        if len(rows := entries[i:j])
    ]


def draw_counts(log: list[Redraw], rank: int) -> dict[str, Tensor]:
    """How often each direction was drawn again, (r,) int64, by matrix."""
    draws: dict[str, Tensor] = {}
    for event in log:
        draws.setdefault(event.matrix, torch.zeros(rank, dtype=torch.int64))[event.indices] = event.draws
    return draws
