"""Adapters that are made, loaded or first used inside torch.inference_mode()."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import outputs, small_vit, wake
from training import assert_all_train, assert_same

import uora_vision as uora

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class TestInferenceMode:
    """What is made inside of it can be trained outside."""

    def test_at_injection(self) -> None:
        model = small_vit()
        with torch.inference_mode():
            wake(uora.inject(model, rank=4))
            model(X)
        assert_all_train(model, model(X))

    @pytest.mark.parametrize("first", ["load", "activate"])
    def test_at_load_and_first_activation(self, first: str, tmp_path: Path) -> None:
        saved = wake(uora.inject(small_vit(), rank=4))
        uora.save(saved, tmp_path)
        model = small_vit()
        if first == "activate":
            uora.load(model, tmp_path, name="x", activate=False)
        with torch.inference_mode():
            uora.load(model, tmp_path, name="x") if first == "load" else uora.activate(model, "x")
            model(X)
        assert_same(outputs(model, X), outputs(saved, X))
        assert_all_train(model, model(X))
        uora.Reinitializer(model, threshold=0.5).step()
        with torch.no_grad():
            next(iter(uora.adapters(model).values())).b.add_(1.0)

    def test_a_model_that_was_made_inside_is_refused_by_name(self) -> None:
        with torch.inference_mode():
            model = small_vit()
        with pytest.raises(uora.StateError, match=r"was made inside torch\.inference_mode"):
            uora.inject(model, rank=4)
