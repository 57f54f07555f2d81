"""Which matrices projections use, by their widths.

Shapes: A (r, in) of an input width, B (rows, r) of the rows of a role; with the layout `slice` a projection uses the
first columns of A, and rows of B, of the largest. By a law that takes them from weights each has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from ..config import Init, Layout
from ..weights.role import Role
from .draws import LAWS

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
        of_weights: input width and rows of each role whose A and B are taken from its weight, by origin and role.
    """

    A: frozenset[int]
    B: frozenset[int]
    informed: Mapping[str, str] = {}
    of_weights: Mapping[str, tuple[int, int]] = {}

    @classmethod
    def of(
        cls,
        weights: Iterable[tuple[str, int, Iterable[Role]]],
        informed: Mapping[str, str] | None = None,
        init: Init = "haar",
    ) -> Widths:
        """Of weights, each given by its origin, its input width and its roles.

        Args:
            init: the law of the matrices.
        """
        found = {f"{origin}.{role.name}": (width, role.rows) for origin, width, roles in weights for role in roles}
        ins, outs = (frozenset(both[side] for both in found.values()) for side in (0, 1))
        return cls(ins, outs, dict(informed or {}), found if LAWS[init].of_weight else {})

    def matrix(self, layout: Layout, side: Side, width: int, of: tuple[str, str] | None = None) -> str:
        """Name of the matrix that a projection uses.

        Args:
            width: of its input for A, its rows for B.
            of: the path of its weight when it was injected, and its role.
        """
        # A compiler that looks up no path has one graph for all blocks: their paths are all that differs.
        if self.informed and of is not None and side == "A" and of[0] in self.informed:
            return self.informed[of[0]]
        if self.of_weights and of is not None and (path := ".".join(of)) in self.of_weights:
            return f"{side}{width}@{_as_name(path)}"
        return f"{side}{width if layout == 'shape' else max(self.A if side == 'A' else self.B)}"

    def matrices(self, layout: Layout) -> dict[str, int]:
        """Widths of all shared matrices, by name."""
        if self.of_weights:
            drawn = {f"A{width}@{_as_name(path)}": width for path, (width, _) in self.of_weights.items()}
            drawn |= {f"B{rows}@{_as_name(path)}": rows for path, (_, rows) in self.of_weights.items()}
        else:
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
        path, of = f"{origin}.{role.name}", (origin, role.name)
        return (
            OwnMatrix(f"{path}/A", self.matrix(layout, "A", width, of), width),
            OwnMatrix(f"{path}/B", self.matrix(layout, "B", role.rows, of), role.rows),
        )


def _as_name(path: str) -> str:
    """A path in the name of a buffer, which has no dots; that of a matrix has no slash before its side."""
    return path.replace("%", "%25").replace("/", "%2F").replace(".", "%2E")
