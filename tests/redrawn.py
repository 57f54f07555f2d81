"""A small model with an adapter whose directions are dead, and drawn again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import uora_vision as uora


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)) for _ in range(2))
        self.norm, self.head = nn.BatchNorm1d(12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


X = torch.linspace(-1, 1, 60).view(5, 12)


def made(seed: int = 0, **options: Any) -> nn.Module:
    return wake(uora.inject(Net(), rank=4, seed=seed, targets="all", **options), 1)


def wake(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for adapter in uora.adapters(model).values():
        for p in (adapter.b, adapter.d):
            p.data.uniform_(0.2, 0.6, generator=generator)
    return model


def redraw(model: nn.Module, scope: str = "shared", times: int = 1, **options: Any) -> nn.Module:
    """Directions 1 and 2 of every layer die and are drawn again; all vectors then have other values."""
    for k in range(times):
        reinit = uora.Reinitializer(model, alpha=0.25, scope=scope, **options)  # type: ignore[arg-type]
        for adapter in uora.adapters(model).values():
            adapter.d.data[:, 1:3] = 0
        assert reinit.step()
        wake(model, 2 + k)
    return model


def out(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(X)


def same(one: nn.Module, two: nn.Module) -> bool:
    return torch.allclose(out(one), out(two), atol=1e-5)
