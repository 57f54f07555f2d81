"""Options that only `save` would refuse, after the training, are refused before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import small_vit

import uora_vision as uora


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 2**63),
        ("rank", 2**31),
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
