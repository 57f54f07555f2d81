"""Out of a model into a folder, and back: b, d, the trained parts of the base, and the log that rebuilds A and B.

`docs/format.md` describes the folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError, StateError, warn
from ..lifecycle.apply import apply_plan, bank_for
from ..lifecycle.inference_mode import outside_inference_mode
from ..lifecycle.library import DEFAULT, active_entry, check_room, check_switch
from ..maths.bank import Bank
from ..maths.draws import initial_rows, on_cpu
from ..maths.redraw_log import BankState
from ..structure.checks import check_whole
from ..structure.planning import Plan
from ..structure.survey import Survey
from ..weights.sharded import writes
from .base import Base
from .fit import Fitted, as_held, converted, fit
from .folder import folder_path, read_folder, write_folder
from .hub import there
from .preprocessing import sections_of
from .snapshot import collect, rebuilt
from .stored import SaveBanks, Section, Stored


@on_cpu
def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    save_banks: SaveBanks | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Path:
    """Write the active adapter and the trained parts of the base into a folder.

    At any moment, also after a kill or on a full disk, the folder holds an adapter that loads: the last one or this.

    Of a model that `fully_shard` spreads over processes, all of them must call this: their shards are gathered, and the
    first process alone writes.

    Args:
        save_banks: put rows of A and B into the file too, so that loading need not rebuild them from seed and log:
            `changed`, those that were redrawn; `all`, which loads where torch draws other matrices from the seed, and
            is the default for matrices that were given, as by an adapter of PEFT's.
        labels: names of the classes, in the order of the outputs of the head, so that `load_predictor` can tell them.
        preprocessing: how inputs are made, in the fields of timm's data config (what
            `timm.data.resolve_model_data_config(model)` gives), and others that `docs/format.md` lists: the task, where
            the base is to be had, the prompts of CLIP.

            Both stay with the adapter: one that was loaded, or saved before, is saved with those that it had.

    Returns:
        The folder.

    Raises:
        StateError: the model is not injected.
        OptionError: labels or preprocessing are none.
        FormatError: a trained value is NaN or infinite.
        ConfigError, OptionError: this can be no folder.
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in uora.save(model, folder).iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    survey, target, about = Survey(model), folder_path(folder), sections_of(labels, preprocessing)
    adapter = collect(survey, save_banks=save_banks)
    adapter = replace(adapter, sections=adapter.sections | {name: Section(value) for name, value in about.items()})
    parameters = [held.tensor for held in survey.parameters.values()]
    if writes(parameters):
        write_folder(adapter, target)
    active_entry(model).about |= about
    return target


@outside_inference_mode
@on_cpu
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
        folder: that `save` wrote; or a repository on the Hugging Face hub, `user/name`, if there is no folder `user`
            here.
        name: of the adapter in the model.
        activate: whether the model computes with it from now on.
        base: what was found out about the model, to load many adapters fast: make `Base(model)` once.
        check_base: whether to refuse an adapter that was trained on other weights than this model has.
        revision: of the repository: a branch, tag or commit.

    Returns:
        The same model, with the trained parts of the base (the head) restored too.

    Raises:
        StateError: the model has an adapter of that name, is spread over processes, or `base` is of another one.
        FormatError: a file is missing, damaged, of a newer version, or does not fit this model.
        ConfigError, OptionError: this can be no folder.
        HubError: the repository cannot be had.

    Warns:
        UoraWarning: the model computes with this adapter what it computes without it, as with one that was saved before
            training. That is no error, since training can go on from it.

    Example:
        >>> import tempfile, uora_vision as uora
        >>> from torch import nn
        >>> model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = uora.save(uora.inject(model, rank=4), folder)
        ...     model = uora.load(uora.remove(model), folder, name="cats")
        >>> uora.active_adapter(model)
        'cats'
    """
    if base is not None and base.model is not model:
        raise StateError("base is of another model; make it of this one: Base(model)")
    survey = base.survey if base else Survey(model)
    library = check_room(survey, name)
    if library is None:
        check_whole(survey)
    elif activate:
        check_switch(Survey(model), library)
    folder = there(folder, revision)
    stored = read_folder(folder)
    base = base or Base(survey)
    try:
        fitted = fit(stored, base, check_base)
        what = Plan(stored.config, fitted.projections, ())
        parts, vector = _parts(stored, fitted, base), converted("vectors", stored.vector, torch.float32)
        bank, state = _banks(stored, model, what)
    except FormatError as error:
        raise FormatError(f"{os.fspath(folder)}: {error}") from error
    idle = _changes_nothing(stored, parts, base)
    apply_plan(survey, what, name, vector, parts, state, activate, bank).about |= stored.about
    if idle:
        warn(
            f"this adapter changes no output: in {os.fspath(folder)} every b or d is 0, as right after inject(), and "
            "what was trained of the base is as in this model. Was it saved before training?"
        )
    return model


def _banks(stored: Stored, model: nn.Module, what: Plan) -> tuple[Bank, BankState]:
    """The bank of a saved adapter, and what redraws made of it."""
    informed, _ = stored.informed
    bank = bank_for(model, what, stored.first(), informed)
    try:
        return bank, rebuilt(stored, bank)
    except FormatError:
        if stored.shared is not None or stored.config.init != "haar":
            raise
        # Adapters were saved where a QR ran in several threads, which changes its last bits.
        for threads in OTHER_THREADS:
            first = {n: initial_rows(stored.config, n, w, threads) for n, w in stored.drawn.items()}
            bank = bank_for(model, what, first | stored.first(), informed)
            with suppress(FormatError):
                return bank, rebuilt(stored, bank)
        raise


OTHER_THREADS = (2, 4, 8, 16, 32, 64)
"""Numbers of threads in which the matrices of an older file may have been drawn."""


def _changes_nothing(stored: Stored, parts: dict[str, Tensor], base: Base) -> bool:
    """Whether a model computes with a saved adapter what it computes without it."""
    for p, (b, d) in zip(stored.projections, stored.vectors, strict=True):
        rows = b.split([role.rows for role in p.roles])
        if any(part.any() and directions.any() for part, directions in zip(rows, d, strict=True)):
            return False
    held = ((base.held[name].tensor, t) for name, t in parts.items())
    return all(here.shape == t.shape and torch.equal(here, t) for here, t in held)


def _parts(stored: Stored, fitted: Fitted, base: Base) -> dict[str, Tensor]:
    """The trained parts of the base, as the model has to hold them."""
    names = fitted.names
    return {names[saved]: as_held(saved, t, base.held[names[saved]].tensor) for saved, t in stored.parts.items()}
