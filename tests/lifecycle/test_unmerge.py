"""Reversible merging: a plain model meanwhile, and afterwards every bit as before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kill, merged, small_vit, trained, wake
from mechanisms import MODELS, both, run
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora


def vectors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (a.b.detach().clone(), a.d.detach().clone()) for name, a in uora.adapters(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_mechanism_comes_back_to_the_last_bit(name: str) -> None:
    plain, model, args = both(name)
    before, want = snapshot(model), run(model, args)
    uora.merge(model, reversible=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(run(model, args), want, rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())
    assert uora.unmerge(model) is model
    assert_same(before, model)
    assert torch.equal(run(model, args), want)


class TestUnmerge:
    @pytest.mark.parametrize("scope", ["shared", "layer"])
    def test_re_drawn_rows_and_the_trained_head_stay(self, images: Tensor, scope: str) -> None:
        model = trained(scope=scope)
        before, want = snapshot(model), model(images)
        uora.merge(model, reversible=True)
        torch.testing.assert_close(model(images), want, rtol=1e-5, atol=1e-5)
        assert_same(before, uora.unmerge(model))
        assert torch.equal(model(images), want)

    @pytest.mark.slow
    def test_many_rounds_lose_nothing_in_bfloat16(self) -> None:
        model = trained(lambda: small_vit().bfloat16())
        before = snapshot(model)
        for _ in range(20):
            uora.unmerge(merged(model, reversible=True))
        assert_same(before, model)

    @pytest.mark.slow
    def test_optimizer_and_reinitialisation_go_on(self, images: Tensor) -> None:
        def train(model: nn.Module, merged: bool) -> nn.Module:
            optimizer = torch.optim.AdamW(uora.param_groups(model, lr=1e-2))
            reinit = uora.Reinitializer(model, threshold=1e-3, optimizer=optimizer)
            for step in range(4):
                if merged:
                    uora.merge(model, reversible=True)
                    model(images)
                    uora.unmerge(model)
                model(images).square().mean().backward()
                optimizer.step()
                kill(model, {reinit.layers[step]: [step]})
                reinit.step()
                optimizer.zero_grad()
            assert reinit.firings >= 4
            return model

        plain, other = (train(wake(uora.inject(small_vit(), rank=8)), merged) for merged in (False, True))
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
        assert torch.equal(plain(images), other(images))

    def test_the_originals_of_the_adapted_weights_are_all_that_is_copied(self) -> None:
        model = trained(targets="v+fc1")
        uora.merge(model, reversible=True)
        kept = model.__dict__["_uora_merged"].originals
        assert sorted(kept) == [f"blocks.{i}.{p}" for i in range(2) for p in ("attn.qkv", "mlp.fc1")]
        uora.unmerge(model)
        assert "_uora_merged" not in vars(model)

    def test_other_adapters_wait_meanwhile(self, images: Tensor) -> None:
        model = trained()
        uora.inject(model, rank=4, name="other", targets="qv")
        want = wake(model, seed=7)(images)
        uora.merge(model, reversible=True)
        uora.unmerge(model)
        assert torch.equal(model(images), want) and len(uora.adapters(model)) == 2

    def test_a_copy_of_a_merged_model_has_its_own_adapter(self, images: Tensor) -> None:
        model = trained()
        want = model(images)
        uora.merge(model, reversible=True)
        twin = uora.unmerge(copy.deepcopy(model))
        assert torch.equal(twin(images), want)
        assert torch.equal(uora.unmerge(model)(images), want)

    def test_what_was_done_to_merged_weights_is_undone(self, images: Tensor) -> None:
        model = trained()
        before = snapshot(model)
        uora.merge(model, reversible=True)
        with torch.no_grad():
            model.blocks[0].attn.qkv.weight.zero_()
        assert_same(before, uora.unmerge(model))


class TestStates:
    def test_unmerge_of_what_was_not_merged(self) -> None:
        for model in (small_vit(), trained(), merged(trained())):
            with pytest.raises(uora.StateError, match="was not merged with"):
                uora.unmerge(model)

    def test_twice(self) -> None:
        model = merged(trained(), reversible=True)
        for reversible in (False, True):
            with pytest.raises(uora.StateError, match=r"unmerge\(\) it first"):
                uora.merge(model, reversible=reversible)
        uora.unmerge(model)
        with pytest.raises(uora.StateError, match="was not merged with"):
            uora.unmerge(model)

    def test_nothing_goes_in_meanwhile(self, tmp_path: Path) -> None:
        model = trained()
        uora.save(model, tmp_path)
        uora.merge(model, reversible=True)
        before = snapshot(model)
        actions: list[Any] = [
            lambda: uora.inject(model, rank=4),
            lambda: uora.inject(nn.Sequential(model), rank=4),
            lambda: uora.load(model, tmp_path),
            lambda: uora.save(model, tmp_path),
            lambda: uora.remove(model),
            lambda: uora.activate(model, "default"),
        ]
        for action in actions:
            with pytest.raises(uora.StateError, match="unmerge"):
                action()
        assert_same(before, model)

    @pytest.mark.parametrize("change", [lambda m: m.bfloat16(), lambda m: setattr(m.blocks[1], "mlp", nn.Identity())])
    def test_a_model_that_was_changed_stays_merged(self, change: Any) -> None:
        model = merged(trained(), reversible=True)
        change(model)
        before = snapshot(model)
        with pytest.raises(uora.StateError, match="is not the weight that was merged"):
            uora.unmerge(model)
        assert_same(before, model)

    def test_values_that_are_not_finite_change_nothing(self) -> None:
        model = trained()
        kill(model, {"blocks.1.mlp.fc1.fc1": [2]}, torch.inf)
        before = snapshot(model)
        with pytest.raises(uora.DeadAdapterError):
            uora.merge(model, reversible=True)
        assert_same(before, model)
