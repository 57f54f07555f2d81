"""open_clip's own ways to run a tower: masks, layouts, half types, checkpointing, locking, custom text towers."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from conftest import merged, wake
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock, Transformer
from proof.zoo import entries
from torch import Tensor, nn

import uora_vision as uora


def clip(name: str = "ViT-S-32") -> tuple[nn.Module, Any]:
    (entry,) = entries(f"open_clip/{name}")
    model, example = entry.real()
    # torch sums a product in another order where a factor may need a gradient.
    return model.requires_grad_(False), example


def features(model: nn.Module, example: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(example[0]), model.encode_text(example[1])


def merged_agrees(model: nn.Module, run: Any, tolerance: float = 1e-4) -> None:
    """What an awake model computes, the merged one computes."""
    before = run(model)
    after = run(merged(model))
    torch.testing.assert_close(after, before, rtol=tolerance, atol=tolerance * before.float().abs().max().item())


def test_both_towers_are_adapted_and_move_their_own_features() -> None:
    model, example = clip()
    image, text = features(model, example)
    uora.inject(model, rank=4)
    for side, moved in (("visual.*", 0), ("transformer.*", 1)):
        with torch.no_grad():
            for name, adapter in uora.adapters(model).items():
                adapter.b.zero_() if side.split(".")[0] != name.split(".")[0] else adapter.b.normal_()
        now = features(model, example)
        assert [not torch.equal(a, b) for a, b in zip(now, (image, text), strict=True)] == [moved == 0, moved == 1]


def test_one_tower_or_the_last_blocks() -> None:
    model, _ = clip()
    visual = {p.path.split(".")[0] for p in uora.plan(model, targets="visual.transformer.*").projections}
    assert visual == {"visual"}
    last = uora.plan(model, blocks=[-1]).projections
    assert {p.path.split(".resblocks.")[0] for p in last} == {"transformer"}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "float", "boolean"])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_with_every_mask_and_layout(batch_first: bool, mask: str, need_weights: bool, grad: bool) -> None:
    block = ResidualAttentionBlock(16, 2, batch_first=batch_first).eval()
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    masks = {"none": None, "boolean": causal, "float": torch.zeros(5, 5).masked_fill(causal, float("-inf"))}
    x = torch.randn(2, 5, 16) if batch_first else torch.randn(5, 2, 16)
    wake(uora.inject(block, rank=4), 3.0)

    def run(model: nn.Module) -> Tensor:
        with torch.set_grad_enabled(grad):
            out, weights = model.attn(x, x, x, need_weights=need_weights, attn_mask=masks[mask])
        assert (weights is not None) == need_weights
        return out.detach()

    merged_agrees(block, run)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_of_either_layout_trains(batch_first: bool) -> None:
    model = Transformer(16, 2, 2, batch_first=batch_first)
    x = torch.randn(3, 5, 16)
    uora.inject(model, rank=4)
    assert len(uora.verify(model, x)) == 2 * 6
    wake(model, 3.0)
    merged_agrees(model, lambda m: m(x).detach())


def test_an_attention_pool_with_weights_apart() -> None:
    pool = AttentionalPooler(16, 24, n_head=2, n_queries=3).eval()
    x = torch.randn(2, 5, 24)
    found = {p.tensor: [r.name for r in p.roles] for p in uora.plan(pool).projections}
    assert found == {"q_proj_weight": ["q"], "k_proj_weight": ["k"], "v_proj_weight": ["v"], "weight": ["proj"]}
    uora.verify(uora.inject(pool, rank=4), x)
    wake(pool, 3.0)
    merged_agrees(pool, lambda m: m(x).detach())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_converted_to_a_half_type(dtype: torch.dtype) -> None:
    model, (images, tokens) = clip()
    open_clip.model.convert_weights_to_lp(model, dtype)
    with pytest.warns(UserWarning, match=r"stored in a half type.*Keep the base in float32"):
        uora.inject(model, rank=4)
    base = features(model, (images.to(dtype), tokens))
    assert len(uora.verify(model, (images.to(dtype), tokens))) == len(uora.Reinitializer(model).layers)
    wake(model, 10.0)
    awake = features(model, (images.to(dtype), tokens))
    uora.merge(model)
    for b, a, m in zip(base, awake, features(model, (images.to(dtype), tokens)), strict=True):
        assert a.dtype == dtype and (a - m).norm() < 0.05 * m.norm() < (a - b).norm()


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    model, example = clip()
    wake(uora.inject(model, rank=4)).train()
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        image, text, _ = model(*example)
        vectors = [p for a in uora.adapters(model).values() for p in (a.b, a.d)]
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad((image * text).sum(), vectors)]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6 * grads[0].abs().max().item())


def test_locked_towers_keep_their_adapters_training() -> None:
    model, example = clip()
    uora.inject(model, rank=4)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and all(".uora" in n for n in trains), "CLIP has no head to train"
    assert uora.verify(model, example)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coca_base", "ViT-B-16-SigLIP", "RN50", "nllb-clip-base"])
def test_other_kinds_of_models(name: str) -> None:
    model, example = clip(name)
    uora.verify(uora.inject(model, rank=4), example)


@pytest.mark.slow
def test_the_loss_of_a_step_falls() -> None:
    model, (images, tokens) = clip()
    uora.inject(model, rank=8)
    optimizer = torch.optim.AdamW(uora.param_groups(model, lr=0.05))
    loss_fn, losses = open_clip.ClipLoss(), []
    for _ in range(12):
        image, text, scale = model(images, tokens)
        loss = loss_fn(image, text, scale)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
