"""What redraws made of a bank: a log from which, with the seed, its matrices are rebuilt.

Shapes: of a redraw of k rows, indices, draws and alpha (k,); of a packed log of n rows, entries (n, 5), alpha (n,), and
of m rows among them that were given, lengths and exponents (m,), values (sum of lengths,).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import FormatError
from .rounding import pack_rows, unpack_rows

Interpolation = Literal["linear", "spherical"]
Way = Literal["linear", "spherical", "given"]
"""How a row comes to be what it is: mixed with a random one, or given from outside, which a log then holds."""

_WAYS: tuple[Way, ...] = ("linear", "spherical", "given")
_GIVEN = 2


@dataclass(frozen=True)
class Redraw:
    """Rows of one matrix redrawn at one step.

    Args:
        step: optimizer step, counted from 1.
        matrix: name of the matrix, such as `A768`, or `blocks.0.attn.qkv.q/A` for a layer's own copy.
        indices: (k,) int64, ascending: which directions.
        draws: (k,) int64: how often each has been drawn in this matrix, this time included.
        alpha: (k,) float64: share that is kept of each old row.
        interpolation: how old and fresh rows are joined.
        rows: (k, width) float32, exact in int8 with a power of 2 for each: the new rows, if they were given.
    """

    step: int
    matrix: str
    indices: Tensor
    draws: Tensor
    alpha: Tensor
    interpolation: Way
    rows: Tensor | None = None


@dataclass
class BankState:
    """What redraws have made of a bank; nothing for a bank as it was first drawn.

    Args:
        log: the redraws, in order.
        draws: by matrix, how often each direction was drawn again, (r,) int64.
        rows: by shared matrix, the directions that changed (k,) and what they are now (k, width), float32 on the CPU.
        own: by a layer's own matrix, its rows (k, width), float32 on the CPU, for the directions that were drawn.
        signed: of the bank that it is the state of: digest of the first draw, length of the log, digest of both.
    """

    log: list[Redraw] = field(default_factory=list)
    draws: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)
    signed: tuple[bytes, int, bytes] | None = None


def pack_log(log: list[Redraw]) -> tuple[dict[str, Tensor], list[str]]:
    """A log as tensors for a file: `entries` (n, 5) int32 (step, matrix, index, draw, interpolation), `alpha` (n,)
    float64, and the names of the matrices. If rows were given, also `values` int8, all of them one after the other, and
    of each its `exponents` int8 and `lengths` int32."""
    names = sorted({event.matrix for event in log})
    number = {name: i for i, name in enumerate(names)}
    entries = [
        torch.stack(
            [
                torch.full_like(e.indices, e.step),
                torch.full_like(e.indices, number[e.matrix]),
                e.indices,
                e.draws,
                torch.full_like(e.indices, _WAYS.index(e.interpolation)),
            ],
            dim=1,
        )
        for e in log
    ]
    empty = torch.zeros(0, 5, dtype=torch.int64, device="cpu")
    alpha = torch.cat([e.alpha for e in log]) if log else torch.zeros(0, dtype=torch.float64, device="cpu")
    tensors = {"entries": torch.cat([empty, *entries]).to(torch.int32), "alpha": alpha}
    if given := [e.rows for e in log if e.rows is not None]:
        packed = [pack_rows(rows) for rows in given]
        lengths = [rows.shape[1] for rows in given for _ in rows]
        tensors["values"] = torch.cat([values.flatten() for values, _ in packed])
        tensors["exponents"] = torch.cat([exponents for _, exponents in packed])
        tensors["lengths"] = torch.tensor(lengths, dtype=torch.int32, device="cpu")
    return tensors, names


def unpack_log(tensors: Mapping[str, Tensor], names: list[str]) -> list[Redraw]:
    """Inverse of `pack_log`.

    Raises:
        FormatError: the tensors are not a log.
    """
    entries, alpha = tensors["entries"].to(torch.int64), tensors["alpha"]
    if entries.dim() != 2 or entries.shape[1] != 5 or alpha.shape != entries.shape[:1]:
        raise FormatError(f"the log of redraws has shapes {tuple(entries.shape)} and {tuple(alpha.shape)}")
    if len(entries) and (entries.min() < 0 or entries[:, 1].max() >= len(names) or entries[:, 4].max() >= len(_WAYS)):
        raise FormatError("the log of redraws holds numbers out of range; the file is damaged")
    key = entries[:, [0, 1, 4]]
    starts = torch.ones(len(key), dtype=torch.bool, device="cpu")
    starts[1:] = (key[1:] != key[:-1]).any(1) | (entries[1:, 2] <= entries[:-1, 2])
    bounds = [*starts.nonzero().squeeze(1).tolist(), len(key)]
    given = iter(_given(tensors, int((entries[:, 4] == _GIVEN).sum())))
    return [
        Redraw(
            int(rows[0, 0]),
            names[int(rows[0, 1])],
            rows[:, 2],
            rows[:, 3],
            alpha[i:j],
            _WAYS[int(rows[0, 4])],
            _stacked(list(itertools.islice(given, j - i))) if rows[0, 4] == _GIVEN else None,
        )
        for i, j in itertools.pairwise(bounds)
        if len(rows := entries[i:j])
    ]


GIVEN: dict[str, torch.dtype] = {"values": torch.int8, "exponents": torch.int8, "lengths": torch.int32}
"""The tensors of a packed log that are there if rows were given."""


def _given(tensors: Mapping[str, Tensor], count: int) -> list[Tensor]:
    """The rows that were given, each (width,) float32, of a packed log."""
    found = {name: tensors[name] for name in GIVEN if name in tensors}
    if not found and not count:
        return []
    if len(found) < len(GIVEN) or any(t.dtype != GIVEN[name] or t.dim() != 1 for name, t in found.items()):
        raise FormatError(f"the log of redraws has {count} given rows, and not the values of them")
    lengths = found["lengths"].long()
    fits = len(lengths) == len(found["exponents"]) == count and int(lengths.min()) > 0
    if not fits or int(lengths.sum()) != len(found["values"]):
        raise FormatError(f"the log of redraws has {count} given rows, of which the values are not as many as it says")
    parts = found["values"].split(lengths.tolist())
    return [unpack_rows(v[None], e[None])[0] for v, e in zip(parts, found["exponents"], strict=True)]


def _stacked(rows: list[Tensor]) -> Tensor:
    if len({len(row) for row in rows}) > 1:
        raise FormatError("the log of redraws has rows of several lengths for one matrix")
    return torch.stack(rows)


def draw_counts(log: list[Redraw], rank: int) -> dict[str, Tensor]:
    """How often each direction was drawn again, (r,) int64, by matrix."""
    draws: dict[str, Tensor] = {}
    for event in log:
        draws.setdefault(event.matrix, torch.zeros(rank, dtype=torch.int64, device="cpu"))[event.indices] = event.draws
    return draws


def check_log(log: list[Redraw], rank: int, widths: Mapping[str, int]) -> None:
    """Whether a log can be replayed.

    Args:
        rank: of the banks.
        widths: of every matrix that it may redraw, by name.

    Raises:
        FormatError: it cannot.
    """
    step = 0
    if len({(event.step, event.matrix) for event in log}) < len(log):
        raise FormatError("the log redraws a matrix twice at one step")
    draws: dict[str, Tensor] = {}
    for event in log:
        if event.matrix not in widths:
            raise FormatError(f"the log redraws {event.matrix[:80]!r}, which this adapter does not have")
        if (last := int(event.indices.max())) >= rank:
            raise FormatError(f"the log redraws direction {last} of {event.matrix!r}; the rank is {rank}")
        if event.step < step:
            raise FormatError(f"the log goes back from step {step} to {event.step}")
        if not ((event.alpha >= 0) & (event.alpha <= 1)).all():
            raise FormatError(f"the log has an alpha outside of [0, 1] at step {event.step}")
        if event.interpolation == "spherical" and widths[event.matrix] <= rank:
            raise FormatError(f"the log rotates rows of {event.matrix!r}, which is too narrow for that")
        rows = event.rows
        if rows is not None and (rows.shape != (len(event.indices), widths[event.matrix]) or not rows.isfinite().all()):
            raise FormatError(f"the log gives {event.matrix!r} rows at step {event.step} that it cannot have")
        step = event.step
        seen = draws.setdefault(event.matrix, torch.zeros(rank, dtype=torch.int64, device="cpu"))
        seen[event.indices] += 1
        if not torch.equal(seen[event.indices], event.draws):
            raise FormatError(f"the log of {event.matrix!r} has gaps: step {event.step} is not the next draw")


_MAGIC, _HEAD = b"UORA\x01", 5 + 4 + 8


def log_to_bytes(log: list[Redraw], first: Mapping[str, Any]) -> bytes:
    """A log as the bytes that a state dict holds: `UORA`, version 1, length (4 bytes), 8 bytes of a checksum, and
    compressed: JSON of the first draw and of the names of matrices, a line feed, entries, alpha, and where rows were
    given values, exponents and lengths.

    Args:
        first: options that decide the first draw, by name.
    """
    tensors, names = pack_log(log)
    about = {"first": dict(first), "matrices": names, "redraws": len(tensors["alpha"])}
    if "values" in tensors:
        about["given"] = [len(tensors["values"]), len(tensors["lengths"])]
    content = b"".join(
        [json.dumps(about, sort_keys=True).encode(), b"\n", *(t.numpy().tobytes() for t in tensors.values())]
    )
    packed = zlib.compress(content, 9)
    return _MAGIC + len(packed).to_bytes(4, "little") + hashlib.sha256(packed).digest()[:8] + packed


def log_from_bytes(content: bytes) -> tuple[list[Redraw], dict[str, Any]]:
    """Inverse of `log_to_bytes`, of bytes that may be followed by zeros.

    Raises:
        FormatError: they are damaged, or of a newer version.
    """
    length = int.from_bytes(content[5:9], "little")
    packed = content[_HEAD : _HEAD + length]
    if content[:5] != _MAGIC or len(packed) < length or hashlib.sha256(packed).digest()[:8] != content[9:_HEAD]:
        raise FormatError(
            "the redraws in this state dict cannot be read: it is damaged, of a newer uora_vision, or the mean of "
            "state dicts with different redraws, which has no A and B"
        )
    try:
        head, _, rest = zlib.decompress(packed).partition(b"\n")
        found = json.loads(head)
        count, names, first = found["redraws"], found["matrices"], found["first"]
        values, given = found.get("given", (0, 0))
        kinds = {"entries": (torch.int32, 5 * count), "alpha": (torch.float64, count)}
        if given:
            kinds |= {name: (kind, values if name == "values" else given) for name, kind in GIVEN.items()}
        sizes = [kind.itemsize * size for kind, size in kinds.values()]
        whole = all(type(n) is int and n >= 0 for n in (count, values, given)) and len(rest) == sum(sizes)
        if not whole or not isinstance(first, dict):
            raise FormatError("the redraws in this state dict are not as many as it says")
        parts = zip(kinds.items(), itertools.accumulate([0, *sizes]), sizes, strict=False)
        tensors = {
            name: torch.frombuffer(bytearray(rest[at : at + size]), dtype=kind)
            if size
            else torch.zeros(0, dtype=kind, device="cpu")
            for (name, (kind, _)), at, size in parts
        }
    except (ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
        raise FormatError(f"the redraws in this state dict are damaged: {error}") from error
    return unpack_log(tensors | {"entries": tensors["entries"].view(-1, 5)}, names), first
