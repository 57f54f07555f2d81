"""Which matrices projections use, by their widths.

Shapes: A (r, in) of an input width, B (rows, r) of the rows of a role; with the layout `slice` a projection uses the
first columns of A, and rows of B, of the largest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from ..config import Layout
from ..weights.role import Role

Side = Literal["A", "B"]


class OwnMatrix(NamedTuple):
    """A copy of a shared matrix that one role may come to have of its own.

    Args:
        name: in the log of redraws, such as `blocks.0.attn.qkv.q/A`.
        shared: the shared matrix that it starts from, such as `A768`.
        width: its width, of which the shared matrix may be the longer.
    """

    name: str
    shared: str
    width: int


class Widths(NamedTuple):
    """Widths of projections that share matrices: of their inputs, and of the outputs of their roles.

    Args:
        A, B: the widths.
        informed: names of the matrices A that were chosen for some weights (`A768:0`), by the weight's origin.
    """

    A: frozenset[int]
    B: frozenset[int]
    informed: Mapping[str, str] = {}

    @classmethod
    def of(cls, projections: Iterable[tuple[int, Iterable[Role]]], informed: Mapping[str, str] | None = None) -> Widths:
        """Of weights, each given by its input width and its roles."""
        found = [(width, role.rows) for width, roles in projections for role in roles]
        return cls(frozenset(width for width, _ in found), frozenset(rows for _, rows in found), dict(informed or {}))

    def matrix(self, layout: Layout, side: Side, width: int, origin: str | None = None) -> str:
        """Name of the matrix that a projection uses.

        Args:
            width: of its input for A, its rows for B.
            origin: for A: the path of its weight when it was injected.
        """
        if side == "A" and origin is not None and origin in self.informed:
            return self.informed[origin]
        return f"{side}{width if layout == 'shape' else max(self.A if side == 'A' else self.B)}"

    def matrices(self, layout: Layout) -> dict[str, int]:
        """Widths of all shared matrices, by name."""
        sides = {"A": sorted(self.A), "B": sorted(self.B)}
        if layout == "slice":
            sides = {side: widths[-1:] for side, widths in sides.items()}
        drawn = {f"{side}{width}": width for side, widths in sides.items() for width in widths}
        return drawn | {name: int(name[1:].partition(":")[0]) for name in sorted(set(self.informed.values()))}

    def own(self, layout: Layout, origin: str, width: int, role: Role) -> tuple[OwnMatrix, OwnMatrix]:
        """A and B that a role may have of its own.

        Args:
            origin: the path of its weight when it was injected.
            width: input width of the weight.
        """
        path = f"{origin}.{role.name}"
        return (
            OwnMatrix(f"{path}/A", self.matrix(layout, "A", width, origin), width),
            OwnMatrix(f"{path}/B", self.matrix(layout, "B", role.rows), role.rows),
        )
