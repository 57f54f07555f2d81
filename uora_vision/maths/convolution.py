"""The adapted projection as a convolution: `linear` with a convolution in place of the product.

A kernel (out, in / groups, *size) is the matrix (out, in / groups * size), so A is a bank of r small kernels and
u = conv(x, A) has r channels per group. The gradients of b and d need g and u alone, and u (or x, if that is smaller)
is all that is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..weights.matrix import Spans, from_matrix, in_order, take, to_matrix
from .forms import WIDE, autocasts, exact, folded, left_matrix, vector_gradients
from .linear import fold


class Geometry(NamedTuple):
    """Of a convolution, as torch.nn.functional.conv2d takes them, one number per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    b: Tensor,
    d: Tensor,
    spans: Spans,
    a: Sequence[Tensor],
    bm: Sequence[Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """The adapted convolution, (batch, in, *spatial) -> (batch, out, *spatial); the batch may be missing.

    Args:
        weight: frozen kernel, (out, in / groups, *size).
        a: A of each role, (r, in / groups * size), or one for all; see `functional` for the others.
        dropout: probability of dropping an input element of the low-rank branch.
    """
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dim() < weight.dim():
        return convolve(x[None], weight, bias, geometry, b, d, spans, a, bm, dropout).squeeze(0)
    dense = len(a) > 1 or weight.requires_grad
    with exact(x):
        if dropout or (dense and weight.dtype not in WIDE):
            # dW apart from W: it sees another input, or the sum would be rounded to the type of W.
            zero = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            change = fold(zero, "kernel", b, d, spans, a, bm).to(x.dtype)
            branch = _conv(torch.dropout(x, dropout, dropout > 0), change, None, geometry)
            return _conv(x, weight.to(x.dtype), bias, geometry) + branch
        if not torch.is_grad_enabled():
            return _forward(x, weight, bias, geometry, b, d, spans, a, bm)
        if dense:
            kernel = fold(weight, "kernel", b, d, spans, a, bm).to(x.dtype)
            return _conv(x, kernel, bias, geometry)
        return _Convolve.apply(x, weight, bias, geometry, b, d, spans, a[0], *bm)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        b: Tensor,
        d: Tensor,
        spans: Spans,
        a: Tensor,
        *bm: Tensor,
    ) -> Tensor:
        u = _reduce(x, weight, geometry, a)
        ctx.keep_x = x.numel() < u.numel()
        ctx.save_for_backward(weight, b, d, a, x if ctx.keep_x else u, *bm)
        ctx.geometry, ctx.spans, ctx.shape = geometry, spans, x.shape
        return _forward(x, weight, bias, geometry, b, d, spans, (a,), bm, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        weight, b, d, a, kept, *bm = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        need_x, _, need_bias, _, need_b, need_d = ctx.needs_input_grad[:6]
        grad_x = grad_bias = grad_b = grad_d = None
        with exact(g):
            if need_x:
                # Over a kernel in a half type the sum is rounded here only: the forward adds the update exactly.
                wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
                kernel = _kernel(wide, b, d, ctx.spans, (a,), bm)
                grad_x = _input_gradient(g, kernel.to(g.dtype), geometry, ctx.shape)
            if need_bias:
                grad_bias = g.sum(dim=(0, *range(2, g.dim())))
            if need_b or need_d:
                u = _reduce(kept, weight, geometry, a) if ctx.keep_x else kept
                g, u = (t.flatten(2).unflatten(1, (geometry.groups, -1)) for t in (g, u))
                p = torch.einsum("bgon,bgrn->gor", g, u).flatten(0, 1)
                if not in_order(ctx.spans, len(p)):
                    p = torch.cat([take(p, span) for span in ctx.spans])
                grad_b, grad_d = vector_gradients(p, b, d, ctx.spans, bm)
        return grad_x, None, grad_bias, None, grad_b, grad_d, None, None, *[None] * len(bm)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    b: Tensor,
    d: Tensor,
    spans: Spans,
    a: Sequence[Tensor],
    bm: Sequence[Tensor],
    u: Tensor | None = None,
) -> Tensor:
    if weight.dtype in WIDE:
        return _conv(x, _kernel(weight, b, d, spans, a, bm).to(x.dtype), bias, geometry)
    # A kernel in a half type would round the sum W + dW, so the update is added to the output.
    u = _reduce(x, weight, geometry, a[0]) if u is None else u
    y = _conv(x, weight.to(x.dtype), bias, geometry)
    left = left_matrix(b, d, spans, 1, bm, len(weight))
    ones = (1,) * (x.dim() - 2)
    pointwise = Geometry(ones, (0,) * len(ones), ones, geometry.groups)
    update = _conv(u.float(), left.view(*left.shape, *ones), None, pointwise)
    return (y.float() + update).to(x.dtype)


def _kernel(weight: Tensor, b: Tensor, d: Tensor, spans: Spans, a: Sequence[Tensor], bm: Sequence[Tensor]) -> Tensor:
    """W + dW as a kernel, in the type of W."""
    return from_matrix(folded(to_matrix(weight, "kernel"), b, d, spans, a, bm), "kernel", weight.shape)


def _reduce(x: Tensor, weight: Tensor, geometry: Geometry, a: Tensor) -> Tensor:
    """u = conv(x, A): (batch, groups * r, *spatial)."""
    kernels = a.to(x.dtype).reshape(len(a), *weight.shape[1:])
    if geometry.groups > 1:
        kernels = kernels.repeat(geometry.groups, *[1] * (kernels.dim() - 1))
    return _conv(x, kernels, None, geometry)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    none = (0,) * len(geometry.stride)
    return torch.convolution(
        x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, False, none, geometry.groups
    )


def _input_gradient(g: Tensor, weight: Tensor, geometry: Geometry, shape: torch.Size) -> Tensor:
    stand_in = g.new_empty(1).expand(shape)  # only its shape is looked at
    none = [0] * len(geometry.stride)
    return torch.ops.aten.convolution_backward(
        g, stand_in, weight, None, geometry.stride, geometry.padding, geometry.dilation, False, none, geometry.groups,
        [True, False, False],
    )[0]  # fmt: skip
