"""Rows of A from the gradient of the frozen weights: what they give beside random ones, at equal and at smaller rank.

Rows per projection are put into the adapters by hand here; docs/method.md has the formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import uora_vision as uora


def gradient_sketches(model: nn.Module, x: Tensor, y: Tensor, size: int, batch: int = 64) -> dict[str, Tensor]:
    """S G of every adapted weight, (size, in) float64, G the gradient of the mean loss over x; S is Gaussian."""
    found = uora.adapters(model)
    generator = torch.Generator().manual_seed(0)
    s, sums, handles, inputs = {}, {}, [], {}
    for path, adapter in found.items():
        module = model.get_submodule(path)
        rows = sum(role.rows for role in adapter.roles)
        s[path] = torch.randn(rows, size, generator=generator)
        sums[path] = torch.zeros(size, adapter.width, dtype=torch.float64)

        def forward(module: nn.Module, args: Any, out: Tensor, path: str = path) -> None:
            inputs[path] = args[0].detach().flatten(0, -2)
            out.register_hook(lambda g: backward(path, g))

        def backward(path: str, g: Tensor) -> None:
            sums[path] += (s[path].t() @ g.flatten(0, -2).t() @ inputs.pop(path)).double()

        handles.append(module.register_forward_hook(forward))
    model.eval()
    for xs, ys in zip(x.split(batch), y.split(batch), strict=True):
        cross_entropy(model(xs), ys, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {path: t / len(y) for path, t in sums.items()}


def give_rows(model: nn.Module, rows: dict[str, Tensor]) -> None:
    """Every adapter its own A, (r, in), in place of the bank's."""
    for path, adapter in uora.adapters(model).items():
        a, shared = rows[path].float(), adapter.matrices()[1]
        adapter.matrices = lambda a=a, shared=shared: ([a], shared)  # type: ignore[method-assign]


def leading(sketch: Tensor, rank: int) -> Tensor:
    """Its leading right singular vectors, (rank, in), and the singular values' share."""
    return torch.linalg.svd(sketch, full_matrices=False).Vh[:rank]


def inform(model: nn.Module, x: Tensor, y: Tensor, rank: int) -> None:
    sketches = gradient_sketches(model, x, y, rank + 8)
    give_rows(model, {path: leading(t, rank) for path, t in sketches.items()})
