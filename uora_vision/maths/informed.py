"""Rows of A that the gradient asks for, from sketches of it.

With b = 0 only b has a gradient, and the weight can move along the rows of A alone; what of its gradient G lies outside
their span is lost at first order. So A gets the leading right singular vectors of G, as in GiVA (arXiv 2604.21901). G
itself is not needed: for a Gaussian S of a few rows more than r, S G has the same leading right singular vectors to the
accuracy of a randomised range finder (Halko, Martinsson and Tropp 2011).

Shapes: G (out, in), S (l, out), a sketch S G (l, in), rows of A (r, in).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..errors import FormatError
from .draws import orthonormal_columns, without
from .rounding import ROW_TYPES, RowType, pack_rows, round_rows, unpack_rows

OVERSAMPLING = 8
"""Rows of a sketch beyond r."""

_NOISE = 1e-5
"""Singular values below this share of the largest are rounding errors of sketches in float32."""


class Leading(NamedTuple):
    """Rows for one matrix A.

    Args:
        rows: (r, in) float32, orthonormal.
        found: how many of them the gradient gave; the others are random.
        share: of the squared norm of the sketch, what these lie along.
    """

    rows: Tensor
    found: int
    share: float


def leading_rows(sketch: Tensor, rank: int, generator: Generator, beside: Tensor | None = None) -> Leading:
    """The leading right singular vectors of a sketch (l, in), filled up with random rows where its rank is lower.

    Args:
        rank: r, at most `in`, less the rows that these are to be beside.
        generator: of the random rows.
        beside: (n, in) rows that the vectors are to add to: those of what the sketch has orthogonal to them.
    """
    sketch = sketch.to("cpu", torch.float64)
    least = _NOISE * torch.linalg.matrix_norm(sketch, 2)
    kept = sketch.new_zeros(0, sketch.shape[1]) if beside is None else orthonormal_columns(beside.t().to(sketch)).t()
    values, rows = torch.linalg.svd(without(sketch, kept) if len(kept) else sketch, full_matrices=False)[1:]
    found = min(rank, int((values > least).sum()))
    rows = rows[:found]
    share = float(values[:found].square().sum() / values.square().sum())
    if found < rank:
        gauss = torch.randn(rank - found, sketch.shape[1], generator=generator, dtype=torch.float64, device="cpu")
        gauss = without(gauss, torch.cat([kept, rows]))
        rows = torch.cat([rows, orthonormal_columns(gauss.t()).t()])
    return Leading(rows.float().contiguous(), found, share)


def narrowest(rows: Tensor) -> RowType:
    """The smallest type that holds rows exactly."""
    kinds: tuple[RowType, ...] = ("int8", "float16")
    return next((kind for kind in kinds if torch.equal(round_rows(rows, kind), rows)), "float32")


def pack(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices (r, in) by name, as tensors for a file, in the smallest type that holds all of them: `values` (n,), one
    matrix after the other by name, and for int8 `exponents`, one for each row."""
    kinds = [narrowest(t) for t in rows.values()]
    kind = next(kind for kind in ROW_TYPES if kind in kinds)
    ordered = [rows[name] for name in sorted(rows)]
    if kind != "int8":
        return {"values": torch.cat([t.to(getattr(torch, kind)).flatten() for t in ordered])}
    packed = [pack_rows(t) for t in ordered]
    return {"values": torch.cat([v.flatten() for v, _ in packed]), "exponents": torch.cat([e for _, e in packed])}


def unpack(tensors: Mapping[str, Tensor], widths: Mapping[str, int], rank: int) -> dict[str, Tensor]:
    """Inverse of `pack`: (r, in) float32 by name.

    Args:
        widths: in, by name.

    Raises:
        FormatError: the tensors are not of such matrices.
    """
    values, exponents = tensors.get("values"), tensors.get("exponents")
    if values is None or tensors.keys() - {"values", "exponents"}:
        raise FormatError(f"it must have values, and exponents for int8, not {sorted(tensors)[:4]}")
    if values.dtype not in (torch.float32, torch.float16, torch.int8) or (values.dtype == torch.int8) != (
        exponents is not None
    ):
        raise FormatError(f"values of {values.dtype} {'without' if exponents is None else 'with'} exponents")
    names = sorted(widths)
    if values.shape != (rank * sum(widths.values()),):
        raise FormatError(f"{tuple(values.shape)} values for {rank} rows of {sum(widths.values())}")
    if exponents is not None and (exponents.dtype != torch.int8 or exponents.shape != (rank * len(names),)):
        raise FormatError(f"{tuple(exponents.shape)} exponents of {exponents.dtype} for {rank * len(names)} rows")
    parts = [t.view(rank, -1) for t in values.split([rank * widths[name] for name in names])]
    if exponents is not None:
        parts = [unpack_rows(*both) for both in zip(parts, exponents.split(rank), strict=True)]
    rows = {name: part.float() for name, part in zip(names, parts, strict=True)}
    if not all(t.isfinite().all() for t in rows.values()):
        raise FormatError("rows hold NaN or infinite values")
    return rows
