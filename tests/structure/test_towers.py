"""One bank set for all towers of a multimodal model, and for any number of models with the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from conftest import merged, small_vit, wake
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.lifecycle.adapter import Adapter


def clip() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(
            embed_dim=24,
            vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
            text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=40, width=48, heads=2, layers=2),
        ).eval()


def llava() -> nn.Module:
    """A LLaVA of 0.1M parameters: a CLIP tower of width 32, a Llama of width 64, 4 image tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                patch_size=8, projection_dim=32,
            ),
            text_config=transformers.LlamaConfig(
                vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            ),
            image_token_id=59, vision_feature_layer=-1, image_seq_length=4,
        )  # fmt: skip
        return transformers.LlavaForConditionalGeneration(config).eval()


def llava_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 59, (2, 6), generator=generator)
    ids = torch.cat([torch.full((2, 4), 59), text], dim=1)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "pixel_values": images, "labels": ids.masked_fill(ids == 59, -100)}


def towers(model: nn.Module, *prefixes: str) -> list[dict[str, Adapter]]:
    found = uora.adapters(model)
    parts = [{name: a for name, a in found.items() if name.startswith(prefix)} for prefix in prefixes]
    assert sum(map(len, parts)) == len(found)
    return parts


def test_both_towers_of_a_clip_use_one_bank_set() -> None:
    model = uora.inject(clip(), rank=8, seed=3)
    image, text = towers(model, "visual.", "transformer.")
    assert len(image) == len(text) == 2 * 4
    assert len({id(a.bank) for a in (*image.values(), *text.values())}) == 1
    widths = {32, 48, 4 * 32, 4 * 48}
    assert set(model.uora.matrices) == {f"{side}{w}" for side in "AB" for w in widths}


@pytest.mark.parametrize("layout", ["shape", "slice"])
def test_the_same_seed_serves_other_models_with_the_same_matrices(layout: str) -> None:
    first = uora.inject(small_vit(embed_dim=64), rank=8, seed=3, layout=layout)
    second = uora.inject(small_vit(embed_dim=64, depth=3, num_heads=4), rank=8, seed=3, layout=layout)
    other = uora.inject(small_vit(embed_dim=64), rank=8, seed=4, layout=layout)
    for side in ("a", "b"):
        same = [getattr(m.uora, side)(64) for m in (first, second, other)]
        assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_a_llava_is_adapted_as_a_whole_by_one_call() -> None:
    model = uora.inject(llava(), rank=8, train=(), example_input=llava_batch())
    image, text = towers(model, "model.vision_tower.", "model.language_model.")
    # The last block of the tower feeds the projector here; all six projections of both blocks train.
    assert len(image) == 2 * 6 and len(text) == 2 * 7
    assert len({id(a.bank) for a in uora.adapters(model).values()}) == 1


def step(model: nn.Module, reinit: uora.Reinitializer | None, optimizer: torch.optim.Optimizer) -> float:
    loss = model(**llava_batch()).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if reinit is not None:
        reinit.step()
    return loss.item()


@pytest.mark.slow
def test_adapters_of_both_towers_of_a_llava_train_together_and_come_back(tmp_path: Path) -> None:
    model = uora.inject(llava(), rank=8, train=())
    image, text = towers(model, "model.vision_tower.", "model.language_model.")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(uora.param_groups(model, lr=0.1))
    reinit = uora.Reinitializer(model, optimizer=optimizer, threshold=0.05, relative=True)
    losses = [step(model, reinit, optimizer) for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0] and reinit.firings > 0
    assert all(a.b.abs().max() > 0.01 for part in (image, text) for a in part.values())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    uora.save(model, tmp_path)
    again = uora.load(llava(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**llava_batch()).logits, model(**llava_batch()).logits)


@pytest.mark.parametrize("tower", ["model.vision_tower", "model.language_model"])
def test_one_tower_can_be_adapted_and_the_other_left(tower: str) -> None:
    model = uora.inject(llava(), rank=8, targets=f"{tower}.*", train=())
    assert all(name.startswith(tower) for name in uora.adapters(model))
    base, batch = llava(), llava_batch()
    with torch.no_grad():
        want, got = base(**batch).logits, wake(model)(**batch).logits
        assert (got - want).abs().max() > 1e-3
        assert (merged(model)(**batch).logits - got).abs().max() < 1e-4


@pytest.mark.parametrize("make", [clip, llava])
def test_a_plan_counts_all_towers(make: Callable[[], nn.Module]) -> None:
    model = make()
    plan = uora.plan(model, rank=8)
    want = sum(role.rows + 8 for p in plan.projections for role in p.roles)
    uora.inject(model, rank=8, train=())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == want
