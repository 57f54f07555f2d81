"""A share of what an adapter has learnt: weights between those of the base and the merged ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import kill, small_vit, wake
from torch import Tensor, nn
from torch.func import functional_call
from unchanged import assert_same, snapshot

import uora_vision as uora

IMAGES = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SHARES = (0.6, -0.5, 0.0, 2.0, 1e-3)


def trained(names: tuple[str, ...] = ("cats",), **options: object) -> nn.Module:
    """A float64 ViT with adapters as after training, redrawn rows, a head and norms of their own."""
    model = small_vit().double()
    for seed, name in enumerate(names):
        wake(uora.inject(model, name=name, rank=4 + seed, train=("head", "norm"), **options), seed=seed)  # type: ignore[arg-type]
        reinit = uora.Reinitializer(model, threshold=1e-3, scope="layer")
        kill(model, {layer: [seed, 3] for layer in reinit.layers[seed::2]})
        reinit.step()
        wake(model, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, p in model.named_parameters():
                if p.requires_grad and "uora" not in path:
                    p.add_(torch.randn(p.shape, generator=generator))
    return model


def between(share: float, *, model: nn.Module) -> Tensor:
    """Outputs of base + share * (merged - base), weight by weight."""
    base, merged = small_vit().double(), copy.deepcopy(model)
    uora.merge(merged)
    there = merged.state_dict()
    return functional_call(base, {k: w + share * (there[k] - w) for k, w in base.state_dict().items()}, (IMAGES,))


@torch.no_grad()
def test_weights_lie_between_the_base_and_what_was_learnt() -> None:
    model = trained()
    start, reference = snapshot(model), copy.deepcopy(model)
    before = 1.0
    for share in SHARES:
        assert uora.strength(model, share) == before
        before = share
        torch.testing.assert_close(model(IMAGES), between(share, model=reference), rtol=0, atol=1e-6)
    assert not torch.equal(model(IMAGES), reference(IMAGES))
    assert uora.strength(model, 1) == before
    assert_same(start, model)


@torch.no_grad()
def test_each_adapter_has_its_own_waiting_or_active_and_in_a_mixed_batch() -> None:
    names = ("cats", "dogs")
    model = trained(names)
    uora.activate(model, "dogs")
    uora.strength(model, 0.3, "cats")
    uora.strength(model, 0.7)
    alone = {}
    for name, share in zip(names, (0.3, 0.7), strict=True):
        uora.activate(model, name)
        assert uora.strength(model, share) == share
        alone[name] = model(IMAGES)
        merged = copy.deepcopy(model)
        uora.strength(merged, 1)
        uora.merge(merged, shares={name: share})
        torch.testing.assert_close(alone[name], merged(IMAGES), rtol=0, atol=1e-6)
    with uora.disabled(model):
        base = model(IMAGES)
    with uora.route(model, ["cats", "dogs", None]):
        mixed = model(IMAGES)
    expected = torch.stack([alone["cats"][0], alone["dogs"][1], base[2]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-9)


def test_a_file_has_the_adapter_as_it_is_then(tmp_path: Path) -> None:
    model = trained()
    uora.strength(model, 0.4)
    uora.save(model, tmp_path / "adapter")
    again = uora.load(small_vit().double(), tmp_path / "adapter")
    torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=0, atol=1e-9)
    assert uora.strength(again, 0.4) == 1


@torch.no_grad()
def test_what_is_trained_at_another_strength_is_the_full_one_from_then_on() -> None:
    for change in ("blocks.1.attn.qkv.uora.b", "head.weight"):
        model = trained()
        uora.strength(model, 0.5)
        model.get_parameter(change).add_(1)
        start = snapshot(model)
        assert uora.strength(model, 0.0) == 1
        torch.testing.assert_close(model(IMAGES), small_vit().double()(IMAGES), rtol=0, atol=1e-9)
        uora.strength(model, 1.0)
        assert_same(start, model)


@torch.no_grad()
def test_a_base_in_bfloat16_and_a_cast_come_back_to_the_bit() -> None:
    model = wake(uora.inject(small_vit().bfloat16(), rank=4, train=("head", "norm")))
    model.head.weight.add_(1)
    uora.strength(model, 0.3)
    torch.testing.assert_close(model.head.weight, (small_vit().head.weight.bfloat16().float() + 0.3).bfloat16())
    with pytest.warns(uora.UoraWarning, match="cast to"):
        model.bfloat16()
    assert uora.strength(model, 1) == 0.3
    learnt = wake(uora.inject(small_vit(), rank=4))
    for path, adapter in uora.adapters(learnt).items():
        assert torch.equal(uora.adapters(model)[path].b, adapter.b.bfloat16())
    assert torch.equal(model.head.weight, small_vit().head.weight.bfloat16() + 1)


def test_mistakes_change_nothing() -> None:
    model = trained(("cats", "dogs"))
    start = snapshot(model)
    for share in (float("nan"), float("inf"), "0.5", None, torch.tensor(0.5)):
        with pytest.raises(uora.ConfigError, match="the strength must be a finite number"):
            uora.strength(model, share)  # type: ignore[arg-type]
    with pytest.raises(uora.StateError, match="no adapter 'cat'"):
        uora.strength(model, 0.5, "cat")
    with uora.disabled(model), pytest.raises(uora.StateError, match="disabled"):
        uora.strength(model, 0.5, "cats")
    with uora.route(model, ["cats", "dogs"]), pytest.raises(uora.StateError, match="routed"):
        uora.strength(model, 0.5, "cats")
    with pytest.raises(uora.StateError, match="no adapter"):
        uora.strength(small_vit(), 0.5)
    assert_same(start, model)
    model.patch_embed.proj.bias.requires_grad_(True)
    with pytest.raises(uora.StateError, match="trains, but not as a part"):
        uora.strength(model, 0.5)
    other = uora.inject(small_vit(), rank=4)
    other.reset_classifier(5)
    with pytest.raises(uora.StateError, match=r"shape \(5, 64\)"):
        uora.strength(other, 0.5)
