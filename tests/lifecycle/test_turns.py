"""A checkpoint is recomputed with the adapter of its forward, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import small_vit, wake
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import uora_vision as uora


def model() -> nn.Module:
    return wake(uora.inject(small_vit(), rank=4, name="a"))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    out: Any = checkpoint(model, x, use_reentrant=False)
    return out.square().sum()


def add(model: nn.Module) -> None:
    uora.inject(model, rank=4, name="b")


def there_and_back(model: nn.Module) -> None:
    add(model)
    uora.activate(model, "a")


@pytest.mark.parametrize(("change", "allowed"), [(lambda model: None, True), (add, False), (there_and_back, True)])
def test_a_backward_after_another_adapter_came(
    images: Tensor, change: Callable[[nn.Module], None], allowed: bool
) -> None:
    plain, changed = model(), model()
    loss(plain, images).backward()
    total = loss(changed, images)
    change(changed)
    if allowed:
        total.backward()
        for path, adapter in uora.adapters(plain).items():
            assert torch.equal(adapter.b.grad, uora.adapters(changed)[path].b.grad)
        return
    with pytest.raises(uora.StateError, match="checkpoint is recomputed while another adapter is active"):
        total.backward()
    assert all(a.b.grad is None for a in uora.adapters(changed).values())


def test_the_second_adapter_trains_under_checkpoints_as_the_first(images: Tensor) -> None:
    alone = wake(uora.inject(small_vit(), rank=4, name="b"))
    loss(alone, images).backward()
    beside = model()
    wake(uora.inject(beside, rank=4, name="b"))
    loss(beside, images).backward()
    for path, adapter in uora.adapters(alone).items():
        assert torch.equal(adapter.b.grad, uora.adapters(beside)[path].b.grad)


@pytest.mark.slow
def test_many_turns_are_remembered(images: Tensor) -> None:
    both = model()
    add(both)
    totals = []
    for name in ("a", "b") * 8:
        uora.activate(both, name)
        totals.append(loss(both, images))
    uora.activate(both, "b")
    sum(totals[1::2]).backward()  # type: ignore[union-attr]
    with pytest.raises(uora.StateError, match="another adapter is active"):
        totals[0].backward()
