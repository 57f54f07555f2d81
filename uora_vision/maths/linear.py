"""The adapted projection as one differentiable operation.

For a frozen W (out x in), shared frozen A (r x in) and B (rows x r), and trained vectors b (rows) and d (r):

    y = x W^T + bias + ((x A^T * d) B^T) * b

A packed weight is several projections ("roles"), each with its own d and its own span of output rows; b holds the
spans one after the other. Rows outside all spans keep the frozen weight alone. Written as one matrix, the update is
L A with L = diag(b) B diag(d), (out x r).

Two forms compute the same y, and the operation counts choose between them (UORA, ACL 2025; our derivation):

- *folded*, for many tokens: W + L A is formed once, at a cost that does not depend on the number of tokens, and y is
  one product. It is formed again for the input gradient rather than kept, unless autocast rounds W: then the frozen
  layer keeps a rounded W for its backward, and this one the rounded W + L A in its place.
- *factored*, for few tokens, or when W is stored in a type too coarse to hold the sum (bfloat16, float16). Where y is
  of such a type, the update is added before y is rounded: it goes into the accumulator of the frozen product, or, for
  many tokens, both are one product [x, u] [W, L]^T. A quantised W has its own product, and the update is added to what
  comes out of it.

The gradients of b and d need only P = g^T (x A^T), (rows x r), so the forward keeps u = x A^T, N x r, and never
anything of size N x out. When r is so large that P costs less as (g^T x) A^T, x is kept in place of u. With token
sampling, P is estimated without bias from the rows of one token drawn out of every few, and only u of those is kept.

Every function takes `b` (sum of rows,), `d` (roles, r), `spans`, and `a` and `bm`: A of each role (r, in) and B of each
role (rows, r), or one entry that all roles share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..weights.matrix import Form, Spans, in_order, take, to_matrix
from .forms import (
    added,
    autocasts,
    branch_gradient,
    exact,
    fold_form,
    in_type,
    input_gradient,
    keeps_made,
    keeps_x,
    left_matrix,
    lefts,
    output,
    products,
    vector_gradients,
)
from .shared_product import Reduced
from .token_sampling import draw, needing, stand_ins


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b: Tensor,
    d: Tensor,
    spans: Spans,
    a: Sequence[Tensor],
    bm: Sequence[Tensor],
    reduced: Reduced | None = None,
    sampling: int = 1,
) -> Tensor:
    """The adapted projection, (..., in) -> (..., out).

    Args:
        x: (..., in).
        weight: frozen W, (out, in).
        bias: (out,) or None.
        reduced: shared by projections that may have their input in common.
        sampling: the gradients of b and d come from one token drawn out of every `sampling`; from all while W trains.
    """
    source = x
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    drawn = draw(x, sampling if not weight.requires_grad else 1)
    with exact(x):
        if not torch.is_grad_enabled():
            return output(x, weight, bias, b, d, spans, a, bm)[0]
        keep_x = weight.requires_grad or keeps_x(x.shape[-1], len(a), b, d)
        u = None if keep_x or reduced is None or sampling > 1 else reduced(source, x, a)
        return _Project.apply(x, weight, bias, b, d, u, drawn, sampling, spans, len(a), *a, *bm)


def add_update(
    x: Tensor,
    y: Tensor,
    b: Tensor,
    d: Tensor,
    spans: Spans,
    a: Sequence[Tensor],
    bm: Sequence[Tensor],
    reduced: Reduced | None = None,
    sampling: int = 1,
) -> Tensor:
    """y plus the low-rank branch of x, where the frozen layer has computed y itself (quantised weights): (..., out).

    The layer has rounded y to its type already, and the sum is rounded to it again. Over a y in bfloat16, updates far
    below half a unit in its last place are mostly lost in the outputs (of those of 2^-9 of y's standard deviation about
    a fifth, of 2^-11 about 70%); gradients are not rounded so, and b and d grow in float32 all the same. A layer that
    computes in float32 loses nothing.

    Args:
        x: (..., in).
        y: (..., out), the frozen layer's output for x.
        reduced, sampling: as of `project`.
    """
    source = x
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    drawn = draw(x, sampling)
    with exact(x):
        if not torch.is_grad_enabled():
            flat = x.reshape(-1, x.shape[-1])
            return added(y, [flat @ in_type(m, x.dtype).t() for m in a], b, d, spans, bm)[0]
        u = None if reduced is None or keeps_x(x.shape[-1], len(a), b, d) else reduced(source, x, a)
        return _AddUpdate.apply(x, y, b, d, u, drawn, sampling, spans, len(a), *a, *bm)


def fold(
    weight: Tensor, form: Form, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor]
) -> Tensor:
    """W + dW in the shape and type of W, differentiable in W, b and d.

    For weights that are read rather than called. Formed in float32 or wider; a W stored in bfloat16 or float16 rounds
    the sum.
    """
    with exact(weight):
        if not torch.is_grad_enabled():
            return fold_form(weight, form, b, d, spans, a, bm)
        return _Fold.apply(weight, form, b, d, spans, len(a), *a, *bm)


def delta(x: Tensor, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor], out: int) -> Tensor:
    """The low-rank branch alone, by plain differentiable operations: (..., in) -> (..., out).

    For the cases in which the branch sees another input than the frozen weight does (dropout).
    """
    u = torch.cat([linear(x, m.to(x.dtype)) for m in a], dim=-1)
    return linear(u, left_matrix(b, d, spans, len(a), bm, out).to(x.dtype))


def delta_weight(
    b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """dW of each role, (rows, in), computed in `dtype`."""
    left = lefts(b.to(dtype), d.to(dtype), spans, [m.to(dtype) for m in bm])
    parts = left.split([span.rows for span in spans])
    return [part @ a[k % len(a)].to(dtype) for k, part in enumerate(parts)]


def _its_own(y: Tensor) -> Tensor:
    """An output that is no view: what a Function gives as a view must not be changed in place, and models do that."""
    return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        b: Tensor,
        d: Tensor,
        u: Tensor | None,
        drawn: Tensor | None,
        sampling: int,
        spans: Spans,
        n_a: int,
        *banks: Tensor,
    ) -> Tensor:
        a, bm = banks[:n_a], banks[n_a:]
        flat = x.reshape(-1, x.shape[-1])
        if drawn is not None:
            flat = stand_ins(flat, drawn, sampling)
        keep_x = ctx.needs_input_grad[1] or keeps_x(x.shape[-1], n_a, b, d)
        a = tuple(in_type(m, x.dtype) for m in a)
        kept = (flat,) if keep_x else (u,) if u is not None else tuple(flat @ m.t() for m in a)
        u_of_all = None if keep_x or drawn is not None else kept
        y, made = output(x, weight, bias, b, needing(d, drawn), spans, a, bm, u_of_all)
        if not ctx.needs_input_grad[0] or not keeps_made(x, weight):
            made = None
        ctx.save_for_backward(weight, made, b, d, drawn, *banks, *kept)
        ctx.spans, ctx.n_a, ctx.n_banks, ctx.keep_x = spans, n_a, len(banks), keep_x
        return _its_own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        n_a, spans = ctx.n_a, ctx.spans
        weight, made, b, d, drawn, *rest = ctx.saved_tensors
        a, bm, kept = rest[:n_a], rest[n_a : ctx.n_banks], rest[ctx.n_banks :]
        need_x, need_w, need_bias, need_b, need_d = ctx.needs_input_grad[:5]
        grad_x = grad_w = grad_bias = grad_b = grad_d = None
        flat = g.reshape(-1, g.shape[-1])
        with exact(g):
            if need_x:
                grad_x = input_gradient(flat, weight, b, d, spans, a, bm, made)
                grad_x = grad_x.view(*g.shape[:-1], weight.shape[1])
            if need_w:
                grad_w = (flat.t() @ kept[0]).to(weight.dtype)
            if need_bias:
                grad_bias = flat.sum(0)
            if need_b or need_d:
                p = products(flat if drawn is None else flat[drawn], kept, spans, a, ctx.keep_x)
                grad_b, grad_d = vector_gradients(p, b, d, spans, bm)
        return grad_x, grad_w, grad_bias, grad_b, grad_d, *[None] * (5 + ctx.n_banks)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        b: Tensor,
        d: Tensor,
        u: Tensor | None,
        drawn: Tensor | None,
        sampling: int,
        spans: Spans,
        n_a: int,
        *banks: Tensor,
    ) -> Tensor:
        a, bm = banks[:n_a], banks[n_a:]
        flat = x.reshape(-1, x.shape[-1])
        each = (u,) if u is not None else tuple(flat @ in_type(m, x.dtype).t() for m in a)
        ctx.keep_x, kept = keeps_x(x.shape[-1], n_a, b, d), each
        if drawn is not None:
            flat = stand_ins(flat, drawn, sampling)
            kept = tuple(flat @ in_type(m, x.dtype).t() for m in a)
        kept = (flat,) if ctx.keep_x else kept
        y, left = added(y, each, b, needing(d, drawn), spans, bm)
        if not ctx.needs_input_grad[0] or len(each[0]) < y.shape[-1]:
            left = None
        ctx.save_for_backward(left, b, d, drawn, *banks, *kept)
        ctx.spans, ctx.n_a, ctx.n_banks = spans, n_a, len(banks)
        return _its_own(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        left, b, d, drawn, *rest = ctx.saved_tensors
        a, bm, kept = rest[: ctx.n_a], rest[ctx.n_a : ctx.n_banks], rest[ctx.n_banks :]
        grad_x = grad_b = grad_d = None
        flat = g.reshape(-1, g.shape[-1]).to(kept[0].dtype)
        with exact(g):
            if ctx.needs_input_grad[0]:
                grad_x = branch_gradient(flat, b, d, ctx.spans, a, bm, left)
                grad_x = grad_x.view(*g.shape[:-1], a[0].shape[1])
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                p = products(flat if drawn is None else flat[drawn], kept, ctx.spans, a, ctx.keep_x)
                grad_b, grad_d = vector_gradients(p, b, d, ctx.spans, bm)
        return grad_x, g if ctx.needs_input_grad[1] else None, grad_b, grad_d, *[None] * (5 + ctx.n_banks)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, form: Form, b: Tensor, d: Tensor, spans: Spans, n_a: int, *banks: Tensor
    ) -> Tensor:
        ctx.save_for_backward(b, d, *banks)
        ctx.form, ctx.spans, ctx.n_a = form, spans, n_a
        return fold_form(weight, form, b, d, spans, banks[:n_a], banks[n_a:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        b, d, *banks = ctx.saved_tensors
        a, bm = banks[: ctx.n_a], banks[ctx.n_a :]
        with exact(g):
            wide = to_matrix(g, ctx.form).to(torch.promote_types(g.dtype, torch.float32))
            a = [m.to(wide.dtype).t() for m in a]
            if len(a) == 1 and in_order(ctx.spans, wide.shape[0]):
                p = wide @ a[0]
            else:
                p = torch.cat([take(wide, span) @ a[k % len(a)] for k, span in enumerate(ctx.spans)])
            grad_b, grad_d = vector_gradients(p, b, d, ctx.spans, bm)
        return g if ctx.needs_input_grad[0] else None, None, grad_b, grad_d, *[None] * (2 + len(banks))
