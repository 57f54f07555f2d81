"""Every method trains what its name says, at the rates that were asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from common.command.choices import Method, Scope
from common.command.options import MethodOptions
from common.training.methods import DEFAULTS, AdaptedModel, MethodError, apply_method
from torch import nn

import uora_vision as uora
from uora_vision.lifecycle import parameter_groups

HEAD = 7 * 64 + 7


def options(method: Method, **changes: object) -> MethodOptions:
    rank = None if DEFAULTS[method].rank is None else 4
    return MethodOptions(**{"method": method, "rank": rank, "lr": 0.1, "head_lr": 0.2, "weight_decay": 0.3, **changes})


def adapt(model: nn.Module, options: MethodOptions) -> AdaptedModel:
    """By any method, as recipes do it."""
    if options.method is not Method.uora:
        return apply_method(model, options)
    uora.inject(model, rank=options.rank, targets=options.targets)
    groups = uora.param_groups(model, lr=options.lr, head_lr=options.head_lr, weight_decay=options.weight_decay)
    return AdaptedModel(model, model, groups, options)


def expected_without_head(method: Method) -> int:
    """Of conftest's ViT: width 64, 2 blocks of qkv, proj, fc1 and fc2, MLP width 256."""
    shapes = [(192, 64), (64, 64), (256, 64), (64, 256)] * 2
    biases = 64 + 2 * (64 + 192 + 64 + 64 + 256 + 64) + 64  # patch embedding, blocks with their two norms, last norm
    return {
        Method.uora: 2 * (6 * 4 + 3 * 64 + 64 + 256 + 64),  # q, k, v, proj, fc1 and fc2 have their own d
        Method.vera: 2 * (6 * 4 + 3 * 64 + 64 + 256 + 64),
        Method.vera_peft: sum(4 + rows for rows, _ in shapes),
        Method.lora: sum(4 * (rows + width) for rows, width in shapes),
        Method.linear: 0,
        Method.bitfit: biases,
        Method.full: -1,
    }[method]


@pytest.mark.parametrize("method", list(Method))
def test_trains_what_it_should_and_nothing_else(method: Method, vit: nn.Module, images: torch.Tensor) -> None:
    total = sum(p.numel() for p in vit.parameters())
    before = vit(images)
    adapted = adapt(vit, options(method))
    torch.testing.assert_close(adapted.model(images), before, rtol=0, atol=1e-6)
    expected = total - HEAD if method is Method.full else expected_without_head(method)
    assert adapted.trained_without_head == expected
    assert adapted.trained == expected + HEAD
    assert adapted.adapter_bytes == 4 * expected
    grouped = [id(p) for group in adapted.groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in adapted.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", list(Method))
def test_groups_carry_the_rates_and_decay_only_matrices(method: Method, vit: nn.Module) -> None:
    adapted = adapt(vit, options(method))
    head = {id(p) for p in adapted.base.get_classifier().parameters()}
    for group in adapted.groups:
        for p in group["params"]:
            if group["name"] != "adapter" or method not in (Method.uora, Method.vera):  # theirs follow the banks
                assert group["lr"] == (0.2 if id(p) in head else 0.1)
            trained_vectors = method in (Method.uora, Method.vera, Method.vera_peft) and id(p) not in head
            assert group["weight_decay"] == (0.3 if p.dim() > 1 and not trained_vectors else 0.0)


@pytest.mark.parametrize("method", [Method.vera, Method.vera_peft, Method.lora])
@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one_is_an_error(method: Method, rank: int, vit: nn.Module) -> None:
    with pytest.raises(MethodError, match="rank must be at least 1"):
        apply_method(vit, options(method, rank=rank))


def test_uora_is_injected_by_the_recipes_themselves(vit: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"calls uora\.inject itself"):
        apply_method(vit, options(Method.uora))


def test_only_uora_redraws_or_informs_and_not_when_told_never() -> None:
    found = [(method, scope) for method in Method for scope in Scope if options(method, scope=scope).redraws]
    assert found == [(Method.uora, scope) for scope in (Scope.shared, Scope.quorum, Scope.layer)]
    told = [(method, scope) for method in Method for scope in Scope if options(method, scope=scope).informs]
    assert told == [(Method.uora, Scope.informed)]


def test_lora_adapts_the_same_weights_as_uora(make_vit: Callable[..., nn.Module]) -> None:
    lora = apply_method(make_vit(), options(Method.lora, targets="mlp")).model
    with_lora = {name.removesuffix(".lora_A") for name, _ in lora.named_modules() if name.endswith(".lora_A")}
    assert with_lora == set(uora.adapters(uora.inject(make_vit(), rank=4, targets="mlp")))


def test_missing_peft_says_what_to_install(vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MethodError, match="pip install peft"):
        apply_method(vit, options(Method.lora))


def test_a_model_without_a_head_is_an_error(make_vit: Callable[..., nn.Module]) -> None:
    with pytest.raises(MethodError, match="would train nothing: VisionTransformer has no head"):
        apply_method(make_vit(num_classes=0), options(Method.linear))


def test_token_sampling_reaches_vera(vit: nn.Module) -> None:
    apply_method(vit, options(Method.vera, token_sampling=4))
    assert {adapter.token_sampling for adapter in uora.adapters(vit).values()} == {4}


def test_the_rate_of_the_adapters_is_the_librarys() -> None:
    assert DEFAULTS[Method.uora].lr == DEFAULTS[Method.vera].lr == parameter_groups.LR
    assert DEFAULTS[Method.uora].head_lr == parameter_groups.HEAD_LR
