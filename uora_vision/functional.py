"""The adapted projection as one differentiable operation.

For a frozen W (out x in), shared frozen A (r x in) and B (rows x r), and trained vectors b (rows) and d (r):

    y = x W^T + bias + ((x A^T * d) B^T) * b

A fused weight is several projections ("roles"), each with its own d and its own span of output rows; b holds the
spans one after the other. Rows outside all spans keep the frozen weight alone.

Two forms compute the same y, and the operation counts choose between them (UORA, ACL 2025; our derivation):

- *folded*, for many tokens: W + (b*B)(d*A) is formed once, at a cost that does not depend on the number of tokens, and
  y is one product. It is formed again for the input gradient rather than kept.
- *factored*, for few tokens, or when W is stored in a type too coarse to hold the sum (bfloat16, float16). Over a
  coarse W it is one product too, [x, u] [W, (b*B)d]^T, and the update is added before y is rounded.

The gradients of b and d need only P = g^T (x A^T), (rows x r), so the forward keeps u = x A^T, N x r, and never
anything of size N x out. When r is so large that P costs less as (g^T x) A^T, x is kept in place of u.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

Spans = tuple[tuple[int, int], ...]
"""(first row, number of rows) of each role in the weight."""

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
) -> Tensor:
    """The adapted projection, (..., in) -> (..., out).

    Args:
        x: (..., in).
        weight: frozen W, (out, in).
        bias: (out,) or None.
        b: (sum of rows,), the spans one after the other.
        d: (roles, r).
        spans: where each role lies among the output rows.
        a: A of each role, (r, in); one entry when all roles share it.
        bm: B of each role, (rows, r).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with _exact(x):
        if not torch.is_grad_enabled():
            return _forward(x, weight, bias, b, d, spans, a, bm)
        return _Project.apply(x, weight, bias, b, d, spans, len(a), *a, *bm)


def fold(weight: Tensor, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor]) -> Tensor:
    """W + dW, (out, in), in the type of W, differentiable in W, b and d.

    For modules whose weight is read rather than called. Formed in float32 or wider; a W stored in bfloat16 or float16
    rounds the sum.
    """
    with _exact(weight):
        return _Fold.apply(weight, b, d, spans, len(a), *a, *bm)


def delta(x: Tensor, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor], out: int) -> Tensor:
    """The low-rank branch alone, by plain differentiable operations: (..., in) -> (..., out).

    For the cases in which the branch sees another input than the frozen weight does (dropout).
    """
    pieces, row, first = [], 0, 0
    for k, (start, rows) in enumerate(spans):
        u = linear(x, a[k % len(a)].to(x.dtype)) * d[k]
        piece = linear(u, bm[k].to(u.dtype)) * b[first : first + rows]
        pieces += [piece.new_zeros(*x.shape[:-1], start - row), piece]
        row, first = start + rows, first + rows
    pieces.append(x.new_zeros(*x.shape[:-1], out - row))
    return torch.cat([p.to(x.dtype) for p in pieces if p.shape[-1]], dim=-1)


def delta_weight(
    b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """dW of each role, (rows, in), computed in `dtype`."""
    lefts = _lefts(b.to(dtype), d.to(dtype), [m.to(dtype) for m in bm])
    return [left @ a[k % len(a)].to(dtype) for k, left in enumerate(lefts)]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        b: Tensor,
        d: Tensor,
        spans: Spans,
        n_a: int,
        *banks: Tensor,
    ) -> Tensor:
        a, bm = banks[:n_a], banks[n_a:]
        flat = x.reshape(-1, x.shape[-1])
        width, rows, rank = x.shape[-1], b.numel(), d.shape[1]
        keep_x = ctx.needs_input_grad[1] or rank * (width * n_a + rows) > width * rows
        kept = (flat,) if keep_x else tuple(flat @ m.to(x.dtype).t() for m in a)
        ctx.save_for_backward(weight, b, d, *banks, *kept)
        ctx.spans, ctx.n_a, ctx.keep_x = spans, n_a, keep_x
        return _forward(x, weight, bias, b, d, spans, a, bm, None if keep_x else kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        n_a, spans = ctx.n_a, ctx.spans
        weight, b, d, *rest = ctx.saved_tensors
        a, bm, kept = rest[:n_a], rest[n_a : n_a + len(spans)], rest[n_a + len(spans) :]
        need_x, need_w, need_bias, need_b, need_d = ctx.needs_input_grad[:5]
        grad_x = grad_w = grad_bias = grad_b = grad_d = None
        flat = g.reshape(-1, g.shape[-1])
        with _exact(g):
            if need_x:
                grad_x = _input_gradient(flat, weight, b, d, spans, a, bm).view(*g.shape[:-1], weight.shape[1])
            if need_w:
                grad_w = (flat.t() @ kept[0]).to(weight.dtype)
            if need_bias:
                grad_bias = flat.sum(0)
            if need_b or need_d:
                parts = [flat[:, start : start + rows].t() for start, rows in spans]
                if ctx.keep_x:
                    p = [(part @ kept[0]) @ a[k % n_a].to(g.dtype).t() for k, part in enumerate(parts)]
                else:
                    p = [part @ kept[k % n_a] for k, part in enumerate(parts)]
                grad_b, grad_d = _vector_gradients(p, b, d, bm)
        return grad_x, grad_w, grad_bias, grad_b, grad_d, *[None] * (2 + n_a + len(spans))


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, b: Tensor, d: Tensor, spans: Spans, n_a: int, *banks: Tensor) -> Tensor:
        ctx.save_for_backward(b, d, *banks)
        ctx.spans, ctx.n_a = spans, n_a
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return _folded(wide, b, d, spans, banks[:n_a], banks[n_a:]).to(weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        b, d, *banks = ctx.saved_tensors
        a, bm = banks[: ctx.n_a], banks[ctx.n_a :]
        with _exact(g):
            wide = g.to(torch.promote_types(g.dtype, torch.float32))
            p = [
                wide[start : start + rows] @ a[k % ctx.n_a].to(wide.dtype).t()
                for k, (start, rows) in enumerate(ctx.spans)
            ]
            grad_b, grad_d = _vector_gradients(p, b, d, bm)
        return g if ctx.needs_input_grad[0] else None, grad_b, grad_d, *[None] * (2 + len(banks))


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
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if _folds(x.numel() // x.shape[-1], weight):
        return linear(x, _folded(weight, b, d, spans, a, bm).to(x.dtype), bias)
    flat = x.reshape(-1, x.shape[-1])
    if u is None:
        u = [flat @ m.to(x.dtype).t() for m in a]
    if weight.dtype not in WIDE:
        y = linear(torch.cat([flat, *u], dim=1), _joined(weight, b, d, spans, len(a), bm).to(x.dtype), bias)
        return y.view(*x.shape[:-1], weight.shape[0])
    y = linear(x, weight.to(x.dtype), bias)
    total = y.to(torch.promote_types(x.dtype, torch.float32)).view(-1, y.shape[-1])
    first = 0
    for k, (start, rows) in enumerate(spans):
        scaled = (u[k % len(u)] * d[k]).to(x.dtype)
        total[:, start : start + rows] += (scaled @ bm[k].to(x.dtype).t()) * b[first : first + rows]
        first += rows
    return total.to(x.dtype).view(y.shape)


def _input_gradient(
    g: Tensor, weight: Tensor, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor]
) -> Tensor:
    """(N, out) -> (N, in)."""
    if _folds(g.shape[0], weight):
        return g @ _folded(weight, b, d, spans, a, bm).to(g.dtype)
    total = g @ weight.to(g.dtype)
    first = 0
    for k, (start, rows) in enumerate(spans):
        inner = (g[:, start : start + rows] * b[first : first + rows]).to(g.dtype) @ bm[k].to(g.dtype)
        total = total + (inner * d[k]).to(g.dtype) @ a[k % len(a)].to(g.dtype)
        first += rows
    return total


def _vector_gradients(p: Sequence[Tensor], b: Tensor, d: Tensor, bm: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of b and d from P = g^T u of each role, (rows, r): rowsum(P*d*B) and colsum(b*B*P)."""
    products = [part.to(b.dtype) * m.to(b.dtype) for part, m in zip(p, bm, strict=True)]
    spans_of_b = b.split([m.shape[0] for m in bm])
    grad_b = torch.cat([product @ d[k] for k, product in enumerate(products)])
    grad_d = torch.stack([part @ product for part, product in zip(spans_of_b, products, strict=True)])
    return grad_b, grad_d


def _folds(tokens: int, weight: Tensor) -> bool:
    return weight.dtype in WIDE and _many(tokens, weight)


def _many(tokens: int, weight: Tensor) -> bool:
    """Whether one product of size r * in * out costs less than those of the tokens, r * tokens * (in + out)."""
    out, width = weight.shape
    return tokens * (width + out) > width * out


def _joined(weight: Tensor, b: Tensor, d: Tensor, spans: Spans, n_a: int, bm: Sequence[Tensor]) -> Tensor:
    """[W, (b*B)d] in the type of W, (out, in + n_a r): the factored form as one weight over [x, u]."""
    rank = d.shape[1]
    right = weight.new_zeros(weight.shape[0], n_a * rank)
    wide = torch.promote_types(b.dtype, torch.float32)
    lefts = _lefts(b.to(wide), d.to(wide), [m.to(wide) for m in bm])
    for k, (start, rows) in enumerate(spans):
        column = k % n_a * rank
        right[start : start + rows, column : column + rank] = lefts[k].to(weight.dtype)
    return torch.cat([weight, right], dim=1)


def _folded(weight: Tensor, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor]) -> Tensor:
    """W + dW in the type of W, (out, in)."""
    dtype = weight.dtype
    lefts = _lefts(b.to(dtype), d.to(dtype), [m.to(dtype) for m in bm])
    a = [m.to(dtype) for m in a]
    if len(a) == 1 and _contiguous(spans, weight.shape[0]):
        return torch.addmm(weight, torch.cat(lefts) if len(lefts) > 1 else lefts[0], a[0])
    whole = weight.clone()
    for k, (start, rows) in enumerate(spans):
        whole[start : start + rows].addmm_(lefts[k], a[k % len(a)])
    return whole


def _lefts(b: Tensor, d: Tensor, bm: Sequence[Tensor]) -> list[Tensor]:
    """diag(b) B diag(d) of each role, (rows, r)."""
    parts = b.split([m.shape[0] for m in bm])
    return [(part[:, None] * m).mul_(d[k]) for k, (part, m) in enumerate(zip(parts, bm, strict=True))]


def _contiguous(spans: Spans, out: int) -> bool:
    """Whether the spans are the whole weight, in order."""
    row = 0
    for start, rows in spans:
        if start != row:
            return False
        row += rows
    return row == out


def _exact(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, products run in the types they are given: the sum W + dW must not be rounded by autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
