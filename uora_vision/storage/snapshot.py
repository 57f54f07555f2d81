"""An adapter out of a model as a value, and the value put back into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..errors import FormatError, OptionError
from ..lifecycle.informing import bank_like, replace_bank
from ..lifecycle.library import active_entry, adapters_in, bank_of, library_of
from ..lifecycle.trained_parts import STATISTICS, moved_buffers, trained_tensors
from ..maths.bank import Bank
from ..maths.informed import pack
from ..maths.redraw_log import BankState
from ..maths.widths import Widths
from ..structure.checks import check_whole
from ..structure.survey import Survey
from ..version import __version__
from ..weights.sharded import is_sharded, whole
from .base import Base
from .fingerprint import bank_digest
from .stored import Identity, SaveBanks, Section, Stored, StoredProjection

_IDENTITY = "_uora_identity"


def collect(model: nn.Module | Survey, *, save_banks: SaveBanks | None = None) -> Stored:
    """The active adapter of a model, as it would be saved. Arguments and errors are those of `save`."""
    if save_banks not in (None, *get_args(SaveBanks)):
        raise OptionError(f"save_banks must be one of {', '.join(get_args(SaveBanks))} or None, got {save_banks!r}")

    survey = Survey.of(model)
    found, bank, base = adapters_in(survey), bank_of(survey.model), Base(survey)
    findings = survey.shown.findings
    if save_banks is None and bank.given:
        save_banks = "all"
    projections = tuple(
        StoredProjection(path, adapter.origin, adapter.width, findings[path].block, adapter.roles)
        for path, adapter in found.items()
    )
    state = bank.state()
    of = {origin: name for origin, name in bank.widths.informed.items() if origin in {p.origin for p in projections}}
    widths = Widths.of(((p.origin, p.width, p.roles) for p in projections), of, bank.config.init)
    names = sorted(widths.matrices(bank.config.layout))
    first = {name: bank._first[name] for name in names if name in bank._first}
    changed = {name: rows for name, (_, rows) in state.rows.items()} | state.own
    trained = trained_tensors(survey)
    about = {name: Section(value) for name, value in active_entry(survey.model).about.items()}
    return Stored(
        bank.config,
        projections,
        torch.cat([whole(t).detach().flatten().cpu() for a in found.values() for t in (a.b, a.d)]),
        {name: whole(t).detach().cpu().clone() for name, t in trained.items()},
        list(state.log),
        _identity(base, bank, tuple(p for p in found if base.weight_name(p) not in trained)),
        bank_digest(first, state) if first else None,
        _flat([changed[name] for name in sorted(changed)]) if save_banks else None,
        _flat([first[name] for name in names if name not in set(of.values())]) if save_banks == "all" else None,
        {"torch": torch.__version__, "uora_vision": __version__},
        sections=_sections(projections, of, first) | about,
    )


def _sections(
    projections: tuple[StoredProjection, ...], informed: Mapping[str, str], matrices: Mapping[str, Tensor]
) -> dict[str, Section]:
    """Informed rows, if there are any."""
    if not informed:
        return {}
    members: dict[str, list[int]] = {}
    for number, p in enumerate(projections):
        if p.origin in informed:
            members.setdefault(informed[p.origin], []).append(number)
    return {"rows": Section(members, pack({name: matrices[name] for name in members}))}


def rebuilt(stored: Stored, bank: Bank) -> BankState:
    """What redraws made of the matrices of a saved adapter: as the file has it, or by its log. Leaves the bank alone.

    Args:
        bank: one that serves it.

    Raises:
        FormatError: these are not the matrices that the adapter was trained with.
    """
    state = stored.bank_state()
    if state is None and stored.log:
        scratch = Bank(stored.config, stored.widths, first=bank._first)
        scratch.replay(stored.log, stored.own)
        state = scratch.state()
    state = state or BankState()
    first = {name: bank._first[name] for name in stored.matrices if name in bank._first}
    wanted, here = stored.bank_fingerprint, bank_digest(first, state) if first else None
    if wanted is not None and here is not None and wanted != here and bank.taken:
        raise FormatError(
            f"A and B of init={stored.config.init!r} are taken from the weights of the base, and come out other than "
            "where the adapter was trained: this is another base, or one in float16 or quantised otherwise, or a "
            "processor that rounds otherwise. Load the adapter where it was trained and save it with save_banks='all'; "
            "that file loads everywhere."
        )
    if wanted is not None and here is not None and wanted != here:
        raise FormatError(
            "A and B come out other than where the adapter was trained, by a few last bits or more, as another torch "
            f"({stored.versions.get('torch')} there, {torch.__version__} here) or processor can do. Load it there and "
            "save it with save_banks='all'; that file loads everywhere."
        )
    return state


def put_back(model: nn.Module, stored: Stored) -> None:
    """Give a model that has an adapter already the values of a saved one with the same options, in place.

    Raises:
        StateError: the model is not injected, or is spread over processes.
        FormatError: it is another adapter, of which nothing was taken.
    """
    survey = Survey(model)
    check_whole(survey)
    found, bank, held = adapters_in(survey), bank_of(model), trained_tensors(survey)
    here = {path: (adapter.width, adapter.roles) for path, adapter in found.items()}
    there = {p.path: (p.width, p.roles) for p in stored.projections}
    shapes, wanted = ({name: t.shape for name, t in tensors.items()} for tensors in (held, stored.parts))
    still = library_of(model).buffers  # which of these moved is no part of what adapter it is
    names = still.copies.keys() | still.sums.keys()
    shapes, wanted = ({n: shape for n, shape in of.items() if n not in names or n.endswith(STATISTICS)}
                      for of in (shapes, wanted))  # fmt: skip
    back = moved_buffers(survey).keys() - stored.parts.keys()
    if gone := sorted(back - still.copies.keys()):
        raise FormatError(
            f"{gone[0]} has moved since inject(), the adapter does not have it, and of so large a buffer no copy is "
            "kept: put the adapter into a fresh base"
        )
    odd = _differing(here, there) + _differing(shapes, wanted)
    if odd or bank.config != stored.config:
        raise FormatError(
            f"this is another adapter than the model has: {odd[0] if odd else 'the options'} differ. Inject with the "
            "options of the run that is continued."
        )
    first, widths = stored.first(), stored.widths
    if widths.informed != bank.widths.informed or any(not torch.equal(bank._first[n], t) for n, t in first.items()):
        bank = bank_like(bank, widths, first)
    state = rebuilt(stored, bank)
    if bank is not bank_of(model):
        replace_bank(model, bank)
    vectors = {p.path: vectors for p, vectors in zip(stored.projections, stored.vectors, strict=True)}
    bank.swap(state)
    with torch.no_grad():
        for path, adapter in found.items():
            adapter.b.copy_(vectors[path][0])
            adapter.d.copy_(vectors[path][1])
        for name in back:
            survey.buffers[name].tensor.copy_(still.copies[name])
        for name, value in stored.parts.items():
            survey.tensors[name].tensor.copy_(value)
    for adapter in found.values():
        adapter.take_own()
    active_entry(model).about |= stored.about


def _identity(base: Base, bank: Bank, paths: tuple[str, ...]) -> Identity:
    if not any(is_sharded(held.tensor) for held in base.held.values()):
        return base.identity(paths)
    # A value of a sharded weight costs an exchange of all of it, and the frozen base stays what it is.
    known: dict[tuple[str, ...], Identity] = bank.__dict__.setdefault(_IDENTITY, {})
    if paths not in known:
        known[paths] = base.identity(paths)
    return known[paths]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.float32, device="cpu"), *(t.flatten() for t in tensors)])


def _differing(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
