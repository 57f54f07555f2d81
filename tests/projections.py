"""Inputs of one adapted projection, and the formula written out in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from uora_vision.maths.linear import project
from uora_vision.maths.update import Update
from uora_vision.weights.matrix import Span, Spans

MANY, FEW = 200, 3  # tokens: folded and factored for every width below


@dataclass
class Case:
    """Inputs of one projection."""

    weight: Tensor
    bias: Tensor | None
    spans: Spans
    b: Tensor
    d: Tensor
    a: list[Tensor]
    bm: list[Tensor]
    leaves: list[Tensor] = field(default_factory=list)

    @property
    def update(self) -> Update:
        return Update(self.b, self.d, self.spans, tuple(self.a), tuple(self.bm))

    def call(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias, self.update)


def case(
    spans: tuple[tuple[int, ...], ...] = ((0, 16), (16, 16), (32, 16)),
    out: int = 48,
    width: int = 20,
    rank: int = 4,
    per_role: bool = False,
    bias: bool = True,
    shared_b: bool = False,
    base: torch.dtype = torch.float64,
    vectors: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    given, n = tuple(Span(*span) for span in spans), len(spans)
    one_b = shared_b and len({span.rows for span in given}) == 1
    return Case(
        weight=(draw(out, width) / width**0.5).to(base),
        bias=draw(out).to(base) if bias else None,
        spans=given,
        b=draw(sum(span.rows for span in given)).to(vectors),
        d=draw(n, rank).to(vectors),
        a=[(draw(rank, width) / width**0.5).to(base) for _ in range(n if per_role else 1)],
        bm=[(draw(span.rows, rank) / rank**0.5).to(base) for span in given[: 1 if one_b else n]],
    )


def reference_weight(c: Case, weight: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """W + diag(b) B diag(d) A of every role, in float64."""
    total, first = weight, 0
    for k, span in enumerate(c.spans):
        a, bm = c.a[k if len(c.a) > 1 else 0].double(), c.bm[k if len(c.bm) > 1 else 0].double()
        change = torch.diag(b[first : first + span.rows]) @ bm @ torch.diag(d[k]) @ a
        for i in range(span.rows):  # row by row, where each lies
            run, within = divmod(i, span.block or span.rows)
            row = torch.zeros(len(weight), 1, dtype=torch.float64)
            row[span.start + run * span.stride + within] = 1
            total = total + row * change[i]
        first += span.rows
    return total


def reference(c: Case, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of sum(y * g), in float64 by plain autograd."""
    x, weight, b, d = (t.detach().double().requires_grad_() for t in (x, c.weight, c.b, c.d))
    bias = None if c.bias is None else c.bias.detach().double().requires_grad_()
    y = torch.einsum("...i,oi->...o", x, reference_weight(c, weight, b, d))
    y = y if bias is None else y + bias
    (y * g.double()).sum().backward()
    grads = {"x": x.grad, "weight": weight.grad, "b": b.grad, "d": d.grad}
    if bias is not None:
        grads["bias"] = bias.grad
    return {"y": y.detach(), **grads}  # type: ignore[dict-item]


def measured(c: Case, x: Tensor, g: Tensor, train_base: bool = True) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    leaves: dict[str, Tensor] = {"x": x, "b": c.b.requires_grad_(), "d": c.d.requires_grad_()}
    if train_base:
        leaves["weight"] = c.weight.requires_grad_()
        if c.bias is not None:
            leaves["bias"] = c.bias.requires_grad_()
    y = c.call(x)
    grads = torch.autograd.grad((y * g.to(y.dtype)).sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, value in got.items():
        scale = want[name].abs().max().clamp(min=1e-3)
        error = (value.double() - want[name]).abs().max() / scale
        assert error <= tolerance, f"{name}: {error:.3g} of its scale"
