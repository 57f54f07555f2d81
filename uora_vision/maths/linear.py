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

Shapes: x (..., in), flat (N, in), g and y (..., out), W (out, in), bias (out,), u (N, r) of each A, drawn (runs,) rows
of flat; those of an update are in `update.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..private import no_view
from ..weights.matrix import Form, in_order, take, to_matrix
from . import formula
from .forms import (
    added,
    autocasts,
    branch_gradient,
    exact,
    fold_form,
    input_gradient,
    keeps_x,
    left_matrix,
    output,
    products,
    reuses,
)
from .formula import in_type
from .shared_product import Reduced
from .token_sampling import depending, draw, weighted_rows
from .update import Update


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, update: Update, reduced: Reduced | None = None, sampling: int = 1
) -> Tensor:
    """The adapted projection, (..., in) -> (..., out).

    Args:
        x: (..., in).
        weight: frozen W, (out, in).
        bias: (out,) or None.
        update: of the weight.
        reduced: shared by projections that may have their input in common.
        sampling: the gradients of b and d come from one token drawn out of every `sampling`; from all while W trains.
    """
    source = x
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    drawn = draw(x, sampling if not weight.requires_grad else 1)
    with exact(x):
        if not torch.is_grad_enabled():
            return output(x, weight, bias, update)[0]
        keep_x = weight.requires_grad or keeps_x(x.shape[-1], update)
        u = None if keep_x or reduced is None or sampling > 1 else reduced(source, x, update.A)
        return _Project.apply(x, weight, bias, sampling, u, drawn, *update.pack())


def add_update(x: Tensor, y: Tensor, update: Update, reduced: Reduced | None = None, sampling: int = 1) -> Tensor:
    """y plus the low-rank branch of x, where the frozen layer has computed y itself (quantised weights): (..., out).

    The layer has rounded y to its type already, and the sum is rounded to it again. Over a y in bfloat16, updates far
    below half a unit in its last place are mostly lost in the outputs (of those of 2^-9 of y's standard deviation about
    a fifth, of 2^-11 about 70%); gradients are not rounded so, and b and d grow in float32 all the same. A layer that
    computes in float32 loses nothing.

    Args:
        x: (..., in).
        y: (..., out), the frozen layer's output for x.
        update, reduced, sampling: as of `project`.
    """
    source = x
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    drawn = draw(x, sampling)
    with exact(x):
        if not torch.is_grad_enabled():
            flat = x.reshape(-1, x.shape[-1])
            return added(y, [flat @ in_type(m, x.dtype).t() for m in update.A], update)[0]
        u = None if reduced is None or keeps_x(x.shape[-1], update) else reduced(source, x, update.A)
        return _AddUpdate.apply(x, y, sampling, u, drawn, *update.pack())


def fold(weight: Tensor, form: Form, update: Update) -> Tensor:
    """W + dW in the shape and type of W, differentiable in W, b and d.

    For weights that are read rather than called. Formed in float32 or wider; a W stored in bfloat16 or float16 rounds
    the sum.
    """
    with exact(weight):
        if not torch.is_grad_enabled():
            return fold_form(weight, form, update)
        return _Fold.apply(weight, form, *update.pack())


def delta(x: Tensor, update: Update, out: int) -> Tensor:
    """The low-rank branch alone, by plain differentiable operations: (..., in) -> (..., out).

    For the cases in which the branch sees another input than the frozen weight does (dropout).
    """
    u = torch.cat([linear(x, m.to(x.dtype)) for m in update.A], dim=-1)
    return linear(u, left_matrix(update, out).to(x.dtype))


def delta_weight(update: Update, dtype: torch.dtype) -> list[Tensor]:
    """dW of each role, (rows, in), computed in `dtype`."""
    update = update.to(dtype)
    parts = formula.lefts(update, dtype).split([span.rows for span in update.spans])
    with exact(update.b):
        return [part @ update.A[k % len(update.A)] for k, part in enumerate(parts)]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sampling: int, *rest: Any) -> Tensor:
        u, drawn, spec, *tensors = rest
        update = Update.unpack(spec, *tensors)
        flat = x.reshape(-1, x.shape[-1])
        if drawn is not None:
            flat = weighted_rows(flat, drawn, sampling)
        keep_x = ctx.needs_input_grad[1] or keeps_x(x.shape[-1], update)
        if drawn is not None or update.A[0].dtype != x.dtype:
            a = tuple(in_type(m, x.dtype) for m in update.A)
            update = Update(update.b, depending(update.d, drawn), update.spans, a, update.B)
        kept = (flat,) if keep_x else (u,) if u is not None else tuple([flat @ m.t() for m in update.A])
        u_of_all = None if keep_x or drawn is not None else kept
        y, formed = output(x, weight, bias, update, u_of_all)
        if not ctx.needs_input_grad[0] or not reuses(x, weight):
            formed = None
        ctx.save_for_backward(weight, formed, drawn, *tensors, *kept)
        ctx.spec, ctx.n, ctx.keep_x = spec, len(tensors), keep_x
        return no_view(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        weight, formed, drawn, *rest = ctx.saved_tensors
        update, kept = Update.unpack(ctx.spec, *rest[: ctx.n]), rest[ctx.n :]
        needs = ctx.needs_input_grad
        grad_x = grad_w = grad_bias = grad_b = grad_d = None
        flat = g.reshape(-1, g.shape[-1])
        with exact(g):
            if needs[0]:
                grad_x = input_gradient(flat, weight, update, formed).view(*g.shape[:-1], weight.shape[1])
            if needs[1]:
                grad_w = (flat.t() @ kept[0]).to(weight.dtype)
            if needs[2]:
                grad_bias = flat.sum(0)
            if needs[7] or needs[8]:
                p = products(flat if drawn is None else flat[drawn], kept, update, ctx.keep_x)
                grad_b, grad_d = formula.vector_gradients(p, update)
        return grad_x, grad_w, grad_bias, None, None, None, *update.gradients(grad_b, grad_d)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, sampling: int, *rest: Any) -> Tensor:
        u, drawn, spec, *tensors = rest
        update = Update.unpack(spec, *tensors)
        flat = x.reshape(-1, x.shape[-1])
        each = (u,) if u is not None else tuple(flat @ in_type(m, x.dtype).t() for m in update.A)
        ctx.keep_x, kept = keeps_x(x.shape[-1], update), each
        if drawn is not None:
            flat = weighted_rows(flat, drawn, sampling)
            kept = tuple(flat @ in_type(m, x.dtype).t() for m in update.A)
        kept = (flat,) if ctx.keep_x else kept
        cast = Update(update.b, depending(update.d, drawn), update.spans, update.A, update.B)
        y, left = added(y, each, cast)
        if not ctx.needs_input_grad[0] or len(each[0]) < y.shape[-1]:
            left = None
        ctx.save_for_backward(left, drawn, *tensors, *kept)
        ctx.spec, ctx.n = spec, len(tensors)
        return no_view(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        left, drawn, *rest = ctx.saved_tensors
        update, kept = Update.unpack(ctx.spec, *rest[: ctx.n]), rest[ctx.n :]
        grad_x = grad_b = grad_d = None
        flat = g.reshape(-1, g.shape[-1]).to(kept[0].dtype)
        with exact(g):
            if ctx.needs_input_grad[0]:
                grad_x = branch_gradient(flat, update, left).view(*g.shape[:-1], update.A[0].shape[1])
            if any(ctx.needs_input_grad[6:8]):
                p = products(flat if drawn is None else flat[drawn], kept, update, ctx.keep_x)
                grad_b, grad_d = formula.vector_gradients(p, update)
        grad_y = g if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, None, None, None, *update.gradients(grad_b, grad_d)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, form: Form, *packed: Any) -> Tensor:
        ctx.spec, *tensors = packed
        ctx.save_for_backward(*tensors)
        ctx.form = form
        return fold_form(weight, form, Update.unpack(*packed))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        update = Update.unpack(ctx.spec, *ctx.saved_tensors)
        with exact(g):
            wide = to_matrix(g, ctx.form).to(torch.promote_types(g.dtype, torch.float32))
            a = [m.to(wide.dtype).t() for m in update.A]
            if len(a) == 1 and in_order(update.spans, wide.shape[0]):
                p = wide @ a[0]
            else:
                p = torch.cat([take(wide, span) @ a[k % len(a)] for k, span in enumerate(update.spans)])
            grad_b, grad_d = formula.vector_gradients(p, update)
        return g if ctx.needs_input_grad[0] else None, None, *update.gradients(grad_b, grad_d)
