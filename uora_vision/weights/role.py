"""One projection inside a weight: what it does, and which rows it has."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .matrix import Span


@dataclass(frozen=True)
class Role:
    """One projection inside a weight.

    Args:
        name: what it does: q, k, v, proj, fc1, fc2, ...
        group: `attn`, `mlp` or `conv`.
        start: its first output row in the weight.
        rows: how many output rows it has.
        block: length of its runs of rows, for weights that interleave projections; 0 if its rows are one run.
        stride: distance between the first rows of two runs.
    """

    name: str
    group: str
    start: int
    rows: int
    block: int = 0
    stride: int = 0

    @property
    def label(self) -> str:
        return f"{self.group}.{self.name}"

    @property
    def kind(self) -> str:
        """The label without the number that tells experts, and groups of a convolution, apart."""
        return re.sub(r"_\d+$", "", self.label)

    @property
    def span(self) -> Span:
        return Span(self.start, self.rows, self.block, self.stride)


ATTENTION, MLP, CONV, OTHER = "attn", "mlp", "conv", "other"
