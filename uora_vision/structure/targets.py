"""What a plan consists of: adapted projections, and weights that were left."""

from __future__ import annotations

from dataclasses import dataclass

from ..weights.matrix import Form
from ..weights.role import ATTENTION, CONV, MLP, OTHER, Role
from .paths import weight_path

GROUPS = {"attention": ATTENTION, "mlp": MLP, "conv": CONV, "other": OTHER}


@dataclass(frozen=True)
class Projection:
    """One weight to adapt.

    Args:
        module_path: of the module that holds it.
        tensor: name of the parameter in the module.
        form: what its dimensions are.
        shape: (out, in) of the weight as a matrix.
        roles: the adapted roles, by ascending first row.
        rule: which rule knew it.
        block: number of its block, None outside of blocks.
        read: whether the model may take the tensor itself rather than call the module.
        seen: what a trace saw consume it, such as `linear at eva.py:262`; empty without a trace.
        origin: of a saved adapter, its path before modules were renamed; None if it is the same.
    """

    module_path: str
    tensor: str
    form: Form
    shape: tuple[int, int]
    roles: tuple[Role, ...]
    rule: str
    block: int | None
    read: bool = False
    seen: tuple[str, ...] = ()
    origin: str | None = None

    @property
    def path(self) -> str:
        """Of the module, and the tensor's name if that is not `weight`."""
        return weight_path(self.module_path, self.tensor)

    @property
    def width(self) -> int:
        """Its input width."""
        return self.shape[1]

    def parameters(self, rank: int) -> int:
        return sum(role.rows + rank for role in self.roles)


@dataclass(frozen=True)
class Skipped:
    """A weight that is left as it is, and why."""

    path: str
    shape: tuple[int, int]
    reason: str
