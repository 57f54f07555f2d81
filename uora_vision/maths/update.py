"""The update of one weight as one value.

Shapes: b (rows of all roles,), d (roles, r), A (r, in), B (rows, r).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..weights.matrix import Spans


class Update(NamedTuple):
    """The trained vectors and the frozen matrices of one weight: dW = diag(b) B diag(d) A, role by role.

    A role is one projection of the weight, such as q of a packed qkv. It has its own d and its own rows.

    Args:
        b: (rows of all roles,), role after role.
        d: (roles, r).
        spans: the rows of each role in the weight.
        A: of each role, (r, in); one entry if all of them share it.
        B: of each role, (rows, r); one entry if all of them share it.
    """

    b: Tensor
    d: Tensor
    spans: Spans
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]

    def pack(self) -> tuple[Any, ...]:
        """As the last arguments of an autograd function: autograd and compilers see only tensors given one by one.

        Returns:
            What is no tensor, b, d, and the matrices.
        """
        return (self.spans, len(self.A)), self.b, self.d, *self.A, *self.B

    @classmethod
    def unpack(cls, spec: tuple[Spans, int], b: Tensor, d: Tensor, *matrices: Tensor) -> Update:
        """Inverse of `pack`."""
        spans, n_a = spec
        return cls(b, d, spans, matrices[:n_a], matrices[n_a:])

    def gradients(self, b: Tensor | None, d: Tensor | None) -> tuple[Tensor | None, ...]:
        """What a backward returns for what `pack` gave, from the gradients of b and d."""
        return None, b, d, *[None] * (len(self.A) + len(self.B))

    def to(self, dtype: torch.dtype) -> Update:
        """All tensors in a type."""
        A, B = (tuple(m.to(dtype) for m in matrices) for matrices in (self.A, self.B))
        return Update(self.b.to(dtype), self.d.to(dtype), self.spans, A, B)
