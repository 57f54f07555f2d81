"""Holding a saved adapter against a model: where each of its projections is, and whether it was made for this base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import FormatError, StateError, warn
from ..lifecycle.apply import room
from ..lifecycle.library import LIBRARY
from ..structure.paths import lies_within, submodule
from ..structure.targets import Projection
from ..weights.sharded import class_name
from .base import Base
from .fingerprint import CLOSE, distance
from .sections import SECTIONS
from .stored import Stored


@dataclass(frozen=True)
class Fitted:
    """Where the parts of a saved adapter go.

    Args:
        projections: the adapted weights in this model, in the order of the file.
        names: of the trained parts of the base in this model, by their name in the file.
    """

    projections: tuple[Projection, ...]
    names: dict[str, str]


def fit(stored: Stored, base: Base, check_base: bool = True) -> Fitted:
    """Hold a saved adapter against a model, without touching it.

    A projection is looked for at its path, and otherwise by its block and role, if one weight alone has these and the
    rows of the file. Trained parts of the base are looked for by name, and otherwise by the end of the name.

    Args:
        check_base: whether other weights than those that the adapter was trained on are an error.

    Raises:
        FormatError: the adapter does not fit this model, or was made for another base.
        StateError, TargetError: the model cannot be adapted as it is.
    """
    if unread := [name for name in stored.sections if SECTIONS[name].unread]:
        raise FormatError(f"the adapter has {unread[0]}, with which this version does not compute")
    made_for = stored.identity
    known = made_for.architecture and base.architecture
    if check_base and known and made_for.architecture != base.architecture:
        raise FormatError(f"the adapter was made for {made_for.architecture}; this model is {base.architecture}")
    _check_size(stored, base)
    projections = base.projections_of(stored)
    moved = [p.path for p in projections] != [p.path for p in stored.projections]
    if not moved and made_for.parameter_tensors not in (None, base.parameter_tensors):
        raise FormatError(
            f"the adapter was made for a {made_for.shown} of {made_for.parameter_tensors} parameter tensors besides "
            f"the head; this {base.architecture or class_name(base.model)} has {base.parameter_tensors}, so its depth "
            "or its parts are others"
        )
    names = _names(stored, base)
    if check_base:
        paths = {p.path: base.weight_name(p.path) for p in projections}
        trained = set(names.values())
        if stored.trained is None and (strange := [name for name in paths.values() if name in trained]):
            raise FormatError(
                f"the file has other values for {strange[0]}, a frozen weight that it adapts, and does not say that it "
                "was trained"
            )
        _check_weights(stored, base, tuple(path for path, name in paths.items() if name not in trained))
    return Fitted(projections, names)


def as_held(name: str, saved: Tensor, held: Tensor) -> Tensor:
    """A saved tensor as the model has to hold it in the place of another: of its type, on its device, a parameter where
    that is one.

    Raises:
        FormatError: it is of another kind of numbers, or holds values that are infinite there.
    """
    if held.is_floating_point() != saved.is_floating_point() or held.is_complex() != saved.is_complex():
        raise FormatError(f"{name} is of {saved.dtype}, in this model of {held.dtype}")
    copy = converted(name, saved, held.dtype, held.device)
    return nn.Parameter(copy) if isinstance(held, nn.Parameter) else copy


def converted(name: str, t: Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A copy of another type.

    Raises:
        FormatError: it holds values that are infinite there.
    """
    out = t.to(device=device, dtype=dtype, copy=True)
    if out.is_floating_point() and not out.isfinite().all():
        raise FormatError(f"{name} holds {float(t.abs().max()):.3g}, which is too large for {dtype} of this model")
    return out


def _check_size(stored: Stored, base: Base) -> None:
    """Whether an adapter is no larger than the model can have, before anything of that size is made."""
    places = len(base.survey.shown.candidates)
    if len(stored.projections) > places:
        raise FormatError(
            f"the adapter was made for {stored.identity.shown}, of {len(stored.projections):,} weights; this model has "
            f"{places:,} to adapt"
        )
    held = sum(h.tensor.numel() for h in base.held.values())
    wanted = stored.config.rank * sum(stored.matrices.values())
    if wanted > room(held):
        raise FormatError(
            f"A and B of this adapter are {wanted:,} numbers at rank {stored.config.rank:,}; the whole model has "
            f"{held:,}, so it is not for this model"
        )


def _names(stored: Stored, base: Base) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, t in sorted(stored.parts.items()):  # files keep no order
        held = base.held[name].tensor if name in base.held else None
        if held is not None and (held.shape == t.shape or _other_classes(base, name, held, t)):
            names[name] = name
    taken = set(names.values())
    for name, t in sorted(stored.parts.items()):  # files keep no order
        if name in names:
            continue
        same = {other: _common_end(name, other) for other, o in base.held.items() if o.tensor.shape == t.shape} if (
            name not in base.held
        ) else {}  # fmt: skip
        longest = max(same.values(), default=0)
        best = [other for other, length in same.items() if length == longest and other not in taken]
        if longest < 2 or len(best) != 1:
            here = f"has shape {tuple(base.held[name].tensor.shape)}" if name in base.held else "does not exist"
            head = lies_within(name, base.survey.heads) or name not in base.held
            same_as = "number of classes (num_classes=...)" if head else "sizes (img_size=... of the inputs, say)"
            raise FormatError(
                f"the adapter holds a trained {name} of shape {tuple(t.shape)}, which in this model {here}. Create the "
                f"model with the same {same_as}."
            )
        names[name] = best[0]
        taken.add(best[0])
    return names


def _other_classes(base: Base, name: str, held: Tensor, t: Tensor) -> bool:
    """Whether a trained part is a head for another number of classes, on a model that has adapters already: there each
    has its own, and no code outside has yet been told how many classes there are."""
    path, _, key = name.rpartition(".")
    if LIBRARY not in base.model.__dict__ or key not in ("weight", "bias") or held.shape[1:] != t.shape[1:]:
        return False
    return lies_within(path, base.survey.heads) and isinstance(submodule(base.model, path), nn.Linear)


def _common_end(one: str, two: str) -> int:
    """How many parts of two dotted names are the same, from the end."""
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(two.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _check_weights(stored: Stored, base: Base, paths: tuple[str, ...]) -> None:
    made_for = stored.identity
    if made_for.fingerprint is None and made_for.sketch is None:
        return
    error = FormatError(
        f"the adapter was made for other weights than this {class_name(base.model)} has: for {made_for.shown}, "
        f"fingerprint {made_for.fingerprint}. Load it into that base, or, if you know that this one will do, with "
        "check_base=False."
    )
    here = base.fingerprint(paths)
    if here is not None and made_for.fingerprint is not None:
        if here != made_for.fingerprint:
            raise error
        return
    try:
        sketch = base.sketch(paths)
    except (StateError, ImportError, RuntimeError) as reason:
        warn(f"whether this is the base that the adapter was made for could not be told: {reason}")
        return
    if sketch is not None and made_for.sketch is not None and distance(sketch, made_for.sketch) > CLOSE:
        raise error
