"""The forms of the adapted projection as plain functions of tensors; `functional.py` says what they mean and makes them
differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..weights.matrix import Form, Spans, add_, from_matrix, in_order, place, take, to_matrix
from .cost import folds, joins, keeps_input

WIDE = (torch.float32, torch.float64)
"""Types that hold W + dW: a young update is far below half a unit in the last place of bfloat16 or float16."""


def output(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b: Tensor,
    d: Tensor,
    spans: Spans,
    a: Sequence[Tensor],
    bm: Sequence[Tensor],
    u: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y, and what was made of the vectors for it, in the type of x: W + dW, or L, or neither."""
    bias = None if bias is None else in_type(bias, x.dtype)
    rows = weight.shape[0]
    if folds_weight(x.numel() // x.shape[-1], weight):
        whole = folded(weight, b, d, spans, a, bm, x.dtype)
        return linear(x, whole, bias), whole
    flat = x.reshape(-1, x.shape[-1])
    if u is None:
        u = [flat @ in_type(m, x.dtype).t() for m in a]
    joined = x.dtype not in WIDE and joins(len(flat), *weight.shape)
    left = (
        left_matrix(b, d, spans, len(a), bm, rows, x.dtype) if joined or not _narrow(flat, d, spans, bm, rows) else None
    )
    if x.dtype in WIDE:
        # Of x as it came: torch sums in another order for other strides, and with b = 0 this must be the base's y.
        y = linear(x, in_type(weight, x.dtype), bias).reshape(-1, rows)
        y = _branch(u, left, b, d, bm, y)
    elif joined:
        assert left is not None
        y = linear(torch.cat([flat, *u], dim=1), torch.cat([in_type(weight, x.dtype), left], dim=1), bias)
    else:
        y = torch.addmm(_branch(u, left, b, d, bm, flat.new_zeros(1, rows)), flat, in_type(weight, x.dtype).t())
        y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], rows), left


def _branch(u: Sequence[Tensor], left: Tensor | None, b: Tensor, d: Tensor, bm: Sequence[Tensor], y: Tensor) -> Tensor:
    """y + u L^T in the type of u, for u (N, r) of each A and y (N, out) or (1, out). Without L, tokens are scaled."""
    first = u[0]
    if left is None:
        z = (first[:, None] * in_type(d, first.dtype)) @ in_type(bm[0], first.dtype).t()
        return torch.addcmul(y, z.flatten(1), in_type(b, first.dtype))
    return torch.addmm(y, first if len(u) == 1 else torch.cat(list(u), dim=1), left.t())


def added(
    y: Tensor, u: Sequence[Tensor], b: Tensor, d: Tensor, spans: Spans, bm: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """y + u L^T in the type of y, for u (N, r) of each A; and L, if it was formed."""
    flat, dtype = y.reshape(-1, y.shape[-1]), u[0].dtype
    rows = flat.shape[1]
    left = None if _narrow(u[0], d, spans, bm, rows) else left_matrix(b, d, spans, len(u), bm, rows, dtype)
    if y.dtype == dtype:
        return _branch(u, left, b, d, bm, flat).view(y.shape), left
    return (flat + _branch(u, left, b, d, bm, u[0].new_zeros(1, rows))).to(y.dtype).view(y.shape), left


def _narrow(x: Tensor, d: Tensor, spans: Spans, bm: Sequence[Tensor], out: int) -> bool:
    """Whether tokens are so few that scaling them, N (r + out), is less than forming L, r out: at least below r."""
    return len(x) < d.shape[1] and len(bm) == 1 and in_order(spans, out)


def keeps_made(x: Tensor, weight: Tensor) -> bool:
    """Whether the backward is given what the forward made: a rounded W + dW, as the frozen layer keeps a rounded W; and
    L where it is smaller than the output."""
    tokens = x.numel() // x.shape[-1]
    return x.dtype != weight.dtype if folds_weight(tokens, weight) else tokens >= weight.shape[0]


def input_gradient(
    g: Tensor,
    weight: Tensor,
    b: Tensor,
    d: Tensor,
    spans: Spans,
    a: Sequence[Tensor],
    bm: Sequence[Tensor],
    made: Tensor | None,
) -> Tensor:
    """(N, out) -> (N, in)."""
    if folds_weight(g.shape[0], weight):
        return g @ (folded(weight, b, d, spans, a, bm, g.dtype) if made is None else made)
    return torch.addmm(branch_gradient(g, b, d, spans, a, bm, made), g, in_type(weight, g.dtype))


def branch_gradient(
    g: Tensor, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor], left: Tensor | None
) -> Tensor:
    """(g L) A in the type of g, (N, out) -> (N, in)."""
    if left is None and _narrow(g, d, spans, bm, g.shape[1]):
        h = (g * in_type(b, g.dtype)).view(len(g), len(d), b.numel() // len(d)) @ in_type(bm[0], g.dtype)
        h = (h * in_type(d, g.dtype)).sum(dim=1)
    else:
        left = left_matrix(b, d, spans, len(a), bm, g.shape[1], g.dtype) if left is None else left
        h = g @ left
    return h @ in_type(a[0] if len(a) == 1 else torch.cat(list(a)), g.dtype)


def products(g: Tensor, kept: Sequence[Tensor], spans: Spans, a: Sequence[Tensor], keep_x: bool) -> Tensor:
    """P = g^T u, (sum of rows, r), span after span, from what the forward kept: x, or u of each A."""
    if len(a) == 1 and in_order(spans, g.shape[1]):
        p = [g.t() @ kept[0]]
    else:
        p = [take(g.t(), span) @ kept[k % len(kept)] for k, span in enumerate(spans)]
    if keep_x:
        p = [part @ a[k % len(a)].to(g.dtype).t() for k, part in enumerate(p)]
    return p[0] if len(p) == 1 else torch.cat(p)


def vector_gradients(p: Tensor, b: Tensor, d: Tensor, spans: Spans, bm: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of b and d from P = g^T u, (sum of rows, r), span after span: rowsum(P*d*B) and colsum(b*B*P)."""
    if torch.promote_types(p.dtype, b.dtype) != b.dtype:
        p = p.to(b.dtype)  # otherwise the product with B is of that type, whatever P is stored in
    if len(bm) == 1:
        roles, rank = d.shape
        if roles == 1:
            product = p * in_type(bm[0], b.dtype)
            return product @ d[0], (b @ product)[None]
        product = p.view(roles, -1, rank) * in_type(bm[0], b.dtype)
        return (product @ d[:, :, None]).flatten(), (b.view(roles, 1, -1) @ product).squeeze(1)
    sizes = [span.rows for span in spans]
    products = [part * in_type(m, b.dtype) for part, m in zip(p.split(sizes), bm, strict=True)]
    grad_b = torch.cat([product @ d[k] for k, product in enumerate(products)])
    grad_d = torch.stack([part @ product for part, product in zip(b.split(sizes), products, strict=True)])
    return grad_b, grad_d


def folded(
    weight: Tensor,
    b: Tensor,
    d: Tensor,
    spans: Spans,
    a: Sequence[Tensor],
    bm: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W + dW in `dtype`, by default that of W, (out, in).

    In a coarser `dtype` than that of W the product L A runs in it, at the speed of such products; it is added to W as W
    is stored, and the sum is rounded. So dW is as exact, relative to itself, as the factored form has it.
    """
    dtype = dtype or weight.dtype
    coarse = dtype != weight.dtype
    wide = torch.promote_types(weight.dtype, torch.float32)
    left = lefts(in_type(b, wide), in_type(d, wide), spans, bm, dtype)
    a = [in_type(m, dtype) for m in a]
    if len(a) == 1 and b.numel() == weight.shape[0]:
        left = place(left, spans, weight.shape[0])
        return (left @ a[0]).add_(weight) if coarse else torch.addmm(weight, left, a[0])
    whole = weight.new_zeros(weight.shape, dtype=dtype) if coarse else weight.clone()
    for k, (span, part) in enumerate(zip(spans, left.split([s.rows for s in spans]), strict=True)):
        add_(whole, span, part @ a[k % len(a)])
    return whole.add_(weight) if coarse else whole


def fold_form(
    weight: Tensor, form: Form, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor]
) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if form != "stack_transposed":
        matrix = folded(to_matrix(wide, form), b, d, spans, a, bm)
        return from_matrix(matrix, form, weight.shape).to(weight.dtype)
    # As a matrix it would be a copy, and the sum would come out with other strides than the model expects.
    change = folded(torch.zeros_like(to_matrix(wide, form)), b, d, spans, a, bm)
    return (wide + from_matrix(change, form, weight.shape)).to(weight.dtype)


def left_matrix(
    b: Tensor, d: Tensor, spans: Spans, n_a: int, bm: Sequence[Tensor], out: int, dtype: torch.dtype | None = None
) -> Tensor:
    """L in the order of the matrix, (out, n_a r): the factored form is x W^T + u L^T.

    Computed in float32 at least. Given a `dtype`, it is rounded to that as it is written, and not differentiable.
    """
    wide = torch.promote_types(torch.promote_types(b.dtype, torch.float32), bm[0].dtype)
    left = lefts(in_type(b, wide), in_type(d, wide), spans, bm, dtype)
    if n_a == 1:
        return place(left, spans, out)
    # Each role has its own A, so its own columns.
    parts = left.split([span.rows for span in spans])
    return torch.cat([place(part, (span,), out) for span, part in zip(spans, parts, strict=True)], dim=1)


def lefts(b: Tensor, d: Tensor, spans: Spans, bm: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """diag(b) B diag(d) of each role, (sum of rows, r), span after span, computed in the type of b.

    Given a `dtype`, it is rounded to that as it is written, and not differentiable.
    """
    if len(bm) == 1:
        # As B^T lies in the bank, row after row: the other way round the roles would be copied together.
        rows, roles = bm[0].t(), len(d)
        part = rows * b if roles == 1 else rows[:, None, :] * b.view(roles, -1)
        d = d.t() if roles == 1 else d.t()[:, :, None]
        left = part * d if dtype in (None, part.dtype) else torch.mul(part, d, out=torch.empty_like(part, dtype=dtype))
        return left.t() if roles == 1 else left.flatten(1).t()
    parts = b.split([span.rows for span in spans])
    left = torch.cat([(part[:, None] * m) * d[k] for k, (part, m) in enumerate(zip(parts, bm, strict=True))])
    return left if dtype is None else left.to(dtype)


def folds_weight(tokens: int, weight: Tensor) -> bool:
    return weight.dtype in WIDE and folds(tokens, *weight.shape)


def keeps_x(width: int, n_a: int, b: Tensor, d: Tensor) -> bool:
    return keeps_input(b.numel(), width, d.shape[1], n_a)


def in_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a type: itself if it is, without the time that `to` takes to find out."""
    return t if t.dtype == dtype else t.to(dtype)


def exact(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, products run in the types they are given: the sum W + dW must not be rounded by autocast."""
    if autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor. Of the meta device it cannot be asked."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
