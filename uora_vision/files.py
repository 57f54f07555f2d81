"""Out of a model into a folder, and back: b, d, the trained parts of the base, and the log that rebuilds A and B.

`docs/format.md` describes the folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .bank import Bank, BankState
from .errors import FormatError, OptionError
from .fingerprint import bank_digest
from .fit import Base, Fitted, fit
from .folder import CONFIG_FILE, TENSOR_FILE, read, write, write_atomically
from .hub import is_repository, local_copy
from .inject import adapters, apply_plan, bank_for, bank_of, check_room, check_whole
from .layers import Adapter
from .library import DEFAULT, STATISTICS, check_switch
from .plan import Plan
from .sharded import is_sharded, whole, writes
from .stored import Identity, SaveBanks, Stored, StoredProjection, shared_matrices

__all__ = [
    "CONFIG_FILE", "TENSOR_FILE", "collect", "load", "own_matrices", "put_back", "save",
    "write_atomically",
]  # fmt: skip
_IDENTITY = "_uora_identity"


def save(model: nn.Module, folder: str | os.PathLike[str], *, save_banks: SaveBanks | None = None) -> Path:
    """Write the active adapter and the trained parts of the base into a folder.

    At any moment, also after a kill or on a full disk, the folder holds an adapter that loads: the last one or this.

    Of a model that `fully_shard` spreads over processes, all of them must call this: their shards are gathered, and the
    first process alone writes.

    Args:
        save_banks: put rows of A and B into the file too, so that loading need not rebuild them from seed and log:
            `changed`, those that were re-drawn; `all`, which loads where torch draws other matrices from the seed, and
            is the default for matrices that were given, as by an adapter of PEFT's.

    Returns:
        The folder.

    Raises:
        StateError: the model is not injected.
        FormatError: a trained value is NaN or infinite.
        OSError: the folder cannot be written to.
    """
    adapter = collect(model, save_banks=save_banks)
    return write(adapter, folder) if writes(list(model.parameters())) else Path(folder)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    activate: bool = True,
    base: Base | None = None,
    check_base: bool = True,
    revision: str | None = None,
) -> nn.Module:
    """Put a saved adapter into a model, in place; everything is checked before the model is touched.

    Args:
        model: a plain base, or one with adapters of other names.
        folder: that `save` wrote; or a repository on the Hugging Face hub, `user/name`.
        name: of the adapter in the model.
        activate: whether the model computes with it from now on.
        base: what was found out about the model, to load many adapters fast: make `Base(model)` once.
        check_base: whether to refuse an adapter that was trained on other weights than this model has.
        revision: of the repository: a branch, tag or commit.

    Returns:
        The same model, with the trained parts of the base (the head) restored too.

    Raises:
        StateError: the model has an adapter of that name, or is spread over processes.
        FormatError: a file is missing, damaged, of a newer version, or does not fit this model.
        HubError: the repository cannot be had.
    """
    library = check_room(model, name)
    if library is None:
        check_whole(model)
    elif activate:
        check_switch(model, library)
    if is_repository(folder):
        folder = local_copy(os.fspath(folder), revision)
    stored = read(folder)
    base = base or Base(model)
    try:
        fitted = fit(stored, base, check_base)
        what = Plan(stored.config, fitted.projections, ())
        bank = bank_for(model, what, stored.first())
        state = rebuilt(stored, bank)
        parts = _parts(stored, fitted, base)
    except FormatError as error:
        raise FormatError(f"{os.fspath(folder)}: {error}") from error
    apply_plan(model, what, name, stored.vector.to(torch.float32, copy=True), parts, state, activate, bank)
    return model


def collect(model: nn.Module, *, save_banks: SaveBanks | None = None) -> Stored:
    """The active adapter of a model, as it would be saved. Arguments and errors are those of `save`."""
    if save_banks not in (None, *get_args(SaveBanks)):
        raise OptionError(f"save_banks must be one of {', '.join(get_args(SaveBanks))} or None, got {save_banks!r}")
    from . import __version__

    found, bank, base = adapters(model), bank_of(model), Base(model)
    if save_banks is None and bank.given:
        save_banks = "all"
    projections = tuple(
        StoredProjection(path, adapter.origin, adapter.width, base.findings[path].block, adapter.roles)
        for path, adapter in found.items()
    )
    state = bank.state()
    names = sorted(shared_matrices(bank.config, projections))
    first = {name: bank._first[name] for name in names if name in bank._first}
    changed = {name: rows for name, (_, rows) in state.rows.items()} | state.own
    return Stored(
        bank.config,
        projections,
        torch.cat([whole(t).detach().flatten().cpu() for a in found.values() for t in (a.b, a.d)]),
        {name: whole(t).detach().cpu().clone() for name, t in trained_base(model).items()},
        list(state.log),
        _identity(base, bank, tuple(found)),
        bank_digest(first, state) if first else None,
        _flat([changed[name] for name in sorted(changed)]) if save_banks else None,
        _flat([first[name] for name in names]) if save_banks == "all" else None,
        {"torch": torch.__version__, "uora_vision": __version__},
    )


def rebuilt(stored: Stored, bank: Bank) -> BankState:
    """What redraws made of the matrices of a saved adapter: as the file has it, or by its log. Leaves the bank alone.

    Args:
        bank: one that serves it.

    Raises:
        FormatError: these are not the matrices that the adapter was trained with.
    """
    state = stored.bank_state()
    if state is None and stored.log:
        widths_in = {p.width for p in stored.projections}
        widths_out = {role.rows for p in stored.projections for role in p.roles}
        scratch = Bank(stored.config, widths_in, widths_out, first=bank._first)
        scratch.replay(stored.log, stored.own)
        state = scratch.state()
    state = state or BankState()
    first = {name: bank._first[name] for name in stored.matrices if name in bank._first}
    wanted, here = stored.bank_fingerprint, bank_digest(first, state) if first else None
    if wanted is not None and here is not None and wanted != here:
        raise FormatError(
            "A and B come out other than where the adapter was trained, by a few last bits or more, as another torch "
            f"({stored.versions.get('torch')} there, {torch.__version__} here) or processor can do. Load it there and "
            "save it with save_banks='all'; that file loads everywhere."
        )
    return state


def trained_base(model: nn.Module) -> dict[str, Tensor]:
    """The parts of the base that train, or move with training, by name."""
    vectors = {id(p) for adapter in adapters(model).values() for p in adapter.parameters()}
    base: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in vectors}
    # A frozen BatchNorm in training mode still moves its statistics, and the adapter was trained with them.
    return base | {name: t for name, t in model.named_buffers() if name.endswith(STATISTICS)}


def put_back(model: nn.Module, stored: Stored) -> None:
    """Give a model that has an adapter already the values of a saved one with the same options, in place.

    Raises:
        StateError: the model is not injected, or is spread over processes.
        FormatError: it is another adapter, of which nothing was taken.
    """
    check_whole(model)
    found, bank, held = adapters(model), bank_of(model), trained_base(model)
    here = {path: (adapter.width, adapter.roles) for path, adapter in found.items()}
    there = {p.path: (p.width, p.roles) for p in stored.projections}
    shapes, wanted = ({name: t.shape for name, t in tensors.items()} for tensors in (held, stored.base))
    odd = _differing(here, there) + _differing(shapes, wanted)
    if odd or bank.config != stored.config:
        raise FormatError(
            f"this is another adapter than the model has: {odd[0] if odd else 'the options'} differ. Inject with the "
            "options of the run that is continued."
        )
    state = rebuilt(stored, bank)
    vectors = {p.path: vectors for p, vectors in zip(stored.projections, stored.vectors, strict=True)}
    bank.swap(state)
    with torch.no_grad():
        for path, adapter in found.items():
            adapter.b.copy_(vectors[path][0])
            adapter.d.copy_(vectors[path][1])
        for name, value in stored.base.items():
            held[name].copy_(value)
    for adapter in found.values():
        adapter.take_own()


def own_matrices(found: dict[str, Adapter]) -> dict[str, tuple[str, int]]:
    """For every matrix that a layer may have of its own: the shared one that it starts from, and its width."""
    out = {}
    for adapter in found.values():
        for k, role in enumerate(adapter.roles):
            out[adapter.own_name(k, "A")] = (adapter.bank.matrix("A", adapter.width), adapter.width)
            out[adapter.own_name(k, "B")] = (adapter.bank.matrix("B", role.rows), role.rows)
    return out


def _parts(stored: Stored, fitted: Fitted, base: Base) -> dict[str, Tensor]:
    """The trained parts of the base, as the model has to hold them."""
    parts: dict[str, Tensor] = {}
    for saved, value in stored.base.items():
        held = base.held[fitted.names[saved]]
        if held.is_floating_point() != value.is_floating_point():
            raise FormatError(f"{saved} is of {value.dtype}, in this model of {held.dtype}")
        copy = value.to(device=held.device, dtype=held.dtype, copy=True)
        parts[fitted.names[saved]] = nn.Parameter(copy) if isinstance(held, nn.Parameter) else copy
    return parts


def _identity(base: Base, bank: Bank, paths: tuple[str, ...]) -> Identity:
    if not any(map(is_sharded, base.held.values())):
        return base.identity(paths)
    # A value of a sharded weight costs an exchange of all of it, and the frozen base stays what it is.
    known: dict[tuple[str, ...], Identity] = bank.__dict__.setdefault(_IDENTITY, {})
    if paths not in known:
        known[paths] = base.identity(paths)
    return known[paths]


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0), *(t.flatten() for t in tensors)])


def _differing(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
