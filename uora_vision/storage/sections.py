"""What a description may hold besides what every adapter has, since version 4: one line of `SECTIONS` for each.

A section is a field of the description, and tensors whose names begin with its name. Readers of version 4 know all of
them; whoever adds another one adds a line here, and raises the version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import FormatError
from .preprocessing import check_labels, check_preprocessing
from .stored import Section, Stored


class Kind(NamedTuple):
    """One kind of section.

    Args:
        check: whether a section is one of an adapter; raises FormatError.
        unread: whether an adapter computes something else without it, and this version does not compute with it yet.
    """

    check: Callable[[Section, Stored], None]
    unread: bool


def read_sections(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Section]:
    """The sections of a description; their tensors are taken out of `tensors`."""
    found = {}
    for name in SECTIONS:
        mine = {key: tensors.pop(key) for key in [key for key in tensors if key.startswith(f"{name}/")]}
        if name in config:
            found[name] = Section(config[name], {key.removeprefix(f"{name}/"): t for key, t in mine.items()})
        elif mine:
            raise FormatError(f"the tensor {min(mine)[:80]!r} is there without the section {name!r}")
    return found


def check_sections(stored: Stored) -> None:
    """Whether the sections of an adapter are as they must be.

    Raises:
        FormatError: one is not.
    """
    for name, section in stored.sections.items():
        try:
            SECTIONS[name].check(section, stored)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error


def _declared(section: Section, known: Mapping[str, Any]) -> list[str]:
    """The names of matrices that a section lists, each once and in order."""
    names = section.value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or names != sorted(set(names)):
        raise FormatError("it must be a list of names, sorted, each once")
    if odd := [name for name in names if name not in known]:
        raise FormatError(f"{odd[0][:80]!r} is not in this adapter")
    return names


def _check_rows(section: Section, stored: Stored) -> None:
    """Informed rows of A: for each such matrix the numbers of the projections that have it, and the rows."""
    members = section.value
    if not isinstance(members, dict) or not members:
        raise FormatError("it must map names of matrices to numbers of projections")
    seen: set[int] = set()
    for name, numbers in members.items():
        whole = isinstance(numbers, list) and numbers and all(type(i) is int for i in numbers)
        if not whole or min(numbers) < 0 or max(numbers) >= len(stored.projections):
            raise FormatError(f"{name[:80]!r} must have a list of numbers of projections")
        if len(set(numbers)) < len(numbers) or seen & set(numbers):
            raise FormatError(f"{name[:80]!r} has a projection that is there twice")
        seen |= set(numbers)
        widths = {stored.projections[i].width for i in numbers}
        if len(widths) > 1 or re.fullmatch(rf"A{min(widths)}:[0-9]{{1,9}}", name) is None:
            raise FormatError(f"{name[:80]!r} is no matrix of projections of width {min(widths)}")
    _ = stored.informed  # which reads the tensors


def _check_roundings(section: Section, stored: Stored) -> None:
    """Where a shared matrix is rounded otherwise than it is computed elsewhere: (n, 2) int32, the place in the flat
    matrix, and by how many of the last place."""
    rest = dict(section.tensors)
    for name in _declared(section, stored.matrices):
        t = rest.pop(name, None)
        if t is None or t.dtype != torch.int32 or t.dim() != 2 or t.shape[1] != 2:
            raise FormatError(f"{name!r} must have an int32 tensor of pairs")
        places = t[:, 0].long()
        if len(t) and (places.min() < 0 or places.max() >= stored.config.rank * stored.matrices[name]):
            raise FormatError(f"a place of {name!r} is outside of it")
        if not (places.diff() > 0).all():
            raise FormatError(f"the places of {name!r} must ascend")
    _nothing_left(rest)


def _check_labels(section: Section, stored: Stored) -> None:
    check_labels(section.value)
    _nothing_left(section.tensors)


def _check_preprocessing(section: Section, stored: Stored) -> None:
    check_preprocessing(section.value)
    prompts, labels = section.value.get("prompts"), stored.sections.get("labels")
    if prompts and labels is not None and isinstance(labels.value, list) and len(prompts) != len(labels.value):
        raise FormatError(f"{len(prompts)} prompts do not go with {len(labels.value)} classes")
    _nothing_left(section.tensors)


def _nothing_left(tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        raise FormatError(f"it does not list its tensor {min(tensors)[:80]!r}")


SECTIONS: dict[str, Kind] = {
    "rows": Kind(_check_rows, unread=False),
    "roundings": Kind(_check_roundings, unread=True),
    "labels": Kind(_check_labels, unread=False),
    "preprocessing": Kind(_check_preprocessing, unread=False),
}
