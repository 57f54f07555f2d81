"""The low-rank branches of a batch whose samples have different adapters.

A and B are shared, so one product with each serves all samples, and what differs is a gather of d and b:

    y_s = x_s W^T + bias + ((x_s A^T * d_s) B^T) * b_s        for sample s

Rows that an adapter has redrawn are left out of the shared products (their d is 0 there) and added by small products
of that adapter's own rows. Adapters of another rank, seed, layout or plan have a table of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..lifecycle.entry import Entry, Placement
from ..maths.bank import Bank
from ..maths.forms import WIDE
from ..maths.redraw_log import BankState
from ..structure.targets import Projection
from ..weights.matrix import in_order
from ..weights.role import Role
from .find_samples import Pattern


@dataclass(frozen=True)
class Fix:
    """The redrawn rows of the adapters of a batch, of one role; filled up to K for all with entries of weight 0.

    Args:
        a: rows of A, (adapters, K, in).
        bm: columns of B as rows, (adapters, K, rows).
        d: (adapters, K).
    """

    a: Tensor
    bm: Tensor
    d: Tensor


@dataclass(frozen=True)
class Table:
    """What the adapters of one plan and bank have at one weight.

    Args:
        roles: of the weight.
        a: of each role, (r, in); one tensor where some share it.
        bm: of each role, (rows, r).
        b: of each role, (adapters, rows); 0 for adapters of other plans.
        d: of each role, (adapters, r).
        fixes: of each role.
    """

    roles: tuple[Role, ...]
    a: tuple[Tensor, ...]
    bm: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    d: tuple[Tensor, ...]
    fixes: tuple[Fix | None, ...]

    def narrow(self, start: int, rows: int) -> Table:
        """Of the weight's rows from `start`, as a weight of their own.

        Raises:
            StateError: a role lies across the border.
        """
        inside = [k for k, role in enumerate(self.roles) if start <= role.start and role.span.end <= start + rows]
        if any(k not in inside and r.start < start + rows and start < r.span.end for k, r in enumerate(self.roles)):
            raise StateError("the model takes a part of a weight that cuts through one of its projections")
        roles = tuple(replace(self.roles[k], start=self.roles[k].start - start) for k in inside)
        parts = (tuple(t[k] for k in inside) for t in (self.a, self.bm, self.b, self.d, self.fixes))
        return Table(roles, *parts)  # type: ignore[arg-type]

    def update(self, x: Tensor, y: Tensor, where: Pattern, index: Tensor, dtype: torch.dtype) -> Tensor:
        """y plus the low-rank branches of x, in the type of y: (..., in), (..., out) -> (..., out)."""
        batch = len(index)
        xs, axis = where.split(x.to(dtype), batch)
        shape = [1] * axis + [batch] + [1] * (xs.dim() - axis - 2) + [-1]

        def spread(t: Tensor) -> Tensor:
            """(adapters, n) -> each sample's, where the samples are in xs."""
            return t.to(dtype)[index].view(shape)

        us: dict[int, Tensor] = {}
        parts = []
        for k, (bm, d, fix) in enumerate(zip(self.bm, self.d, self.fixes, strict=True)):
            a = self.a[k]
            u = us[id(a)] if id(a) in us else us.setdefault(id(a), xs @ a.to(dtype).t())
            z = (u * spread(d)) @ bm.to(dtype).t()
            parts.append(z if fix is None else z + _own(xs, axis, fix, index, dtype))
        z = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        b = spread(self.b[0] if len(self.b) == 1 else torch.cat(self.b, dim=-1))
        ys, spans = where.split(y, batch)[0], tuple(role.span for role in self.roles)
        if in_order(spans, y.shape[-1]) and y.dtype == dtype and dtype in WIDE:
            return torch.addcmul(ys, z, b).reshape(y.shape)
        wide = torch.promote_types(y.dtype, torch.float32)  # the sum is rounded once
        out, update = ys.to(wide), z.to(wide) * b.to(wide)
        if in_order(spans, y.shape[-1]):
            out = out + update
        else:
            rows = torch.tensor([i for span in spans for i in span.indices()], device=y.device)
            out = out.index_add(-1, rows, update)
        return out.to(y.dtype).reshape(y.shape)


def tables(
    placement: Placement, bank: Bank, members: list[Entry | None]
) -> Iterator[tuple[nn.Module, Projection, Table]]:
    """For each weight of a plan: what its adapters have there."""
    weight: Any = placement.modules[0]._parameters[placement.projections[0].tensor]
    vectors = [None if e is None else e.values().to(weight.device) for e in members]
    some = next(v for v in vectors if v is not None)
    parts = iter(
        torch.stack([torch.zeros_like(some) if v is None else v for v in vectors]).split(placement.sizes, dim=1)
    )
    states = [BankState() if e is None else e.state for e in members]
    shared: dict[tuple[str, str], tuple[Tensor, ...] | None] = {}
    for owner, p in zip(placement.modules, placement.projections, strict=True):
        b, d = next(parts), next(parts).unflatten(1, (len(p.roles), placement.rank))
        As, matrices, ds, fixes = [], [], [], []
        weight_origin = p.origin or p.path
        for k, role in enumerate(p.roles):
            sides: list[tuple[Literal["A", "B"], int]] = [("A", p.shape[1]), ("B", role.rows)]
            origin = f"{weight_origin}.{role.name}"
            of = weight_origin, role.name
            names = [(bank.matrix(side, width, of), f"{origin}/{side}", width) for side, width in sides]
            own = any(state.draws.keys() & {name for _, name, _ in names} for state in states)
            key = names[0][0], names[1][0]
            if own or key not in shared:
                rows = _redrawn(bank, states, names)
                shared |= {} if own else {key: rows}
            else:
                rows = shared[key]
            dk, fix = d[:, k], None
            if rows is not None:
                index, weights, a_rows, b_rows = rows
                dfix = dk.gather(1, index) * weights.to(dk)
                dk, fix = (
                    dk.scatter_add(1, index, -dfix),
                    Fix(a_rows[..., : p.shape[1]], b_rows[..., : role.rows], dfix),
                )
            As.append(bank.a(p.shape[1], of))
            matrices.append(bank.b(role.rows, of))
            ds.append(dk)
            fixes.append(fix)
        spans = b.split([role.rows for role in p.roles], dim=1)
        yield (
            owner,
            p,
            Table(p.roles, tuple(As), tuple(matrices), spans, tuple(ds), tuple(fixes)),
        )


def _redrawn(bank: Bank, states: list[BankState], names: list[tuple[str, str, int]]) -> tuple[Tensor, ...] | None:
    """The directions (adapters, K) that adapters have redrawn at one role, whether each is one or only fills up, and
    the rows of A and of B there."""
    rank = bank.config.rank
    masks = torch.zeros(len(states), rank, dtype=torch.bool, device="cpu")
    for mask, state in zip(masks, states, strict=True):
        for matrix, own, _ in names:
            for name in (matrix, own):
                if name in state.draws:
                    mask |= state.draws[name] > 0
    most = int(masks.sum(1).max())
    if most == 0:
        return None
    index = masks.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    out = []
    for matrix, own, width in names:
        buffer = bank.get_buffer(matrix)
        rows = buffer[index.to(buffer.device)][..., :width].clone()
        for mine, at, state in zip(rows, index, states, strict=True):
            changed = [state.rows[matrix]] if matrix in state.rows else []
            if own in state.own:
                changed.append((state.draws[own].nonzero().squeeze(1), state.own[own]))
            for indices, values in changed:
                found = (at[:, None] == indices).nonzero()
                mine[found[:, 0].to(mine.device)] = values[found[:, 1], :width].to(mine)
        out.append(rows)
    device = out[0].device
    return index.to(device), masks.gather(1, index).to(device), *out


def _own(xs: Tensor, axis: int, fix: Fix, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The part of a branch, before b, that goes through each sample's own rows."""
    moved = xs.movedim(axis, 0)
    flat = moved.reshape(len(index), -1, xs.shape[-1])
    v = torch.bmm(flat, fix.a.to(dtype)[index].transpose(1, 2)) * fix.d.to(dtype)[index][:, None]
    z = torch.bmm(v, fix.bm.to(dtype)[index])
    return z.view(*moved.shape[:-1], -1).movedim(0, axis)
