"""One adapter of a library: its options, where it sits, its vectors, what it trained of the base."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UoraConfig
from ..maths.bank import Bank
from ..maths.redraw_log import BankState
from ..structure.survey import Held, Survey
from ..structure.targets import Projection
from .adapter import Adapter
from .turns import Turns


@dataclass(eq=False)
class Placement:
    """Where the adapters of one plan sit; shared by all adapters of that plan.

    Args:
        projections: the adapted weights.
        rank: of the adapters.
        modules: the module that holds each.
        sizes: lengths of b and d of each, alternating, as they follow one another in an adapter's vector.
    """

    projections: tuple[Projection, ...]
    rank: int
    modules: tuple[nn.Module, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, survey: Survey, projections: tuple[Projection, ...], rank: int) -> Placement:
        lengths = ((sum(role.rows for role in p.roles), len(p.roles) * rank) for p in projections)
        owners = tuple(survey.modules[p.module_path] for p in projections)
        return cls(projections, rank, owners, tuple(itertools.chain.from_iterable(lengths)))


@dataclass(frozen=True)
class Learnt:
    """What an adapter has learnt, while the model takes a share of it.

    Args:
        b: of each weight, (rows,).
        parts: of the base, by name.
        share: that the model takes.
    """

    b: tuple[Tensor, ...]
    parts: dict[str, Tensor]
    share: float


@dataclass(eq=False)
class Entry:
    """One adapter.

    Args:
        config: its options.
        placement: where it sits.
        bank: its shared matrices, in common with all adapters that draw the same ones.
        parts: the parts of the base that it trained, by name.
        state: what redraws made of the bank; of the active adapter, the bank itself has it.
        vector: every b and d, one after the other, float32; None once `modules` hold them.
        modules: made when it is first active, and kept, so that an optimizer still finds its parameters.
        settled: whether the modules have taken over their own rows.
        turns: when it was active.
        learnt: what it is at full strength, while the model takes another share of it.
        about: what its file says of its task, `labels` and `preprocessing`, as JSON has them.
    """

    config: UoraConfig
    placement: Placement
    bank: Bank
    parts: dict[str, Tensor]
    state: BankState = field(default_factory=BankState)
    vector: Tensor | None = None
    modules: tuple[Adapter, ...] | None = None
    settled: bool = False
    turns: Turns = field(default_factory=Turns)
    learnt: Learnt | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def values(self) -> Tensor:
        """Every b and d, one after the other: (parameters,)."""
        if self.vector is not None:
            return self.vector
        return torch.cat([t.detach().flatten() for module in self.modules or () for t in (module.b, module.d)])

    def materialise(self) -> tuple[Adapter, ...]:
        """Its modules, on the device of the weights that they adapt."""
        if self.modules is None:
            modules = tuple(
                Adapter(
                    p.path,
                    p.roles,
                    p.shape[1],
                    self.bank,
                    p.form,
                    self.config.d_init,
                    self.config.dropout,
                    self.config.token_sampling,
                    origin=p.origin,
                )
                for p in self.placement.projections
            )
            for module in modules:
                module.__dict__["turns"] = self.turns
            modules[0].leads = True
            if self.vector is not None:
                parts = iter(self.vector.split(self.placement.sizes))
                for module in modules:
                    module.b.data = next(parts)
                    module.d.data = next(parts).view_as(module.d)
            self.modules, self.vector = modules, None
        for module, owner, p in zip(self.modules, self.placement.modules, self.placement.projections, strict=True):
            weight = owner._parameters[p.tensor]
            assert weight is not None
            if any(p.device != weight.device for p in (module.b, module.d)):
                module.to(weight.device)
            module.training = owner.training
        return self.modules


def holders(survey: Survey, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every module that holds the parameter or buffer of a name, tied ones under each of their names, and what it is
    called there."""
    found: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names}
    wanted = {id(survey.tensors[name].tensor): name for name in found}
    for module in survey.modules.values():
        for key, t in (*module._parameters.items(), *module._buffers.items()):
            if id(t) in wanted:
                found[wanted[id(t)]].append((module, key))
    return found


def replace_tensor(module: nn.Module, key: str, value: Tensor) -> None:
    """Put a tensor where another of that name was. The head of another number of classes has another width."""
    old = Held(module, key).tensor
    if value.device != old.device:
        value.data = value.to(old.device)
    (module._parameters if key in module._parameters else module._buffers)[key] = value  # type: ignore[assignment]
    if key == "weight" and isinstance(module, nn.Linear) and value.dim() == 2:
        module.out_features = len(value)
