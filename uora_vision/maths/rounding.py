"""How numbers of rows are kept that cannot be drawn again.

Shapes: rows (r, in).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError

RowType = Literal["float32", "float16", "int8"]
"""How numbers of informed rows are kept; `int8` with a power of 2 for each row."""

ROW_TYPES: tuple[RowType, ...] = get_args(RowType)


def round_rows(rows: Tensor, kind: RowType) -> Tensor:
    """Rows (r, in) float32, as they come out of a file that keeps them so. Rounding again changes nothing.

    Raises:
        ConfigError: there is no such type.
    """
    if kind == "float32":
        return rows
    if kind == "float16":
        return rows.half().float()
    if kind != "int8":
        raise ConfigError(f"store must be one of {', '.join(ROW_TYPES)}, got {kind!r}")
    values, exponents = pack_rows(rows)
    return unpack_rows(values, exponents)


def pack_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (r, in) as int8 (r, in) and an exponent of 2 for each, int8 (r,).

    Powers of 2, so that the products are exact, and the same numbers come out of them again.
    """
    largest = rows.abs().amax(dim=1).clamp(min=2.0**-100)
    exponents = torch.ceil(torch.log2(largest.double() / 127)).clamp(min=-100)
    return torch.round(rows.double() * 2.0 ** -exponents[:, None]).to(torch.int8), exponents.to(torch.int8)


def unpack_rows(values: Tensor, exponents: Tensor) -> Tensor:
    """Inverse of `pack_rows`: (r, in) float32."""
    return (values.double() * 2.0 ** exponents.double()[:, None]).float()
