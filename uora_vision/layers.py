"""How an adapter sits on a module: the vectors it trains, and the class that lets the module use them.

An adapted module keeps its parameters, their names and its class as a base class: `type(m)` becomes a subclass made
here, and the trained vectors live in one child module, `m.uora`. Removing the child and restoring the class gives the
module back as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .bank import Bank

CHILD = "uora"
"""Name of the child module that holds an adapted module's vectors, and of the bank in the injected model."""


@dataclass(frozen=True)
class Role:
    """One projection inside a weight.

    Args:
        name: what it does: q, k, v, proj, fc1, fc2, ...
        group: `attn` or `mlp`.
        start: its first output row in the weight.
        rows: how many output rows it has.
    """

    name: str
    group: str
    start: int
    rows: int

    @property
    def label(self) -> str:
        return f"{self.group}.{self.name}"


class Adapter(nn.Module):
    """The trained vectors of one adapted weight.

    Args:
        name: path of the adapted module in the model.
        roles: the adapted projections in the weight, by ascending `start`.
        width: input width.
        bank: the shared matrices; referred to, not owned.
        d_init: initial value of d.
        dropout: see `UoraConfig`.
    """

    bank: Bank

    def __init__(
        self,
        name: str,
        roles: tuple[Role, ...],
        width: int,
        bank: Bank,
        d_init: float = 0.1,
        dropout: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.name, self.roles, self.width, self.dropout = name, roles, width, dropout
        self.spans = tuple((role.start, role.rows) for role in roles)
        # Past nn.Module's registration: the bank is a child of the model, once, not of every adapted module.
        self.__dict__["bank"] = bank
        rank = bank.config.rank
        # In float32 whatever the base's type: young updates are below the resolution of bfloat16.
        self.b = nn.Parameter(torch.zeros(sum(role.rows for role in roles), device=device, dtype=torch.float32))
        self.d = nn.Parameter(torch.full((len(roles), rank), d_init, device=device, dtype=torch.float32))
        self._own: tuple[int, ...] = ()

    def own_name(self, role: int, side: str) -> str:
        """Name of a role's own matrix in the bank's log."""
        return f"{self.name}.{self.roles[role].name}/{side}"

    def refresh_own(self, role: int) -> None:
        """Take over a role's own rows from the bank, after they were re-drawn there.

        The buffers grow by doubling, filled up with repetitions, so that a compiled model sees few different shapes.
        """
        for side in ("A", "B"):
            indices, rows = self.bank.own(self.own_name(role, side))
            size = min(self.d.shape[1], 1 << max(3, (len(indices) - 1).bit_length()))
            fill = torch.arange(size).clamp(max=len(indices) - 1)
            shared = self.bank.a(self.width)
            self._set(f"own_index_{role}", indices[fill].to(shared.device))
            self._set(f"own_{side.lower()}_{role}", rows[fill].to(shared))
        self._own = tuple(sorted({*self._own, role}))

    def drop_own(self) -> None:
        """Back to the shared rows alone."""
        for name in list(self._buffers):
            del self._buffers[name]
        self._own = ()

    def _set(self, name: str, value: Tensor) -> None:
        old = self._buffers.get(name)
        if old is not None and old.shape == value.shape:
            old.copy_(value)
        else:
            self.register_buffer(name, value, persistent=False)

    def matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """A of the roles, each (r, in), one entry if all share it; B of each role, (rows, r)."""
        shared = self.bank.a(self.width)
        bm = [self.bank.b(role.rows) for role in self.roles]
        if not self._own:
            return [shared], bm
        # One view each: autograd functions must not be given one tensor twice when compiled.
        a = [self.bank.a(self.width) for _ in self.roles]
        for k in self._own:
            index = self.get_buffer(f"own_index_{k}")
            a[k] = shared.index_copy(0, index, self.get_buffer(f"own_a_{k}"))
            bm[k] = bm[k].t().index_copy(0, index, self.get_buffer(f"own_b_{k}")).t()
        return a, bm

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted projection, (..., in) -> (..., out); see `functional.project`."""
        a, bm = self.matrices()
        if self.training and self.dropout:
            dropped = nn.functional.dropout(x, self.dropout)
            branch = functional.delta(dropped, self.b, self.d, self.spans, a, bm, weight.shape[0])
            return nn.functional.linear(x, weight, bias) + branch
        return functional.project(x, weight, bias, self.b, self.d, self.spans, a, bm)

    def fold(self, weight: Tensor) -> Tensor:
        """W + dW, (out, in), differentiable; see `functional.fold`."""
        return functional.fold(weight, self.b, self.d, self.spans, *self.matrices())

    def delta_weight(self, dtype: torch.dtype) -> list[Tensor]:
        """dW of each role, (rows, in), computed in `dtype`."""
        return functional.delta_weight(self.b, self.d, self.spans, *self.matrices(), dtype)

    def extra_repr(self) -> str:
        return f"{', '.join(role.label for role in self.roles)}, rank={self.d.shape[1]}"


class Adapted:
    """Mixed in before the class of a module that holds an `Adapter` and is called."""

    _parameters: dict[str, Any]

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, CHILD).project(x, self._parameters["weight"], self._parameters["bias"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, so copies and pickles name what it was made from."""
        return _rebuild, (type(self).__mro__[1], base_class(self)), self.__dict__


class AdaptedWeight(Adapted):
    """As `Adapted`, for a module whose parent reads `weight` itself: whoever reads it gets W + dW.

    The parameter keeps its name and value: parameters and state dicts do not go through this property.
    """

    @property
    def weight(self) -> Tensor:
        return getattr(self, CHILD).fold(self._parameters["weight"])


_classes: dict[tuple[type, type], Any] = {}


def adapted_class(mixin: type[Adapted], base: type[nn.Linear]) -> Any:
    """The adapted subclass of a module class, made once; `base.forward` must be that of nn.Linear."""
    made = _classes.get((mixin, base))
    if made is None:
        made = _classes[mixin, base] = type(f"Uora{base.__name__}", (mixin, base), {"__module__": __name__})
    return made


def base_class(module: Any) -> Any:
    """The class that an adapted module had before."""
    return next(c for c in type(module).__mro__[1:] if not issubclass(c, Adapted))


def _rebuild(mixin: type[Adapted], base: type[nn.Linear]) -> Any:
    cls = adapted_class(mixin, base)
    return cls.__new__(cls)


def attach(module: nn.Linear, adapter: Adapter, weight_is_read: bool = False) -> None:
    """Give a module its adapter; the module computes y = (W + dW) x + bias from then on.

    Args:
        weight_is_read: whether the model may read `module.weight` and not call the module.
    """
    module.add_module(CHILD, adapter)
    module.__class__ = adapted_class(AdaptedWeight if weight_is_read else Adapted, type(module))


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    delattr(module, CHILD)
    module.__class__ = base_class(module)


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, Adapted)


def base_weight(module: nn.Module) -> nn.Parameter:
    """The frozen weight of an adapted module."""
    weight = module._parameters["weight"]
    assert weight is not None
    return weight
