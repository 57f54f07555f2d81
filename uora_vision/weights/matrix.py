"""How projections lie in a tensor: the tensor as a matrix (out, in), and a projection as some of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Form = Literal["matrix", "transposed", "kernel", "stack", "stack_transposed"]
"""What the dimensions of a weight are:

`matrix` (out, in), as of nn.Linear; `transposed` (in, *out), as of Conv1D in transformers, or with the outputs of each
head apart; `kernel` (out, *in), as (out, in, *size) of convolutions, where a row is a flattened kernel; `stack`
(n, out, in) and `stack_transposed` (n, in, out), as of the experts of a mixture, whose rows follow one another.
"""

FORMS: tuple[Form, ...] = get_args(Form)


class Span(NamedTuple):
    """Rows of a matrix: from `start`, runs of `block` rows, `stride` apart, `rows` in all. A `block` of 0 is one run.

    Packed weights that keep the parts of a head together have runs: q of (heads, 3, head_dim) is
    Span(0, heads * head_dim, head_dim, 3 * head_dim).
    """

    start: int
    rows: int
    block: int = 0
    stride: int = 0

    @property
    def end(self) -> int:
        """One past the last row."""
        return self.start + (self.rows if not self.block else (self.rows // self.block - 1) * self.stride + self.block)

    def indices(self) -> list[int]:
        """Every row, in order."""
        block, stride = (self.block, self.stride) if self.block else (self.rows, self.rows)
        return [self.start + run * stride + i for run in range(self.rows // block) for i in range(block)]


Spans = tuple[Span, ...]


def take(t: Tensor, span: Span) -> Tensor:
    """The rows of a span, (out, n) -> (rows, n): a view if they are one run."""
    if not span.block:
        return t.narrow(0, span.start, span.rows)
    return _runs(t, span).transpose(1, 2).reshape(span.rows, t.shape[1])


def add_(t: Tensor, span: Span, value: Tensor) -> None:
    """Add (rows, n) to the rows of a span, in place."""
    if not span.block:
        t.narrow(0, span.start, span.rows).add_(value)
        return
    # By plain views, the last run apart: torch.compile would zero what lies between the runs of an unfolded tensor.
    runs, last = span.rows // span.block - 1, span.rows - span.block
    whole = t.narrow(0, span.start, runs * span.stride).unflatten(0, (runs, span.stride))
    whole[:, : span.block].add_(value[:last].unflatten(0, (runs, span.block)))
    t.narrow(0, span.end - span.block, span.block).add_(value[last:])


def place(value: Tensor, spans: Spans, out: int) -> Tensor:
    """(sum of rows, n), span after span -> (out, n) in the order of the matrix; rows outside all spans are 0."""
    if in_order(spans, out):
        return value
    whole = value.new_zeros(out, value.shape[1])
    for span, part in zip(spans, value.split([s.rows for s in spans]), strict=True):
        add_(whole, span, part)
    return whole


def in_order(spans: Spans, out: int) -> bool:
    """Whether the spans are the whole matrix, one after the other."""
    row = 0
    for span in spans:
        if span.start != row or span.block:
            return False
        row += span.rows
    return row == out


def disjoint(spans: Sequence[Span]) -> bool:
    """Whether no row is in two spans."""
    rows = [row for span in spans for row in span.indices()]
    return len(rows) == len(set(rows))


def matrix_shape(shape: Sequence[int], form: Form) -> tuple[int, int]:
    """(out, in) of a tensor of this shape."""
    if form == "transposed":
        return torch.Size(shape[1:]).numel(), shape[0]
    if form == "stack":
        return shape[0] * shape[1], shape[2]
    if form == "stack_transposed":
        return shape[0] * shape[2], shape[1]
    return shape[0], torch.Size(shape[1:]).numel()


def to_matrix(t: Tensor, form: Form) -> Tensor:
    """A tensor as (out, in): a view where one exists, so of every form but `stack_transposed`."""
    if form == "transposed":
        return t.flatten(1).t()
    if form == "stack_transposed":
        t = t.transpose(-1, -2)
    if form in ("stack", "stack_transposed"):
        return t.reshape(-1, t.shape[-1])
    return t.flatten(1) if form == "kernel" else t


def from_matrix(matrix: Tensor, form: Form, shape: Sequence[int]) -> Tensor:
    """Inverse of `to_matrix`: a view of the matrix as a tensor of the given shape."""
    if form == "transposed":
        return matrix.t().view(shape)
    if form == "stack_transposed":
        return matrix.view(shape[0], shape[2], shape[1]).transpose(1, 2)
    return matrix.view(shape)


def _runs(t: Tensor, span: Span) -> Tensor:
    """(out, n) -> (runs, n, block), a view."""
    return t.narrow(0, span.start, span.end - span.start).unfold(0, span.block, span.stride)
