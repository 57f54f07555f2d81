"""A saved adapter in memory, and everything that can be checked of it without a model.

`docs/format.md` describes the format; `folder.py` reads and writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from ..config import UoraConfig
from ..maths.informed import unpack
from ..maths.redraw_log import BankState, Redraw, draw_counts
from ..maths.widths import OwnMatrix, Widths
from ..weights.role import Role

SaveBanks = Literal["changed", "all"]


@dataclass(frozen=True)
class StoredProjection:
    """An adapted weight as the file has it.

    Args:
        path: of the module, and the tensor's name if that is not `weight`, in the model that it was saved from.
        origin: the path under which its own matrices were first drawn; another than `path` once modules were renamed.
        width: input width.
        block: number of its block in the model, None outside of blocks or if it is not known.
        roles: by ascending first row.
    """

    path: str
    origin: str
    width: int
    block: int | None
    roles: tuple[Role, ...]

    @property
    def rows(self) -> int:
        """How many rows the weight has at least."""
        return max(role.span.end for role in self.roles)

    @property
    def keys(self) -> tuple[str, ...]:
        """Of its roles: block and role, such as `3/attn.q`. They survive renamed modules."""
        where = "" if self.block is None else f"{self.block}/"
        return tuple(f"{where}{role.label}" for role in self.roles)

    def length(self, rank: int) -> int:
        """Of its b and d together."""
        return sum(role.rows + rank for role in self.roles)


@dataclass(frozen=True)
class Identity:
    """Which base an adapter was made for.

    Args:
        class_name: of the model.
        architecture: its name in timm, if it is timm's.
        name: under which its weights were published, such as `timm/vit_base_patch16_224.augreg_in21k`, or the last part
            of the folder that they came from; None for weights that were never trained.
        parameter_tensors: how many parameters it has besides its head.
        fingerprint: of the adapted weights, see `fingerprint.py`; None if they were quantised or in float16.
        sketch: some of their values in bfloat16, (n,), by which a quantised copy is known; None if unknown.
    """

    class_name: str
    architecture: str | None = None
    name: str | None = None
    parameter_tensors: int | None = None
    fingerprint: str | None = None
    sketch: tuple[float, ...] | None = None

    @property
    def shown(self) -> str:
        return self.name or self.architecture or self.class_name


@dataclass(frozen=True)
class Section:
    """What an adapter may have besides, see `sections.py`.

    Args:
        value: of its field in the description, as JSON has it.
        tensors: by name, without that of the section.
    """

    value: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """A saved adapter.

    Args:
        config: its options.
        projections: the adapted weights.
        vector: b and d of the first projection, role after role, then of the next one, (n,).
        parts: trained parts of the base by name.
        log: the redraws of its banks.
        identity: of its base.
        bank_fingerprint: of A and B after the log; None if unknown.
        rows: every redrawn row, matrix after matrix by name, (n,) float32; None if it is not in the file.
        shared: the shared matrices, by name, (n,) float32; None if they are not in the file.
        versions: of the libraries that wrote it.
        trained: names of all trained parts of the base, by which each is declared; None before version 4.
        sections: what it has besides, by name.
    """

    config: UoraConfig
    projections: tuple[StoredProjection, ...]
    vector: Tensor
    parts: dict[str, Tensor]
    log: list[Redraw]
    identity: Identity
    bank_fingerprint: str | None = None
    rows: Tensor | None = None
    shared: Tensor | None = None
    versions: dict[str, str] = field(default_factory=dict)
    trained: tuple[str, ...] | None = None
    sections: dict[str, Section] = field(default_factory=dict)

    @cached_property
    def vectors(self) -> list[tuple[Tensor, Tensor]]:
        """b (rows,) and d (roles, rank) of every projection: views."""
        rank, out, start = self.config.rank, [], 0
        for p in self.projections:
            middle, end = start + sum(role.rows for role in p.roles), start + p.length(rank)
            out.append((self.vector[start:middle], self.vector[middle:end].view(-1, rank)))
            start = end
        return out

    @property
    def widths(self) -> Widths:
        """Of the adapted projections."""
        return Widths.of(((p.origin, p.width, p.roles) for p in self.projections), self.informed[0], self.config.init)

    @cached_property
    def informed(self) -> tuple[dict[str, str], dict[str, Tensor]]:
        """The name of its A by the origin of each weight that has informed rows, and these (r, in) float32 by name.

        Raises:
            FormatError: the tensors of the section are not such rows.
        """
        section = self.sections.get("rows")
        if section is None:
            return {}, {}
        members = {name: [self.projections[i] for i in numbers] for name, numbers in section.value.items()}
        widths = {name: found[0].width for name, found in members.items()}
        names = {p.origin: name for name, found in members.items() for p in found}
        return names, unpack(section.tensors, widths, self.config.rank)

    @property
    def about(self) -> dict[str, Any]:
        """What it says of its task: `labels` and `preprocessing`, where it has them."""
        return {name: self.sections[name].value for name in ("labels", "preprocessing") if name in self.sections}

    @property
    def matrices(self) -> dict[str, int]:
        """Widths of the shared matrices, by name."""
        return self.widths.matrices(self.config.layout)

    @property
    def own(self) -> dict[str, OwnMatrix]:
        """Every matrix that a layer may have of its own, by name."""
        widths, layout = self.widths, self.config.layout
        roles = [(p, role) for p in self.projections for role in p.roles]
        return {own.name: own for p, role in roles for own in widths.own(layout, p.origin, p.width, role)}

    def bank_state(self) -> BankState | None:
        """What redraws made of the banks, as far as the file holds it; None if the log must be replayed."""
        if self.rows is None:
            return None
        state, start, widths = BankState(list(self.log)), 0, self._widths()
        for name, draws in sorted(draw_counts(self.log, self.config.rank).items()):
            indices = draws.nonzero().squeeze(1)
            end = start + len(indices) * widths[name]
            rows, start = self.rows[start:end].view(len(indices), -1), end
            state.draws[name] = draws
            if name in self.matrices:
                state.rows[name] = indices, rows
            else:
                state.own[name] = rows
        return state

    def first(self) -> dict[str, Tensor]:
        """The shared matrices that the file holds, each (r, width): informed ones, and all others if saved so."""
        if self.shared is None:
            return self.informed[1]
        parts = self.shared.split([self.config.rank * width for width in self.drawn.values()])
        drawn = {name: part.view(self.config.rank, -1) for name, part in zip(self.drawn, parts, strict=True)}
        return drawn | self.informed[1]

    @property
    def drawn(self) -> dict[str, int]:
        """Widths of the shared matrices that are drawn from the seed, by name, in order."""
        return {name: width for name, width in sorted(self.matrices.items()) if name not in self.informed[1]}

    def _widths(self) -> dict[str, int]:
        return self.matrices | {own.name: own.width for own in self.own.values()}
