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
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .cost import folds, joins, keeps_input
from .reduced import Reduced
from .views import Form, Spans, add_, from_matrix, in_order, place, take, to_matrix

WIDE = (torch.float32, torch.float64)
"""Types that hold W + dW: a young update is far below half a unit in the last place of bfloat16 or float16."""


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
    drawn = _draw(x, sampling if not weight.requires_grad else 1)
    with exact(x):
        if not torch.is_grad_enabled():
            return _forward(x, weight, bias, b, d, spans, a, bm)[0]
        keep_x = weight.requires_grad or _large(x.shape[-1], len(a), b, d)
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
    drawn = _draw(x, sampling)
    with exact(x):
        if not torch.is_grad_enabled():
            flat = x.reshape(-1, x.shape[-1])
            return _added(y, [flat @ _in(m, x.dtype).t() for m in a], b, d, spans, bm)[0]
        u = None if reduced is None or _large(x.shape[-1], len(a), b, d) else reduced(source, x, a)
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
            return _fold(weight, form, b, d, spans, a, bm)
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
    left = _lefts(b.to(dtype), d.to(dtype), spans, [m.to(dtype) for m in bm])
    parts = left.split([span.rows for span in spans])
    return [part @ a[k % len(a)].to(dtype) for k, part in enumerate(parts)]


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
            flat = _stand_ins(flat, drawn, sampling)
        keep_x = ctx.needs_input_grad[1] or _large(x.shape[-1], n_a, b, d)
        a = tuple(_in(m, x.dtype) for m in a)
        kept = (flat,) if keep_x else (u,) if u is not None else tuple(flat @ m.t() for m in a)
        u_of_all = None if keep_x or drawn is not None else kept
        y, made = _forward(x, weight, bias, b, _needing(d, drawn), spans, a, bm, u_of_all)
        if not ctx.needs_input_grad[0] or not _keeps_made(x, weight):
            made = None
        ctx.save_for_backward(weight, made, b, d, drawn, *banks, *kept)
        ctx.spans, ctx.n_a, ctx.n_banks, ctx.keep_x = spans, n_a, len(banks), keep_x
        return y

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
                grad_x = _input_gradient(flat, weight, b, d, spans, a, bm, made)
                grad_x = grad_x.view(*g.shape[:-1], weight.shape[1])
            if need_w:
                grad_w = (flat.t() @ kept[0]).to(weight.dtype)
            if need_bias:
                grad_bias = flat.sum(0)
            if need_b or need_d:
                p = _products(flat if drawn is None else flat[drawn], kept, spans, a, ctx.keep_x)
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
        each = (u,) if u is not None else tuple(flat @ _in(m, x.dtype).t() for m in a)
        ctx.keep_x, kept = _large(x.shape[-1], n_a, b, d), each
        if drawn is not None:
            flat = _stand_ins(flat, drawn, sampling)
            kept = tuple(flat @ _in(m, x.dtype).t() for m in a)
        kept = (flat,) if ctx.keep_x else kept
        y, left = _added(y, each, b, _needing(d, drawn), spans, bm)
        if not ctx.needs_input_grad[0] or len(each[0]) < y.shape[-1]:
            left = None
        ctx.save_for_backward(left, b, d, drawn, *banks, *kept)
        ctx.spans, ctx.n_a, ctx.n_banks = spans, n_a, len(banks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        left, b, d, drawn, *rest = ctx.saved_tensors
        a, bm, kept = rest[: ctx.n_a], rest[ctx.n_a : ctx.n_banks], rest[ctx.n_banks :]
        grad_x = grad_b = grad_d = None
        flat = g.reshape(-1, g.shape[-1]).to(kept[0].dtype)
        with exact(g):
            if ctx.needs_input_grad[0]:
                grad_x = _branch_gradient(flat, b, d, ctx.spans, a, bm, left)
                grad_x = grad_x.view(*g.shape[:-1], a[0].shape[1])
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                p = _products(flat if drawn is None else flat[drawn], kept, ctx.spans, a, ctx.keep_x)
                grad_b, grad_d = vector_gradients(p, b, d, ctx.spans, bm)
        return grad_x, g if ctx.needs_input_grad[1] else None, grad_b, grad_d, *[None] * (5 + ctx.n_banks)


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, form: Form, b: Tensor, d: Tensor, spans: Spans, n_a: int, *banks: Tensor
    ) -> Tensor:
        ctx.save_for_backward(b, d, *banks)
        ctx.form, ctx.spans, ctx.n_a = form, spans, n_a
        return _fold(weight, form, b, d, spans, banks[:n_a], banks[n_a:])

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
    left = _lefts(_in(b, wide), _in(d, wide), spans, bm, dtype)
    a = [_in(m, dtype) for m in a]
    if len(a) == 1 and b.numel() == weight.shape[0]:
        left = place(left, spans, weight.shape[0])
        return (left @ a[0]).add_(weight) if coarse else torch.addmm(weight, left, a[0])
    whole = weight.new_zeros(weight.shape, dtype=dtype) if coarse else weight.clone()
    for k, (span, part) in enumerate(zip(spans, left.split([s.rows for s in spans]), strict=True)):
        add_(whole, span, part @ a[k % len(a)])
    return whole.add_(weight) if coarse else whole


def left_matrix(
    b: Tensor, d: Tensor, spans: Spans, n_a: int, bm: Sequence[Tensor], out: int, dtype: torch.dtype | None = None
) -> Tensor:
    """L in the order of the matrix, (out, n_a r): the factored form is x W^T + u L^T.

    Computed in float32 at least. Given a `dtype`, it is rounded to that as it is written, and not differentiable.
    """
    wide = torch.promote_types(torch.promote_types(b.dtype, torch.float32), bm[0].dtype)
    left = _lefts(_in(b, wide), _in(d, wide), spans, bm, dtype)
    if n_a == 1:
        return place(left, spans, out)
    # Each role has its own A, so its own columns.
    parts = left.split([span.rows for span in spans])
    return torch.cat([place(part, (span,), out) for span, part in zip(spans, parts, strict=True)], dim=1)


def vector_gradients(p: Tensor, b: Tensor, d: Tensor, spans: Spans, bm: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of b and d from P = g^T u, (sum of rows, r), span after span: rowsum(P*d*B) and colsum(b*B*P)."""
    if torch.promote_types(p.dtype, b.dtype) != b.dtype:
        p = p.to(b.dtype)  # otherwise the product with B is of that type, whatever P is stored in
    if len(bm) == 1:
        roles, rank = d.shape
        if roles == 1:
            product = p * _in(bm[0], b.dtype)
            return product @ d[0], (b @ product)[None]
        product = p.view(roles, -1, rank) * _in(bm[0], b.dtype)
        return (product @ d[:, :, None]).flatten(), (b.view(roles, 1, -1) @ product).squeeze(1)
    sizes = [span.rows for span in spans]
    products = [part * _in(m, b.dtype) for part, m in zip(p.split(sizes), bm, strict=True)]
    grad_b = torch.cat([product @ d[k] for k, product in enumerate(products)])
    grad_d = torch.stack([part @ product for part, product in zip(b.split(sizes), products, strict=True)])
    return grad_b, grad_d


def _forward(
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
    bias = None if bias is None else _in(bias, x.dtype)
    rows = weight.shape[0]
    if _folds(x.numel() // x.shape[-1], weight):
        whole = folded(weight, b, d, spans, a, bm, x.dtype)
        return linear(x, whole, bias), whole
    flat = x.reshape(-1, x.shape[-1])
    if u is None:
        u = [flat @ _in(m, x.dtype).t() for m in a]
    joined = x.dtype not in WIDE and joins(len(flat), *weight.shape)
    left = (
        left_matrix(b, d, spans, len(a), bm, rows, x.dtype) if joined or not _narrow(flat, d, spans, bm, rows) else None
    )
    if x.dtype in WIDE:
        # Of x as it came: torch sums in another order for other strides, and with b = 0 this must be the base's y.
        y = linear(x, _in(weight, x.dtype), bias).reshape(-1, rows)
        y = _branch(u, left, b, d, bm, y)
    elif joined:
        assert left is not None
        y = linear(torch.cat([flat, *u], dim=1), torch.cat([_in(weight, x.dtype), left], dim=1), bias)
    else:
        y = torch.addmm(_branch(u, left, b, d, bm, flat.new_zeros(1, rows)), flat, _in(weight, x.dtype).t())
        y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], rows), left


def _branch(u: Sequence[Tensor], left: Tensor | None, b: Tensor, d: Tensor, bm: Sequence[Tensor], y: Tensor) -> Tensor:
    """y + u L^T in the type of u, for u (N, r) of each A and y (N, out) or (1, out). Without L, tokens are scaled."""
    first = u[0]
    if left is None:
        z = (first[:, None] * _in(d, first.dtype)) @ _in(bm[0], first.dtype).t()
        return torch.addcmul(y, z.flatten(1), _in(b, first.dtype))
    return torch.addmm(y, first if len(u) == 1 else torch.cat(list(u), dim=1), left.t())


def _narrow(x: Tensor, d: Tensor, spans: Spans, bm: Sequence[Tensor], out: int) -> bool:
    """Whether tokens are so few that scaling them, N (r + out), is less than forming L, r out: at least below r."""
    return len(x) < d.shape[1] and len(bm) == 1 and in_order(spans, out)


def _keeps_made(x: Tensor, weight: Tensor) -> bool:
    """Whether the backward is given what the forward made: a rounded W + dW, as the frozen layer keeps a rounded W; and
    L where it is smaller than the output."""
    tokens = x.numel() // x.shape[-1]
    return x.dtype != weight.dtype if _folds(tokens, weight) else tokens >= weight.shape[0]


def _input_gradient(
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
    if _folds(g.shape[0], weight):
        return g @ (folded(weight, b, d, spans, a, bm, g.dtype) if made is None else made)
    return torch.addmm(_branch_gradient(g, b, d, spans, a, bm, made), g, _in(weight, g.dtype))


def _branch_gradient(
    g: Tensor, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor], left: Tensor | None
) -> Tensor:
    """(g L) A in the type of g, (N, out) -> (N, in)."""
    if left is None and _narrow(g, d, spans, bm, g.shape[1]):
        h = (g * _in(b, g.dtype)).view(len(g), len(d), -1) @ _in(bm[0], g.dtype)
        h = (h * _in(d, g.dtype)).sum(dim=1)
    else:
        left = left_matrix(b, d, spans, len(a), bm, g.shape[1], g.dtype) if left is None else left
        h = g @ left
    return h @ _in(a[0] if len(a) == 1 else torch.cat(list(a)), g.dtype)


def _fold(
    weight: Tensor, form: Form, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor]
) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if form != "stack_transposed":
        matrix = folded(to_matrix(wide, form), b, d, spans, a, bm)
        return from_matrix(matrix, form, weight.shape).to(weight.dtype)
    # As a matrix it would be a copy, and the sum would come out with other strides than the model expects.
    change = folded(torch.zeros_like(to_matrix(wide, form)), b, d, spans, a, bm)
    return (wide + from_matrix(change, form, weight.shape)).to(weight.dtype)


def _added(
    y: Tensor, u: Sequence[Tensor], b: Tensor, d: Tensor, spans: Spans, bm: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """y + u L^T in the type of y, for u (N, r) of each A; and L, if it was formed."""
    flat, dtype = y.reshape(-1, y.shape[-1]), u[0].dtype
    rows = flat.shape[1]
    left = None if _narrow(u[0], d, spans, bm, rows) else left_matrix(b, d, spans, len(u), bm, rows, dtype)
    if y.dtype == dtype:
        return _branch(u, left, b, d, bm, flat).view(y.shape), left
    return (flat + _branch(u, left, b, d, bm, u[0].new_zeros(1, rows))).to(y.dtype).view(y.shape), left


def _large(width: int, n_a: int, b: Tensor, d: Tensor) -> bool:
    return keeps_input(b.numel(), width, d.shape[1], n_a)


def _draw(x: Tensor, every: int) -> Tensor | None:
    """One row of each `every` of x that follow each other, (runs,); the last run may be shorter. None for every = 1.

    Also where no gradient is asked for: the forward of a checkpoint must leave the generator as its recomputation does.
    """
    if every == 1:
        return None
    rows = x.numel() // x.shape[-1]
    offset, rest = torch.randint(every, (-(-rows // every),), device=x.device), rows % every
    if rest:
        offset[-1:] = torch.randint(rest, (1,), device=x.device)
    return offset.add_(torch.arange(0, rows, every, device=x.device))


def _needing(d: Tensor, drawn: Tensor | None) -> Tensor:
    """d, in a way that a compiler takes to depend on the draw.

    What the output does not depend on, torch.compile computes in the backward, and random numbers then once more: the
    rows of g would be others than those of u.
    """
    if drawn is None or not torch.compiler.is_compiling():
        return d
    return torch.where((drawn < 0).any(), torch.nan, d)


def _stand_ins(x: Tensor, drawn: Tensor, every: int) -> Tensor:
    """The drawn rows of x, (runs, in), times the lengths of their runs: their sums have those of all rows as mean."""
    rows, rest = x[drawn].mul_(every), len(x) % every
    if rest:
        rows[-1:].mul_(rest / every)
    return rows


def _products(g: Tensor, kept: Sequence[Tensor], spans: Spans, a: Sequence[Tensor], keep_x: bool) -> Tensor:
    """P = g^T u, (sum of rows, r), span after span, from what the forward kept: x, or u of each A."""
    if len(a) == 1 and in_order(spans, g.shape[1]):
        p = [g.t() @ kept[0]]
    else:
        p = [take(g.t(), span) @ kept[k % len(kept)] for k, span in enumerate(spans)]
    if keep_x:
        p = [part @ a[k % len(a)].to(g.dtype).t() for k, part in enumerate(p)]
    return p[0] if len(p) == 1 else torch.cat(p)


def _folds(tokens: int, weight: Tensor) -> bool:
    return weight.dtype in WIDE and folds(tokens, *weight.shape)


def _lefts(b: Tensor, d: Tensor, spans: Spans, bm: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
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


def _in(t: Tensor, dtype: torch.dtype) -> Tensor:
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
