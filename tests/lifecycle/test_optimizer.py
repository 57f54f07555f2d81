"""An optimizer that does not train the adapter, or lets it decay, is noticed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import wake
from torch import Tensor, nn

import uora_vision as uora


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def named(model: nn.Module, key: str) -> list[nn.Parameter]:
    return [getattr(a, key) for a in uora.adapters(model).values()]


@pytest.mark.parametrize(
    ("left", "has"),
    [(lambda m: m.head.parameters(), 0), (lambda m: named(m, "b"), 8), (lambda m: named(m, "d"), 8)],
)
def test_one_without_b_or_d_is_refused(vit: nn.Module, left: Callable[[nn.Module], Any], has: int) -> None:
    model = uora.inject(vit, rank=4)
    with pytest.raises(uora.ConfigError, match=f"has {has} of the 16 vectors b and d .*param_groups"):
        uora.Reinitializer(model, optimizer=torch.optim.AdamW(left(model)))


def test_one_made_before_inject_is_refused(vit: nn.Module) -> None:
    optimizer = torch.optim.AdamW(vit.parameters())
    with pytest.raises(uora.ConfigError, match="has 0 of the 16"):
        uora.Reinitializer(uora.inject(vit, rank=4), optimizer=optimizer)


def test_one_of_another_adapter_is_refused(vit: nn.Module) -> None:
    optimizer = torch.optim.AdamW(trainable(uora.inject(vit, rank=4, name="a")))
    with pytest.raises(uora.ConfigError, match="has 0 of the 16"):
        uora.Reinitializer(uora.inject(vit, rank=4, name="b"), optimizer=optimizer)


def test_frozen_vectors_are_called_frozen(vit: nn.Module) -> None:
    model = uora.inject(vit, rank=4)
    for d in named(model, "d"):
        d.requires_grad_(False)
    with pytest.raises(uora.ConfigError, match="They are frozen"):
        uora.Reinitializer(model, optimizer=torch.optim.AdamW(trainable(model)))


@pytest.mark.parametrize("key", ["b", "d"])
def test_decay_of_some_vectors_is_warned_of(vit: nn.Module, key: str) -> None:
    model = uora.inject(vit, rank=4)
    calm = [p for p in trainable(model) if all(p is not q for q in named(model, key))]
    groups = [{"params": calm, "weight_decay": 0.0}, {"params": named(model, key)}]
    with pytest.warns(uora.UoraWarning, match=r"8 of the 16 .* decay .*\(blocks.0.attn.qkv." + key):
        uora.Reinitializer(model, optimizer=torch.optim.AdamW(groups, weight_decay=0.1))


def test_groups_of_param_groups_are_silent(vit: nn.Module) -> None:
    model = uora.inject(vit, rank=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uora.Reinitializer(model, optimizer=torch.optim.AdamW(uora.param_groups(model, lr=1.0, weight_decay=0.1)))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("decays", [False, True])
def test_decay_is_seen_without_the_optimizer(vit: nn.Module, images: Tensor, make: Any, decays: bool) -> None:
    model = uora.inject(vit, rank=4)
    decay = 0.1 if decays and make is not torch.optim.Adam else 0.0
    optimizer = make(trainable(model), lr=1e-2, weight_decay=decay)
    reinit = uora.Reinitializer(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            model(images).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            reinit.step()
    assert [w.category for w in said] == ([uora.UoraWarning] if decay else [])
    assert all("decay" in str(w.message) for w in said)


def test_decay_is_seen_where_the_loss_gives_no_gradient_later(vit: nn.Module, images: Tensor) -> None:
    model = wake(uora.inject(vit, rank=4))
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2, weight_decay=0.1)
    reinit = uora.Reinitializer(model)
    (0 * model(images).sum()).backward()
    optimizer.step()
    with pytest.warns(uora.UoraWarning, match="decay"):
        reinit.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_the_vectors_to_a_half_type_is_warned_of_once(vit: nn.Module, dtype: torch.dtype) -> None:
    model = uora.inject(vit, rank=4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.to(dtype)
        model.to(dtype)
    assert [w.category for w in said] == [uora.UoraWarning] and str(dtype) in str(said[0].message)


def test_other_casts_are_silent(vit: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uora.inject(vit.bfloat16(), rank=4).float().double().to("cpu")
