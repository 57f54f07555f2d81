"""The trained vectors of one adapted weight, as a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import warn
from ..maths import linear
from ..maths.bank import Bank
from ..maths.convolution import Geometry, convolve
from ..maths.forms import WIDE
from ..maths.update import Update
from ..maths.widths import OwnMatrix
from ..weights.matrix import Form, to_matrix
from ..weights.role import Role
from .turns import Turns

CHILD = "uora"
"""Name of the child module that holds the vectors of a module's `weight`, and of the bank in the injected model."""

REDUCED = "_uora_reduced"
"""Where a bank keeps the `Reduced` of its adapters."""

_CAST = "_uora_cast"
"""Of a bank: whether it was said that its adapters are cast to a half type."""


class Kept(NamedTuple):
    """The matrices of an adapter, from one forward to the next.

    Args:
        bank: whose buffers they are views of.
        buffers: these, by name.
        device: of the adapter.
        A, B: as of `Adapter.matrices`.
    """

    bank: Bank
    buffers: tuple[tuple[str, Tensor], ...]
    device: torch.device
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]

    def holds(self, bank: Bank, device: torch.device) -> bool:
        """Whether they are still those of the bank."""
        if self.bank is not bank or self.device != device:
            return False
        there = bank._buffers
        return all([there[name] is t for name, t in self.buffers])  # noqa: C419  # a list takes half the time


class Adapter(nn.Module):
    """The trained vectors of one adapted weight.

    Args:
        name: path of the weight in the model: of its module, and the tensor's name if that is not `weight`.
        roles: the adapted projections in the weight, by ascending `start`.
        width: input width.
        bank: the shared matrices; referred to, not owned.
        form: what the dimensions of the weight are.
        d_init: initial value of d.
        dropout, token_sampling: see `UoraConfig`.
        origin: the name under which its own rows were first drawn, if modules were renamed since.
    """

    bank: Bank
    turns = Turns()
    """When it was active; `Entry` sets its own."""

    def __init__(
        self,
        name: str,
        roles: tuple[Role, ...],
        width: int,
        bank: Bank,
        form: Form = "matrix",
        d_init: float = 0.1,
        dropout: float = 0.0,
        token_sampling: int = 1,
        device: torch.device | str = "cpu",
        origin: str | None = None,
    ) -> None:
        super().__init__()
        self.origin = name if origin is None else origin
        self.name, self.roles, self.width, self.form = name, roles, width, form
        self.dropout, self.token_sampling = dropout, token_sampling
        self.spans = tuple(role.span for role in roles)
        # Past nn.Module's registration: the bank is a child of the model, once, not of every adapted module.
        self.__dict__["bank"] = bank
        rank = bank.config.rank
        # In float32 whatever the base's type: young updates are below the resolution of bfloat16.
        self.b = nn.Parameter(torch.zeros(sum(role.rows for role in roles), device=device, dtype=torch.float32))
        self.d = nn.Parameter(torch.full((len(roles), rank), d_init, device=device, dtype=torch.float32))
        # The rows that some roles have of their own: which (k,), of A (k, in), of B (k, rows). They are no buffers:
        # code that averages models pairs buffers by their number, and these come one by one.
        self._own: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._kept: Kept | None = None
        self._changes = bank.changes
        self.leads = False
        """Whether it is the first of its model."""

    def own(self, role: int) -> tuple[OwnMatrix, OwnMatrix]:
        """A and B that a role may have of its own."""
        return self.bank.widths.own(self.bank.config.layout, self.origin, self.width, self.roles[role])

    @property
    def _of(self) -> list[tuple[str, str]]:
        """By what the matrices of its roles are known."""
        return [(self.origin, role.name) for role in self.roles]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        """As in nn.Module, which moves and casts parameters by it; a cast to a half type is warned of, once a model."""
        narrow = self.b.dtype not in WIDE
        super()._apply(fn, recurse)
        self._own = {role: (fn(index), fn(a), fn(b)) for role, (index, a, b) in self._own.items()}
        if not narrow and self.b.dtype not in WIDE and not self.bank.__dict__.get(_CAST):
            self.bank.__dict__[_CAST] = True
            warn(
                f"the adapter's b and d are cast to {self.b.dtype} with the model: steps below half a unit in the last "
                "place, most of a young adapter's, are rounded away. Cast the base before inject() or load(), which "
                "keep b and d in float32, or train under torch.autocast."
            )
        return self

    def refresh_own(self, role: int) -> None:
        """Take over a role's own rows from the bank, after they were redrawn there.

        The tensors grow by doubling, filled up with repetitions, so that a compiled model sees few different shapes.
        """
        found = []
        for own in self.own(role):
            indices, rows = self.bank.own(own.name)
            size = min(self.d.shape[1], 1 << max(3, (len(indices) - 1).bit_length()))
            fill = torch.arange(size, device="cpu").clamp(max=len(indices) - 1)
            shared = self.bank.a(self.width, self._of[role])
            found += [indices[fill].to(shared.device), rows[fill].to(shared)]
        new = found[0], found[1], found[3]
        old = self._own.get(role)
        if old is not None and all(o.shape == n.shape for o, n in zip(old, new, strict=True)):
            for o, n in zip(old, new, strict=True):
                o.copy_(n)
        else:
            self._own, self._kept = dict(sorted({**self._own, role: new}.items())), None

    def take_own(self) -> None:
        """Take over the own rows of every role, as the bank has them now."""
        self._own, self._changes, self._kept = {}, self.bank.changes, None
        for role in range(len(self.roles)):
            if self.bank.draws(self.own(role)[0].name).any():
                self.refresh_own(role)
        if self.bank.by_path:
            self.renew()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without views of the bank."""
        return {**self.__dict__, "_kept": None}

    def settle(self) -> None:
        """Follow redraws that came with tensors which were copied or averaged into the model's."""
        bank = self.bank
        # Writes past torch's count of versions (`t.data.copy_`) are looked for once in a forward.
        bank.settle(closely=self.leads and bank.watched)
        if self._changes != bank.changes:
            self.take_own()

    def matrices(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A of the roles, each (r, in), and B of the roles, each (rows, r): one entry where all of them share it."""
        self.turns.check()
        passing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not passing:
            self.settle()
        # Compiled code that looks up no path is one graph for all blocks; where none is looked up, the buffers do.
        kept = None if passing and not self.bank.by_path else self._kept
        if kept is not None and (self._is_held(kept) if passing else kept.holds(self.bank, self.b.device)):
            return kept.A, kept.B
        return self._looked_up(passing)

    def _is_held(self, kept: Kept) -> bool:
        """Whether a graph may take the tensors that the bank had renewed; a program that is exported takes buffers."""
        return kept.device == self.b.device and not self._own and not _is_traced()

    def renew(self) -> None:
        """Take the matrices as the bank has them now, for compiled code, which does not look."""
        self._kept = None
        if not self._own:
            self._looked_up(passing=False)

    def _looked_up(self, passing: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See `matrices`.

        Args:
            passing: nothing can be kept.
        """
        of, device = self._of, self.b.device
        rows = [(role.rows, one) for role, one in zip(self.roles, of, strict=True)]
        if not self._own:
            names_a = [self.bank.matrix("A", self.width, one) for one in of]
            names_b = [(self.bank.matrix("B", n, one), n) for n, one in rows]
            some_a, some_b = of[:1] if len(set(names_a)) == 1 else of, rows[:1] if len(set(names_b)) == 1 else rows
            found = (
                tuple([self.bank.a(self.width, one) for one in some_a]),
                tuple([self.bank.b(*one) for one in some_b]),
            )
            if found[0][0].device != device:
                return tuple(m.to(device) for m in found[0]), tuple(m.to(device) for m in found[1])  # of a replica
            if not passing:
                names = {*names_a, *(name for name, _ in names_b)}
                buffers = tuple((name, self.bank.get_buffer(name)) for name in names)
                self._kept = Kept(self.bank, buffers, device, *found)
            return found
        # One view each: autograd functions must not be given one tensor twice when compiled.
        A = [self.bank.a(self.width, one).to(device) for one in of]
        B = [self.bank.b(*one).to(device) for one in rows]
        for k, (index, own_a, own_b) in self._own.items():
            A[k] = A[k].index_copy(0, index.to(device), own_a.to(A[k]))
            B[k] = B[k].t().index_copy(0, index.to(device), own_b.to(B[k])).t()
        return tuple(A), tuple(B)

    def update(self) -> Update:
        """The vectors with the matrices that they scale: what the maths takes."""
        return Update(self.b, self.d, self.spans, *self.matrices())

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted projection, (..., in) -> (..., out); see `linear.project`."""
        matrix = to_matrix(weight, self.form)
        if self.training and self.dropout:
            return nn.functional.linear(x, matrix, bias) + self._dropped(x, matrix.shape[0])
        return linear.project(x, matrix, bias, self.update(), *self._options)

    def add_update(self, x: Tensor, y: Tensor) -> Tensor:
        """y + low-rank branch of x, for a layer that has computed its y itself; see `linear.add_update`."""
        if self.training and self.dropout:
            return (y + self._dropped(x, y.shape[-1])).to(y.dtype)
        return linear.add_update(x, y, self.update(), *self._options)

    def _dropped(self, x: Tensor, out: int) -> Tensor:
        """The low-rank branch of x with some of its elements dropped."""
        return linear.delta(nn.functional.dropout(x, self.dropout), self.update(), out)

    @property
    def _options(self) -> tuple[Any, int]:
        """What `project` and `add_update` take last."""
        return self.bank.__dict__.get(REDUCED), self.token_sampling if self.training else 1

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """The adapted convolution; see `convolution.convolve`."""
        dropout = self.dropout if self.training else 0.0
        return convolve(x, weight, bias, geometry, self.update(), dropout)

    def fold(self, weight: Tensor) -> Tensor:
        """W + dW, differentiable; see `linear.fold`."""
        return linear.fold(weight, self.form, self.update())

    def delta_weight(self, dtype: torch.dtype) -> list[Tensor]:
        """dW of each role, (rows, in), computed in `dtype`."""
        return linear.delta_weight(self.update(), dtype)

    def extra_repr(self) -> str:
        return f"{', '.join(role.label for role in self.roles)}, rank={self.d.shape[1]}"


def _is_traced() -> bool:
    """Whether what is computed now becomes a graph that has the bank's buffers as its own."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return torch.jit.is_tracing() or exporting is None or exporting()


def child(tensor: str) -> str:
    """Name of the child module that holds the vectors of a module's tensor."""
    return CHILD if tensor == "weight" else f"{CHILD}_{tensor}"


def own_matrices(found: Iterable[Adapter]) -> dict[str, OwnMatrix]:
    """The matrices that layers may have of their own, by name."""
    return {own.name: own for adapter in found for k in range(len(adapter.roles)) for own in adapter.own(k)}
