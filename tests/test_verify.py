"""Verification names what would not train, and leaves no trace."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import wake
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora


class LosesFc2(nn.Module):
    """An MLP that has a second layer and does not use it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x)[..., : x.shape[-1]]


class Detaches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach()


class Spoils(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.where(torch.arange(x.shape[-1]) == 0, torch.inf, 1.0)


def test_every_role_is_listed_with_a_gradient(vit: nn.Module, images: Tensor) -> None:
    norms = uora.verify(uora.inject(vit, rank=8), images)
    assert list(norms) == uora.Reinitializer(vit).layers and min(norms.values()) > 0


def test_the_roles_of_one_weight_have_gradients_of_their_own(vit: nn.Module, images: Tensor) -> None:
    norms = uora.verify(uora.inject(vit, rank=8, targets="attention"), images)
    assert len(set(norms.values())) == len(norms) == 8


def test_a_dead_adapter_is_named_and_no_other(vit: nn.Module, images: Tensor) -> None:
    vit.blocks[1].mlp = LosesFc2(vit.blocks[1].mlp)
    uora.inject(vit, rank=8)
    with pytest.raises(uora.DeadAdapterError, match=r"1 of 12 .*blocks.1.mlp.fc2") as caught:
        uora.verify(vit, images)
    assert "blocks.0" not in str(caught.value) and "fc1" not in str(caught.value)


def test_adapters_before_a_detach_are_dead(vit: nn.Module, images: Tensor) -> None:
    vit.blocks[0].add_module("drop_path2", nn.Identity())
    vit.blocks = nn.Sequential(vit.blocks[0], Detaches(), vit.blocks[1])
    uora.inject(vit, rank=8)
    with pytest.raises(uora.DeadAdapterError, match=r"6 of 12 .*blocks.0.attn.qkv.q"):
        uora.verify(vit, images)


@pytest.mark.parametrize("train", ["head", ()])
def test_all_dead_are_named_too(vit: nn.Module, images: Tensor, train: Any) -> None:
    vit.norm = nn.Sequential(vit.norm, Detaches())
    uora.inject(vit, rank=8, train=train)
    with pytest.raises(uora.DeadAdapterError, match=r"blocks.0.attn.qkv.q"):
        uora.verify(vit, images)


def test_gradients_that_are_not_finite_are_refused(vit: nn.Module, images: Tensor) -> None:
    vit.blocks[1].mlp.add_module("act", nn.Sequential(vit.blocks[1].mlp.act, Spoils()))
    uora.inject(vit, rank=8)
    with pytest.raises(uora.DeadAdapterError, match="blocks"):
        uora.verify(vit, images)


def test_chance_and_statistics_of_training_play_no_part(vit: nn.Module, images: Tensor) -> None:
    vit.blocks[1].mlp.norm = nn.BatchNorm1d(65)
    vit.blocks[1].attn.proj_drop = nn.Dropout(0.5)
    uora.inject(vit, rank=8, dropout=0.3)
    want = uora.verify(vit.eval(), images)
    assert uora.verify(vit.train(), images) == want
    assert not vit.blocks[1].mlp.norm.running_mean.any()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dies", [False, True])
def test_it_leaves_everything_as_it_was(vit: nn.Module, images: Tensor, dies: bool, training: bool) -> None:
    vit.blocks[1].attn.proj_drop = nn.Dropout(0.5)
    if dies:
        vit.blocks[1].mlp = LosesFc2(vit.blocks[1].mlp)
    wake(uora.inject(vit, rank=8, dropout=0.3)).train(training)
    vit.blocks[0].eval()
    adapter = uora.adapters(vit)["blocks.0.attn.proj"]
    adapter.d.requires_grad_(False)
    vit(images).sum().backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in vit.named_parameters()}
    before, state = snapshot(vit), torch.get_rng_state()
    with pytest.raises(uora.DeadAdapterError, match=r"blocks\.1\.mlp\.fc2") if dies else nullcontext():
        uora.verify(vit, images)
    assert_same(before, vit)
    assert torch.equal(torch.get_rng_state(), state)
    for name, p in vit.named_parameters():
        assert p.grad is None if grads[name] is None else torch.equal(p.grad, grads[name]), name


def test_a_forward_that_raises_leaves_everything_as_it_was(vit: nn.Module) -> None:
    wake(uora.inject(vit, rank=8)).train()
    before, state = snapshot(vit), torch.get_rng_state()
    with pytest.raises(AssertionError):
        uora.verify(vit, torch.zeros(1, 3, 31, 31))
    assert_same(before, vit)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_works_where_gradients_are_switched_off(vit: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        assert uora.verify(uora.inject(vit, rank=8), images)
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("form", ["tensor", "tuple", "keywords"])
def test_inputs_may_be_arguments_or_keywords(vit: nn.Module, images: Tensor, form: str) -> None:
    given = {"tensor": images, "tuple": (images,), "keywords": {"x": images}}[form]
    assert uora.verify(uora.inject(vit, rank=8), given)


def test_injecting_with_an_example_verifies(vit: nn.Module, images: Tensor) -> None:
    assert uora.inject(vit, rank=8, example_input=images) is vit


@pytest.mark.parametrize("frozen_head", [False, True])
def test_injecting_with_an_example_that_leaves_one_dead_gives_the_model_back(
    vit: nn.Module, images: Tensor, frozen_head: bool
) -> None:
    vit.blocks[1].mlp = LosesFc2(vit.blocks[1].mlp)
    vit.head.requires_grad_(not frozen_head)
    before = snapshot(vit)
    with pytest.raises(uora.DeadAdapterError, match=r"blocks.1.mlp.fc2"):
        uora.inject(vit, rank=8, example_input=images)
    assert_same(before, vit)


def test_half_precision(vit: nn.Module, images: Tensor) -> None:
    assert uora.verify(uora.inject(vit.bfloat16(), rank=8), images.bfloat16())
