"""The forms of the adapted projection as plain functions of tensors; `linear.py` says what they mean and makes them
differentiable.

Shapes: x (..., in), flat (N, in), g and y (N, out), W (out, in), bias (out,), u = x A^T (N, r) of each A,
L = diag(b) B diag(d) (out, r), P = g^T u (rows of all roles, r); those of an update are in `update.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..weights.matrix import Form, add_, from_matrix, in_order, place, take, to_matrix
from . import formula
from .cost import folds, joins, keeps_input
from .formula import in_type
from .update import Update

WIDE = (torch.float32, torch.float64)
"""Types that hold W + dW: a young update is far below half a unit in the last place of bfloat16 or float16."""


def output(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: Update, u: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """y, and what was formed for it that a backward can use again, in the type of x: W + dW, or L, or neither."""
    bias = None if bias is None else in_type(bias, x.dtype)
    rows = weight.shape[0]
    if folds_weight(x.numel() // x.shape[-1], weight):
        whole = folded(weight, update, x.dtype)
        return linear(x, whole, bias), whole
    flat = x.reshape(-1, x.shape[-1])
    if u is None:
        u = [flat @ in_type(m, x.dtype).t() for m in update.A]
    joined = x.dtype not in WIDE and joins(len(flat), *weight.shape)
    left = left_matrix(update, rows, x.dtype) if joined or not _narrow(flat, update, rows) else None
    if x.dtype in WIDE:
        # Of x as it came: torch sums in another order for other strides, and with b = 0 this must be the base's y.
        y = linear(x, in_type(weight, x.dtype), bias).reshape(-1, rows)
        y = _branch(u, left, update, y)
    elif joined:
        assert left is not None
        y = linear(torch.cat([flat, *u], dim=1), torch.cat([in_type(weight, x.dtype), left], dim=1), bias)
    else:
        y = torch.addmm(_branch(u, left, update, flat.new_zeros(1, rows)), flat, in_type(weight, x.dtype).t())
        y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], rows), left


def _branch(u: Sequence[Tensor], left: Tensor | None, update: Update, y: Tensor) -> Tensor:
    """y + u L^T in the type of u, for u (N, r) of each A and y (N, out) or (1, out). Without L, tokens are scaled."""
    first = u[0]
    if left is None:
        return formula.expand(first, update, y)
    return torch.addmm(y, first if len(u) == 1 else torch.cat(list(u), dim=1), left.t())


def added(y: Tensor, u: Sequence[Tensor], update: Update) -> tuple[Tensor, Tensor | None]:
    """y + u L^T in the type of y, for u (N, r) of each A; and L, if it was formed."""
    flat, dtype = y.reshape(-1, y.shape[-1]), u[0].dtype
    rows = flat.shape[1]
    left = None if _narrow(u[0], update, rows) else left_matrix(update, rows, dtype)
    if y.dtype == dtype:
        return _branch(u, left, update, flat).view(y.shape), left
    return (flat + _branch(u, left, update, u[0].new_zeros(1, rows))).to(y.dtype).view(y.shape), left


def _narrow(x: Tensor, update: Update, out: int) -> bool:
    """Whether tokens are so few that scaling them, N (r + out), is less than forming L, r out: at least below r."""
    return len(x) < update.d.shape[1] and len(update.A) == len(update.B) == 1 and in_order(update.spans, out)


def reuses(x: Tensor, weight: Tensor) -> bool:
    """Whether the backward is given what the forward formed: a rounded W + dW, as the frozen layer keeps a rounded W;
    and L where it is smaller than the output."""
    tokens = x.numel() // x.shape[-1]
    return x.dtype != weight.dtype if folds_weight(tokens, weight) else tokens >= weight.shape[0]


def input_gradient(g: Tensor, weight: Tensor, update: Update, formed: Tensor | None) -> Tensor:
    """(N, out) -> (N, in). What the forward formed, W + dW or L, is formed again if it is None."""
    if folds_weight(g.shape[0], weight):
        return g @ (folded(weight, update, g.dtype) if formed is None else formed)
    return torch.addmm(branch_gradient(g, update, formed), g, in_type(weight, g.dtype))


def branch_gradient(g: Tensor, update: Update, left: Tensor | None) -> Tensor:
    """(g L) A in the type of g, (N, out) -> (N, in)."""
    a = update.A
    if left is None and _narrow(g, update, g.shape[1]):
        h = formula.reduce(g, update)
    else:
        left = left_matrix(update, g.shape[1], g.dtype) if left is None else left
        h = g @ left
    return h @ in_type(a[0] if len(a) == 1 else torch.cat(a), g.dtype)


def products(g: Tensor, kept: Sequence[Tensor], update: Update, keep_x: bool) -> Tensor:
    """P = g^T u, (sum of rows, r), span after span, from what the forward kept: x, or u of each A."""
    a, spans = update.A, update.spans
    if len(a) == 1 and in_order(spans, g.shape[1]):
        p = [g.t() @ kept[0]]
    else:
        p = [take(g.t(), span) @ kept[k % len(kept)] for k, span in enumerate(spans)]
    if keep_x:
        p = [part @ a[k % len(a)].to(g.dtype).t() for k, part in enumerate(p)]
    return p[0] if len(p) == 1 else torch.cat(p)


def folded(weight: Tensor, update: Update, dtype: torch.dtype | None = None) -> Tensor:
    """W + dW in `dtype`, by default that of W, (out, in).

    In a coarser `dtype` than that of W the product L A runs in it, at the speed of such products; it is added to W as W
    is stored, and the sum is rounded. So dW is as exact, relative to itself, as the factored form has it.
    """
    dtype = dtype or weight.dtype
    coarse = dtype != weight.dtype
    left = formula.lefts(update, torch.promote_types(weight.dtype, torch.float32), dtype)
    a, spans = [in_type(m, dtype) for m in update.A], update.spans
    if len(a) == 1 and update.b.numel() == weight.shape[0]:
        left = place(left, spans, weight.shape[0])
        return (left @ a[0]).add_(weight) if coarse else torch.addmm(weight, left, a[0])
    whole = weight.new_zeros(weight.shape, dtype=dtype) if coarse else weight.clone()
    for k, (span, part) in enumerate(zip(spans, left.split([s.rows for s in spans]), strict=True)):
        add_(whole, span, part @ a[k % len(a)])
    return whole.add_(weight) if coarse else whole


def fold_form(weight: Tensor, form: Form, update: Update) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if form != "stack_transposed":
        return from_matrix(folded(to_matrix(wide, form), update), form, weight.shape).to(weight.dtype)
    # As a matrix it would be a copy, and the sum would come out with other strides than the model expects.
    change = folded(torch.zeros_like(to_matrix(wide, form)), update)
    return (wide + from_matrix(change, form, weight.shape)).to(weight.dtype)


def left_matrix(update: Update, out: int, dtype: torch.dtype | None = None) -> Tensor:
    """L in the order of the matrix, (out, r), or (out, roles r) if each role has its own A: the factored form is
    x W^T + u L^T.

    Computed in float32 at least. Given a `dtype`, it is rounded to that as it is written, and not differentiable.
    """
    spans = update.spans
    wide = torch.promote_types(torch.promote_types(update.b.dtype, torch.float32), update.B[0].dtype)
    left = formula.lefts(update, wide, dtype)
    if len(update.A) == 1:
        return place(left, spans, out)
    # Each role has its own A, so its own columns.
    parts = left.split([span.rows for span in spans])
    return torch.cat([place(part, (span,), out) for span, part in zip(spans, parts, strict=True)], dim=1)


def folds_weight(tokens: int, weight: Tensor) -> bool:
    return weight.dtype in WIDE and folds(tokens, *weight.shape)


def keeps_x(width: int, update: Update) -> bool:
    return keeps_input(update.b.numel(), width, update.d.shape[1], len(update.A))


def exact(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, products run in the types they are given: the sum W + dW must not be rounded by autocast."""
    if autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor. Of the meta device it cannot be asked."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
