"""Small injected models in training, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from conftest import small_vit, wake
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import uora_vision as uora


def injected(rank: int = 8, depth: int = 2, **options: Any) -> nn.Module:
    return wake(uora.inject(small_vit(depth=depth), rank=rank, **options))


def gradients(model: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    cross_entropy(model(x), torch.arange(len(x))).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_all_train(model: nn.Module, output: Tensor) -> None:
    output.sum().backward()
    adapters = uora.adapters(model)
    assert adapters and all(a.b.grad is not None and a.b.grad.any() for a in adapters.values())


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == two.keys() and len(one) > 10
    for name, grad in one.items():
        if tolerance:
            torch.testing.assert_close(two[name], grad, **tolerance)
        else:
            assert torch.equal(two[name], grad), name


class Checkpointed(nn.Module):
    """A block recomputed in backward."""

    def __init__(self, block: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=self.reentrant)
