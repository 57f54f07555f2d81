"""What redraws made of a bank: a log from which, with the seed, its matrices are rebuilt.

Shapes: of a redraw of k rows, indices, draws and alpha (k,); of a packed log of n rows, entries (n, 5), alpha (n,).
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

Interpolation = Literal["linear", "spherical"]

_INTERPOLATIONS: tuple[Interpolation, ...] = ("linear", "spherical")


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
    """

    step: int
    matrix: str
    indices: Tensor
    draws: Tensor
    alpha: Tensor
    interpolation: Interpolation


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
    float64, and the names of the matrices."""
    names = sorted({event.matrix for event in log})
    number = {name: i for i, name in enumerate(names)}
    entries = [
        torch.stack(
            [
                torch.full_like(e.indices, e.step),
                torch.full_like(e.indices, number[e.matrix]),
                e.indices,
                e.draws,
                torch.full_like(e.indices, _INTERPOLATIONS.index(e.interpolation)),
            ],
            dim=1,
        )
        for e in log
    ]
    empty = torch.zeros(0, 5, dtype=torch.int64, device="cpu")
    alpha = torch.cat([e.alpha for e in log]) if log else torch.zeros(0, dtype=torch.float64, device="cpu")
    return {"entries": torch.cat([empty, *entries]).to(torch.int32), "alpha": alpha}, names


def unpack_log(tensors: dict[str, Tensor], names: list[str]) -> list[Redraw]:
    """Inverse of `pack_log`.

    Raises:
        FormatError: the tensors are not a log.
    """
    entries, alpha = tensors["entries"].to(torch.int64), tensors["alpha"]
    if entries.dim() != 2 or entries.shape[1] != 5 or alpha.shape != entries.shape[:1]:
        raise FormatError(f"the log of redraws has shapes {tuple(entries.shape)} and {tuple(alpha.shape)}")
    if len(entries) and (entries.min() < 0 or entries[:, 1].max() >= len(names) or entries[:, 4].max() > 1):
        raise FormatError("the log of redraws holds numbers out of range; the file is damaged")
    key = entries[:, [0, 1, 4]]
    starts = torch.ones(len(key), dtype=torch.bool, device="cpu")
    starts[1:] = (key[1:] != key[:-1]).any(1) | (entries[1:, 2] <= entries[:-1, 2])
    bounds = [*starts.nonzero().squeeze(1).tolist(), len(key)]
    return [
        Redraw(
            int(rows[0, 0]),
            names[int(rows[0, 1])],
            rows[:, 2],
            rows[:, 3],
            alpha[i:j],
            _INTERPOLATIONS[int(rows[0, 4])],
        )
        for i, j in itertools.pairwise(bounds)
        if len(rows := entries[i:j])
    ]


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
        step = event.step
        seen = draws.setdefault(event.matrix, torch.zeros(rank, dtype=torch.int64, device="cpu"))
        seen[event.indices] += 1
        if not torch.equal(seen[event.indices], event.draws):
            raise FormatError(f"the log of {event.matrix!r} has gaps: step {event.step} is not the next draw")


_MAGIC, _HEAD = b"UORA\x01", 5 + 4 + 8


def log_to_bytes(log: list[Redraw], first: Mapping[str, Any]) -> bytes:
    """A log as the bytes that a state dict holds: `UORA`, version 1, length (4 bytes), 8 bytes of a checksum, and
    compressed: JSON of the first draw and of the names of matrices, a line feed, entries, alpha.

    Args:
        first: options that decide the first draw, by name.
    """
    tensors, names = pack_log(log)
    head = json.dumps({"first": dict(first), "matrices": names, "redraws": len(tensors["alpha"])}, sort_keys=True)
    content = b"".join([head.encode(), b"\n", *(tensors[name].numpy().tobytes() for name in ("entries", "alpha"))])
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
        if type(count) is not int or len(rest) != 28 * count or not isinstance(first, dict):
            raise FormatError("the redraws in this state dict are not as many as it says")
        entries = (
            torch.frombuffer(bytearray(rest[: 20 * count]), dtype=torch.int32)
            if count
            else torch.zeros(0, device="cpu")
        )
        alpha = (
            torch.frombuffer(bytearray(rest[20 * count :]), dtype=torch.float64)
            if count
            else torch.zeros(0, device="cpu")
        )
    except (ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
        raise FormatError(f"the redraws in this state dict are damaged: {error}") from error
    return unpack_log({"entries": entries.view(-1, 5), "alpha": alpha}, names), first
