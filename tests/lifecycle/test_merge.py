"""Merging: a plain model of the same function, and what rounding it cost."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import kill, merged, small_vit, trained
from torch import Tensor

import uora_vision as uora


class TestMerge:
    @pytest.mark.parametrize("scope", [None, "shared", "layer"])
    @pytest.mark.parametrize("targets", ["attention+mlp", "v+fc2"])
    def test_is_a_plain_model_of_the_same_function(self, images: Tensor, scope: str | None, targets: str) -> None:
        base = small_vit()
        model = trained(scope=scope, targets=targets)
        want = model(images)
        report = uora.merge(model)
        assert report == uora.MergeReport(weights=8 if targets == "attention+mlp" else 4, weight_error=0.0)
        torch.testing.assert_close(model(images), want, rtol=1e-5, atol=1e-5)
        assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
        assert list(model.state_dict()) == list(base.state_dict())
        assert all(p.requires_grad for p in model.parameters())
        fresh = small_vit(seed=8)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(images), model(images))

    def test_only_adapted_rows_change(self) -> None:
        base, model = small_vit(), trained(targets="k")
        uora.merge(model)
        for i in range(2):
            rows = (model.blocks[i].attn.qkv.weight != base.blocks[i].attn.qkv.weight).any(1).nonzero().squeeze(1)
            assert rows.tolist() == list(range(64, 128))
            assert torch.equal(model.blocks[i].mlp.fc1.weight, base.blocks[i].mlp.fc1.weight)

    def test_the_sum_is_rounded_once_and_the_error_is_measured(self, images: Tensor) -> None:
        model = trained(lambda: small_vit().bfloat16())
        worst, weights = 0.0, {}
        for path, adapter in uora.adapters(model).items():
            exact = model.get_submodule(path).weight.double()
            for role, change in zip(adapter.roles, adapter.delta_weight(torch.float64), strict=True):
                exact[role.start : role.start + role.rows] += change
            weights[path] = exact.bfloat16()
            worst = max(worst, (exact.bfloat16().double() - exact).abs().max().item())
        before = model(images.bfloat16()).double()
        report = uora.merge(model, images.bfloat16())
        assert report.weights == 8 and report.weight_error == pytest.approx(worst, rel=1e-4) and worst > 1e-4
        for path, weight in weights.items():
            differing = (model.get_submodule(path).weight != weight).float().mean()
            assert differing < 1e-3, "rounding twice gives other weights"
        error = (model(images.bfloat16()).double() - before).abs().max().item()
        assert report.output_error == pytest.approx(error) and report.output_scale == before.abs().max().item()

    def test_the_report_of_a_float32_base(self, images: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
        model = trained().train()
        reports: list[uora.MergeReport] = []
        report = uora.merge(model, images, on_report=reports.append)
        assert reports == [report] and model.training
        assert str(report).startswith("merged 8 weights; ") and "of an output" in str(report)
        assert uora.merge(trained()).output_error is None
        captured = capsys.readouterr()
        assert not captured.out and not captured.err, "the caller prints what it wants to"

    def test_twice(self) -> None:
        model = merged(trained())
        with pytest.raises(uora.StateError, match="no adapter"):
            uora.merge(model)

    def test_values_that_are_not_finite_change_nothing(self) -> None:
        model = trained()
        kill(model, {"blocks.1.mlp.fc1.fc1": [2]}, torch.inf)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(uora.UoraError, match=r"blocks.1.mlp.fc1"):
            uora.merge(model)
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and uora.adapters(model)

    def test_a_failing_example_changes_nothing(self) -> None:
        model = trained()
        before = {k: v.clone() for k, v in copy.deepcopy(model.state_dict()).items()}
        with pytest.raises(AssertionError):
            uora.merge(model, torch.zeros(1, 3, 31, 31))
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and uora.adapters(model)
