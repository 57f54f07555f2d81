"""What an adapted projection costs, and the choices between its forms that follow; docs/performance.md derives both.

Shapes: N tokens, x (N, in), go through a frozen W (out, in) with an update of rank r. Operations are those of the
matrix products, an addition and a multiplication counting as two; what is done element by element is far below them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A projection and what goes through it.

    Args:
        tokens: N, of the whole batch.
        out: rows of W.
        width: columns of W, `in`.
        rank: r.
        rows: rows of W that are adapted; None for all.
        matrices: matrices A that its roles use: 1, or one per role if roles have rows of their own.
        sampling: of how many tokens one gives the gradients of b and d.
    """

    tokens: int
    out: int
    width: int
    rank: int
    rows: int | None = None
    matrices: int = 1
    sampling: int = 1

    @property
    def base(self) -> int:
        """The frozen product, forward; the gradient for the input is as much again."""
        return 2 * self.tokens * self.out * self.width

    @property
    def fold(self) -> int:
        """W + L A. Once in the forward, once more in the backward."""
        return 2 * self.rank * self._rows * self.width

    @property
    def reduce(self) -> int:
        """u = x A^T."""
        return 2 * self.tokens * self.rank * self.width * self.matrices

    @property
    def expand(self) -> int:
        """u L^T. P = g^T u and g L are as much."""
        return 2 * self.tokens * self.rank * self._rows

    @property
    def forward(self) -> int:
        """Beyond `base`, without gradients. Of roles with an A each, L is as wide as all together, with zeros."""
        return self.fold if folds(self.tokens, self.out, self.width) else self.reduce + self.expand * self.matrices

    @property
    def step(self) -> int:
        """Forward, gradient for the input, and gradients of b and d, beyond twice `base`."""
        if self._keeps_input:
            vectors = 2 * self._rows * self.width * (self._drawn + self.rank)
        elif self.sampling == 1 and not folds(self.tokens, self.out, self.width):
            vectors = self.expand  # the factored forward has u already
        else:
            vectors = 2 * self._drawn * self.rank * (self.width * self.matrices + self._rows)
        return 2 * self.forward + vectors

    @property
    def kept(self) -> int:
        """Numbers kept for the backward: u, or x, of the tokens that give the gradients of b and d."""
        return self._drawn * (self.width if self._keeps_input else self.rank * self.matrices)

    @property
    def _keeps_input(self) -> bool:
        return keeps_input(self._rows, self.width, self.rank, self.matrices)

    @property
    def _drawn(self) -> int:
        return -(-self.tokens // self.sampling)

    @property
    def _rows(self) -> int:
        return self.out if self.rows is None else self.rows


def folds(tokens: int, out: int, width: int) -> bool:
    """Whether forming W + L A, 2 r in out, costs less than the products of the tokens, 2 N r (in + out).

    With and without gradients alike, so that both compute the same y (re-entrant checkpointing relies on it).
    """
    return tokens * (width + out) > width * out


def keeps_input(rows: int, width: int, rank: int, matrices: int) -> bool:
    """Whether P costs less as (g^T x) A^T, N in out, than as x A^T and g^T u, N r (in + out)."""
    return rank * (width * matrices + rows) > width * rows


def joins(tokens: int, out: int, width: int) -> bool:
    """Whether [x, u] [W, L]^T moves less than u L^T, written and read once more, and the bias after it.

    The first copies W and x, 2 in out + 2 N in numbers; the second passes four times over the output, 4 N out.
    """
    return tokens * (2 * out - width) > out * width
