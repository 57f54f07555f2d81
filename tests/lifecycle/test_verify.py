"""Verification names what would not train, and leaves no trace."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import wake
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
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


@pytest.mark.parametrize("part", ["b", "d"])
def test_a_frozen_vector_is_named(vit: nn.Module, images: Tensor, part: str) -> None:
    uora.inject(vit, rank=8)
    getattr(uora.adapters(vit)["blocks.0.attn.proj"], part).requires_grad_(False)
    with pytest.raises(uora.DeadAdapterError, match=r"1 of 8 adapters are frozen: blocks.0.attn.proj\."):
        uora.verify(vit, images)


class Checkpointed(nn.Module):
    """A reentrant checkpoint while training, as gradient_checkpointing_enable() gives in transformers."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=True) if self.training else self.block(x)


@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_that_stop_gradients_are_seen(vit: nn.Module, images: Tensor, training: bool) -> None:
    vit.blocks[0] = Checkpointed(vit.blocks[0])
    uora.inject(vit.train(training), rank=8)
    before = snapshot(vit)
    with pytest.raises(uora.DeadAdapterError, match=r"6 of 12 .* not as the model trains: blocks.0.block.attn.qkv.q"):
        uora.verify(vit, images)
    assert_same(before, vit)


def test_checkpoints_whose_inputs_need_gradients_pass(vit: nn.Module, images: Tensor) -> None:
    vit.blocks[0] = Checkpointed(vit.blocks[0])
    vit.patch_embed.register_forward_hook(lambda m, x, y: y.requires_grad_())
    assert uora.verify(uora.inject(vit.train(), rank=8), images)


@pytest.mark.slow
def test_layers_that_chance_leaves_out_are_tried_again(vit: nn.Module, images: Tensor) -> None:
    class Skips(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return x if self.training and torch.rand(()) < 0.5 else self.block(x)

    vit.blocks = nn.Sequential(*map(Skips, vit.blocks))
    model = uora.inject(vit.train(), rank=8)
    for seed in range(4):
        torch.manual_seed(seed)
        assert len(uora.verify(model, images)) == 12


def test_a_hook_that_takes_the_gradient_away_is_seen(vit: nn.Module, images: Tensor) -> None:
    uora.inject(vit, rank=8)
    uora.adapters(vit)["blocks.1.mlp.fc1"].d.register_hook(torch.zeros_like)
    with pytest.raises(uora.DeadAdapterError, match=r"1 of 12 .*blocks.1.mlp.fc1.fc1"):
        uora.verify(vit, images)


def test_statistics_and_optimizers_in_the_backward_pass_are_left_alone(vit: nn.Module, images: Tensor) -> None:
    vit.blocks[1].mlp.norm = nn.BatchNorm1d(65)
    uora.inject(vit.train(), rank=8)
    optimizer = torch.optim.SGD(vit.head.parameters(), lr=1.0)
    vit.head.weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    before, stored = snapshot(vit), {n: b.clone() for n, b in vit.named_buffers()}
    uora.verify(vit, images)
    assert_same(before, vit)
    assert all(torch.equal(b, stored[n]) for n, b in vit.named_buffers())
    vit(images).sum().backward()
    assert not torch.equal(vit.head.weight, before["state"]["head.weight"])


def test_a_model_that_needs_more_to_train_is_seen_in_evaluation_mode_and_said_so(
    vit: nn.Module, images: Tensor
) -> None:
    class Wants(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training, "labels please"
            return x

    vit.norm = nn.Sequential(vit.norm, Wants())
    uora.inject(vit.train(), rank=8)
    with pytest.warns(uora.UoraWarning, match="evaluation mode alone.*labels please"):
        assert len(uora.verify(vit, images)) == 12


def test_heads_that_do_not_train_are_named(vit: nn.Module, images: Tensor) -> None:
    uora.inject(vit, rank=8)
    vit.head.bias.requires_grad_(False)
    with pytest.warns(uora.UoraWarning, match="of 2 trained parts of the base 1 would not .*: head.bias is frozen"):
        uora.verify(vit, images)
    vit.forward_head = lambda x: x
    with pytest.warns(uora.UoraWarning, match="head.weight gets no gradient; head.bias is frozen"):
        uora.verify(vit, images)


def test_a_head_that_trains_is_not_spoken_of(vit: nn.Module, images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uora.verify(uora.inject(vit, rank=8), images)
