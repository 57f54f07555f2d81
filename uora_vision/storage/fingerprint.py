"""By what a saved adapter knows its base and its banks again.

The base: a hash over evenly spaced values of every adapted weight, rounded to bfloat16, so that it is the same for a
base in float64, float32 or bfloat16 and on every device, and costs a gather of a few thousand values however large the
model is. Other weights (norms, the head, what trained) are not in it, nor are names, which a wrapper changes. Of a base
in float16 or quantised there is no such hash, since its values are others; its *sketch*, some values themselves, tells
whether they are close.

The banks: a hash over the float32 bits of A and B after all redraws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..maths.redraw_log import BankState
from ..weights.quantised import dequantised, is_quantised
from ..weights.sharded import whole

PER_WEIGHT = 64
"""Values of each weight in the fingerprint."""

SKETCH_WEIGHTS, SKETCH_VALUES = 8, 16
"""How many weights are in a sketch, and how many values of each."""

CLOSE = 0.5
"""Largest relative distance of the sketches of two copies of one base. Copies in float16 are about 0.002 apart, in 8
bits 0.01, in 4 bits 0.1; unrelated weights 1.4."""

_EXACT = (torch.float64, torch.float32, torch.bfloat16)

_DIGEST = "_uora_digest"


class Weight:
    """A weight of the base, of which values are taken.

    Args:
        module: that holds it.
        tensor: name of the parameter.
    """

    def __init__(self, module: nn.Module, tensor: str) -> None:
        self.module, self.tensor = module, tensor

    @property
    def data(self) -> Tensor:
        weight = self.module._parameters[self.tensor]
        assert weight is not None
        return weight.detach()

    @property
    def exact(self) -> bool:
        """Whether its values, rounded to bfloat16, are those of the base as it was published."""
        return not is_quantised(self.module._parameters[self.tensor]) and self.data.dtype in _EXACT

    def values(self, count: int) -> Tensor:
        """Evenly spaced values, (count,) or all there are, bfloat16, where the weight is."""
        t = dequantised(self.module) if is_quantised(self.module._parameters[self.tensor]) else whole(self.data)
        # An odd distance, so that the values are not all of one column.
        step = max(1, (t.numel() // count - 1) | 1)
        index = torch.arange(min(count, t.numel()), device=t.device) * step
        places = []
        for size in reversed(t.shape):  # torch.unravel_index would import sympy, which takes seconds
            places.append(index % size)
            index = index // size
        return t[tuple(reversed(places))].to(torch.bfloat16)


def weights_digest(weights: Iterable[Weight]) -> str | None:
    """The fingerprint of a base: of the adapted weights in their order. None if they have no values (on the meta
    device), or none that compare exactly."""
    chosen = list(weights)
    if any(not w.exact or w.data.is_meta for w in chosen):
        return None
    digest = hashlib.sha256()
    for w in chosen:
        digest.update(repr(tuple(w.data.shape)).encode())
    digest.update(_bytes(torch.cat([w.values(PER_WEIGHT) for w in chosen])))
    return digest.hexdigest()[:32]


def sketch_of(weights: Sequence[Weight]) -> tuple[float, ...] | None:
    """Some values of some of the weights, (n,); None if they have no values."""
    if not weights or any(w.data.is_meta for w in weights):
        return None
    step = max(1, len(weights) // SKETCH_WEIGHTS)
    chosen = weights[::step][:SKETCH_WEIGHTS]
    values = torch.cat([w.values(SKETCH_VALUES) for w in chosen])
    return tuple(values.tolist()) if values.isfinite().all() else None


def distance(one: tuple[float, ...], two: tuple[float, ...]) -> float:
    """Relative distance of two sketches; infinite for sketches of other sizes."""
    if len(one) != len(two):
        return float("inf")
    a, b = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in (one, two))
    return float((a - b).norm() / (a.norm() * b.norm()).sqrt().clamp(min=1e-30))


def bank_digest(first: Mapping[str, Tensor], state: BankState) -> str | None:
    """The fingerprint of banks.

    Args:
        first: the shared matrices that an adapter uses, as they were first drawn, (r, width) float32 each.
        state: what redraws have made of them.

    Returns:
        32 hexadecimal digits; None for matrices without values.
    """
    digest = hashlib.sha256()
    for name, matrix in sorted(first.items()):
        if matrix.is_meta:
            return None
        digest.update(f"{name} {_matrix_digest(matrix)}\n".encode())
    changed = {name: rows for name, (_, rows) in state.rows.items()} | state.own
    for name in sorted(changed):
        if len(changed[name]):
            digest.update(f"{name} {(state.draws[name] > 0).nonzero().flatten().tolist()}\n".encode())
            digest.update(_bytes(changed[name]))
    return digest.hexdigest()[:32]


def _matrix_digest(matrix: Tensor) -> str:
    """Computed once for each matrix, which all adapters of a bank share and nothing changes."""
    found: str | None = matrix.__dict__.get(_DIGEST)
    if found is None:
        found = matrix.__dict__[_DIGEST] = hashlib.sha256(_bytes(matrix)).hexdigest()
    return found


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
