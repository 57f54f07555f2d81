"""Carrying out a plan: adapters go into a model, and out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, warn
from ..maths.bank import Bank
from ..maths.draws import on_cpu, rows_of_weight
from ..maths.forms import WIDE
from ..maths.redraw_log import BankState
from ..maths.shared_product import Reduced
from ..maths.widths import Widths
from ..structure.paths import joined
from ..structure.planning import Plan
from ..structure.survey import Survey
from ..tables import shortened
from ..weights.matrix import take, to_matrix
from ..weights.quantised import dequantised, is_quantised
from ..weights.sharded import whole
from .adapter import CHILD, REDUCED
from .entry import Entry, Placement
from .inference_mode import check_normal
from .library import DEFAULT, LIBRARY, Library
from .trained_parts import STATISTICS, base_parameters
from .undo import Undo


@on_cpu
def apply_plan(
    survey: Survey,
    what: Plan,
    name: str = DEFAULT,
    vector: Tensor | None = None,
    base: dict[str, Tensor] | None = None,
    state: BankState | None = None,
    activate: bool = True,
    bank: Bank | None = None,
    undo: Undo | None = None,
) -> Entry:
    """Carry out a plan. Everything that can fail is made before the model is touched.

    Args:
        name: of the adapter.
        vector: its b and d, as `Entry` has them; fresh ones if None.
        base: its trained parts of the base; if None, those that its options name, with the values of the base.
        state: what redraws made of its bank.
        activate: whether the model computes with it from now on.
        bank: its bank, see `bank_for`.
        undo: of the operation that this is a part of.

    Raises:
        StateError: the model was made inside torch.inference_mode.
        ConfigError: without a bank: A and B would be far larger than the model.
    """
    model, config = survey.model, what.config
    check_normal(survey)
    library = model.__dict__.get(LIBRARY) or Library(survey)
    placement = _placement(survey, library, what)
    weights: list[Any] = [
        m._parameters[p.tensor] for m, p in zip(placement.modules, placement.projections, strict=True)
    ]
    coarse = [p.path for p, w in zip(what.projections, weights, strict=True) if p.read and w.dtype not in WIDE]
    if coarse:
        warn(
            f"{len(coarse)} weights ({coarse[0]}, ...) are read by the model itself and stored in a half type: small "
            "updates to them are rounded away. Keep the base in float32 and use torch.autocast."
        )
    if bank is None:
        _check_rank(survey, what)
        bank = bank_for(model, what)
    entry = Entry(config, placement, bank, {}, state or BankState(), vector)
    if activate:
        entry.materialise()
    first = not library.entries
    if base is None:
        names = [n for n in base_parameters(survey, config.train) if _trains(n, survey.tensors[n].tensor)]
        names += [n for n in survey.buffers if n.endswith(STATISTICS)]
        held = {n: survey.tensors[n].tensor for n in names}
        # The first adapter trains the parts of the base as they stand there; later ones have their own.
        entry.parts = held if first else {n: _copy(library.base_parts.get(n, t), True) for n, t in held.items()}
    else:
        entry.parts = dict(base)
    kept = {n: _copy(survey.tensors[n].tensor) for n in entry.parts if n not in library.base_parts}
    if undo is None and first:
        undo = Undo(survey)
    elif undo is None:  # many are added beside others, where nothing of the model changes
        undo = library.undo(model) if activate else Undo(None, [library]).or_break(library)
    with undo:
        model.__dict__[LIBRARY] = library
        library.base_parts |= kept
        library.entries[name] = entry
        if first:
            for place in survey.parameters.values():
                if place.tensor.is_floating_point() or place.tensor.is_complex():
                    place.tensor.requires_grad_(False)
        for part in entry.parts.values():
            if isinstance(part, nn.Parameter):
                part.requires_grad_(True)
        if activate:
            library.switch(model, name)
    return entry


def take_out(model: nn.Module, library: Library) -> nn.Module:
    """The model without adapters, with the head of the active one."""
    survey = Survey(model)
    library.detach(survey)
    del model.__dict__[LIBRARY]
    if CHILD in model._modules:
        delattr(model, CHILD)
    for name, held in survey.parameters.items():  # parts without adapters may have been replaced since
        p = held.tensor
        if name in library.flags and (p.is_floating_point() or p.is_complex()):
            p.requires_grad_(library.flags[name])
    return model


def _placement(survey: Survey, library: Library, what: Plan) -> Placement:
    """That of an adapter which sits at the same places, or a new one."""
    for entry in library.entries.values():
        placement = entry.placement
        if placement.rank == what.config.rank and placement.projections == what.projections:
            return placement
    return Placement.of(survey, what.projections, what.config.rank)


def bank_for(
    model: nn.Module,
    what: Plan,
    first: Mapping[str, Tensor] | None = None,
    informed: Mapping[str, str] | None = None,
) -> Bank:
    """The bank of an adapter in the model that has the same matrices, or a new one.

    Args:
        first: matrices by name to use in place of those that are drawn from the seed.
        informed: see `Widths`; `first` has these matrices.
    """
    first = first or {}
    widths = _widths(what, informed)
    given = bool(first.keys() - set(widths.informed.values()))
    library = model.__dict__.get(LIBRARY)
    for entry in library.entries.values() if library else ():
        bank = entry.bank
        same = all(torch.equal(bank._first[n], t) for n, t in first.items() if n in bank._first)
        if same and (given or not bank.given) and bank.serves(what.config, widths):
            return bank
    weight: Any = model.get_submodule(what.projections[0].module_path)._parameters[what.projections[0].tensor]
    dtype = torch.float32 if is_quantised(weight) else weight.dtype
    taken = _taken(model, what, first) if widths.of_weights else {}
    bank = Bank(what.config, widths, device=weight.device, dtype=dtype, first=taken | dict(first))
    bank.taken = frozenset(taken)
    bank.__dict__[REDUCED] = Reduced()
    return bank


def _widths(what: Plan, informed: Mapping[str, str] | None = None) -> Widths:
    weights = ((p.origin or p.path, p.shape[1], p.roles) for p in what.projections)
    return Widths.of(weights, informed, what.config.init)


def _taken(model: nn.Module, what: Plan, first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices that are taken from the weights of the base, but for those of `first`.

    Raises:
        ConfigError: the weights have no values, or values that are not finite, or a side below the rank.
    """
    sides = {p.path: min(p.shape[1], *(role.rows for role in p.roles)) for p in what.projections}
    if narrow := [f"{path} ({side})" for path, side in sides.items() if side < what.config.rank]:
        raise ConfigError(
            f"init={what.config.init!r} gives as many directions as the smaller side of a projection has; the rank is "
            f"{what.config.rank}, and there are {shortened(narrow, 4)}. Take a smaller rank, or exclude these."
        )
    widths, layout = _widths(what), what.config.layout  # without informed rows, which stand beside these
    found: dict[str, Tensor] = {}
    library = model.__dict__.get(LIBRARY)
    for p in what.projections:
        origin, module = p.origin or p.path, model.get_submodule(p.module_path)
        names = [[own.shared for own in widths.own(layout, origin, p.shape[1], r)] for r in p.roles]
        if all(name in first for both in names for name in both):
            continue
        held: Any = module._parameters[p.tensor]
        if library is not None:  # an adapter may train it
            held = library.base_parts.get(joined(p.module_path, p.tensor), held)
        weight = dequantised(module) if is_quantised(held) else whole(held.detach())
        if weight.is_meta or not weight.isfinite().all():
            why = "has no values yet (it is on the meta device)" if weight.is_meta else "has values that are not finite"
            raise ConfigError(f"init={what.config.init!r} takes A and B from the weights, and {p.path} {why}")
        for role, both in zip(p.roles, names, strict=True):
            part = take(to_matrix(weight, p.form), role.span)
            found |= dict(zip(both, rows_of_weight(what.config, part, f"{origin}.{role.name}"), strict=True))
    return {name: t for name, t in found.items() if name not in first}


def _check_rank(survey: Survey, what: Plan) -> None:
    widths = _widths(what).matrices(what.config.layout)
    wanted, held = what.config.rank * sum(widths.values()), sum(h.tensor.numel() for h in survey.tensors.values())
    if wanted > room(held):
        raise ConfigError(
            f"rank {what.config.rank:,} is too large for this model: A and B would be {wanted:,} numbers, and the "
            f"whole model has {held:,}"
        )


def room(numbers: int) -> int:
    """How many numbers A and B can have in a model of so many: more are of a rank that was meant for another model, or
    mistyped, and could take all memory."""
    return max(LEAST_ROOM, ROOM * numbers)


ROOM, LEAST_ROOM = 4, 2**22


def _copy(t: Tensor, trains: bool = False) -> Tensor:
    copy = t.detach().clone()
    return nn.Parameter(copy, requires_grad=trains) if isinstance(t, nn.Parameter) else copy


def _trains(name: str, p: Tensor) -> bool:
    if p.is_floating_point() or p.is_complex():
        return True
    warn(f"{name} is of {p.dtype} and does not train")
    return False
