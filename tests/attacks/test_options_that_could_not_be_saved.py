"""Options that only `save` would refuse, after the training, are refused before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import outputs, small_vit

import uora_vision as uora

X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**63),
        ("rank", 2**31),
        ("rank", 2**31 - 1),
        ("rank", 10**5),
        ("token_sampling", 2**31),
        ("d_init", 1e39),
        ("d_init", 10**400),
        ("d_init", 2.0**31),
        ("d_init", 1e-50),
    ],
)
def test_are_refused_at_inject(name: str, value: Any) -> None:
    model = small_vit()
    with pytest.raises(uora.ConfigError, match=name):
        uora.inject(model, **{"rank": 4, name: value})
    assert not any("uora" in path for path, _ in model.named_modules())


@pytest.mark.parametrize(("name", "value"), [("seed", 2**63 - 1), ("token_sampling", 2**31 - 1), ("d_init", 1e9)])
def test_what_is_taken_is_saved_and_loaded(name: str, value: Any, tmp_path: Path) -> None:
    uora.save(uora.inject(small_vit(), **{"rank": 4, name: value}), tmp_path)
    assert "default" in uora.adapter_names(uora.load(small_vit(), tmp_path))


def test_numbers_that_are_no_float_are_refused() -> None:
    model = uora.inject(small_vit(), rank=4)
    with pytest.raises(uora.ConfigError, match="threshold"):
        uora.Reinitializer(model, threshold=10**400)
    with pytest.raises(uora.ConfigError, match="share"):
        uora.merge(model, shares={"default": 10**400})


@pytest.mark.parametrize("alpha", [1.5, float("nan"), float("nan") + 0j, 0.3j])
@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_schedules_that_give_no_shares_are_refused_and_the_adapter_can_be_saved(
    alpha: Any, scope: Any, tmp_path: Path
) -> None:
    model = uora.inject(small_vit(), rank=4)
    for adapter in uora.adapters(model).values():
        adapter.b.data.fill_(0.1)
        adapter.d.data[:, 1] = 0
    reinit = uora.Reinitializer(model, scope=scope, alpha=lambda draws: torch.full(draws.shape, alpha))
    with pytest.raises(uora.ConfigError, match="schedule of alpha"):
        reinit.step()
    uora.save(model, tmp_path)
    assert torch.equal(outputs(uora.load(small_vit(), tmp_path), X), outputs(model.eval(), X))
