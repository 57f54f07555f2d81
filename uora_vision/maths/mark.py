"""A word that says which redraws a bank has, and that is still read after models were averaged.

Code that averages models (timm's ModelEma, torch's AveragedModel, Lightning's WeightAveraging) copies or mixes tensors,
and knows nothing of logs. So a bank has a small buffer beside its matrices, its *mark*: 16 numbers that follow from a
digest of its log. Whatever copies or mixes the tensors of one model into another writes into the mark too. The bank
that is written to sees that the mark is no longer its own, tells from the direction in which it moved whose redraws
these are, and takes them over: rows are copied, never averaged.

Shapes: a mark (16,) float32.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .redraw_log import Redraw

LENGTH = 16

_ROUNDING = 4e-7
"""How far float32 arithmetic moves a mark that is averaged with itself."""

_FAMILIES: weakref.WeakSet[Family] = weakref.WeakSet()


class Family:
    """What a bank and its copies know of each other: every log that one of them had, by its digest."""

    def __init__(self) -> None:
        self.logs: dict[bytes, tuple[list[Redraw], int]] = {}
        self.members: weakref.WeakSet[Any] = weakref.WeakSet()
        _FAMILIES.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        return self

    def __reduce__(self) -> tuple[type[Family], tuple[()]]:
        return Family, ()

    @property
    def differ(self) -> bool:
        """Whether there are several banks with several logs: without, nothing can be mixed."""
        return len(self.logs) > 1 and len(self.members) > 1


def digest_of_options(options: Mapping[str, Any]) -> bytes:
    """Of a bank as it is first drawn (32 bytes)."""
    return hashlib.sha256(repr(sorted(options.items())).encode()).digest()


def digest(start: bytes, events: Iterable[Redraw]) -> bytes:
    """Of a log (32 bytes), continued from the digest of its beginning."""
    for e in events:
        event = [start, f"{e.step}/{e.matrix}/{e.interpolation}/".encode()]
        event += [t.numpy().tobytes() for t in (e.indices, e.draws, e.alpha)]
        event += [] if e.rows is None else [e.rows.numpy().tobytes()]
        start = hashlib.sha256(b"".join(event)).digest()
    return start


def mark_of(known: bytes) -> Tensor:
    """The mark (16,) float32 of a digest; its numbers are exact in float32 and in [-1, 1)."""
    return torch.frombuffer(bytearray(known), dtype=torch.int16).to(torch.float32) / 2**15


def decode(found: Tensor, mine: bytes, family: Family) -> bytes | None:
    """Whose mark was copied or mixed into a bank's own.

    Args:
        found: (16,) what the mark is now.
        mine: digest of the bank's log, whose mark it was.
        family: of the bank.

    Returns:
        The digest of a log that some bank has; the bank's own if nothing was mixed in; None if it cannot be told.
    """
    own, found = mark_of(mine).double(), found.double()
    moved = found - own
    if not moved.isfinite().all():
        return None
    if moved.abs().max() <= _ROUNDING:
        return mine
    for known in _known(family):
        way = mark_of(known).double() - own
        share = float(moved @ way / (way @ way).clamp(min=1e-9))
        if 0 < share < 1 + 1e-5 and (moved - share * way).norm() <= 0.1 * moved.norm() + _ROUNDING:
            return known
    return None


def log_of(known: bytes, family: Family) -> list[Redraw]:
    """The log of a digest that `decode` gave."""
    log, length = next(f.logs[known] for f in (family, *_FAMILIES) if known in f.logs)
    return log[:length]


def banks() -> list[Any]:
    """Every bank that there is."""
    return [bank for family in list(_FAMILIES) for bank in list(family.members)]


def _known(family: Family) -> Iterator[bytes]:
    """Digests of all logs, those that a bank has now first."""
    others = [family, *(f for f in list(_FAMILIES) if f is not family)]
    for f in others:
        yield from [bank.digest for bank in list(f.members)]
    for f in others:
        yield from reversed(list(f.logs))
