"""The zoo of models: it holds all of them, and builds them whole, alive and tame."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
pytest.importorskip("transformers")

from proof.zoo import Entry, call, entries  # noqa: E402

TRANSFORMERS = """
    llama mistral qwen2 qwen3 qwen3_moe gemma3 phi3 gpt2 gpt_neox opt bloom falcon falcon_multi_query falcon_new mpt
    mixtral deepseek_v3 gpt_oss olmo2 starcoder2 gptj codegen t5 bart mamba vit deit beit swin dinov2 dinov3_vit clip
    siglip siglip2 llava bert roberta deberta-v2
"""
CHEAP = ["timm/test_vit", "timm/test_resnet", "open_clip/ViT-S-32-alt", "transformers/gpt2"]


def one(name: str) -> Entry:
    (entry,) = entries(name)
    return entry


def outputs(value: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for part in (value.values() if isinstance(value, dict) else value) for t in outputs(part)]


@pytest.mark.parametrize(
    ("library", "names"),
    [("timm", timm.list_models()), ("open_clip", open_clip.list_models()), ("transformers", TRANSFORMERS.split())],
)
def test_no_model_is_left_out(library: str, names: list[str]) -> None:
    held = [entry.name for entry in entries(f"{library}/*")]
    assert sorted(held) == sorted(names)
    assert len(set(held)) == len(held)


def test_a_pattern_selects_by_library_and_name() -> None:
    assert [entry.name for entry in entries("transformers/falcon*")] == ["falcon", "falcon_multi_query", "falcon_new"]


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.slow
def test_a_real_model_is_alive_tame_and_the_same_each_time(name: str) -> None:
    model, example = one(name).real()
    again, _ = one(name).real()
    assert not model.training
    assert all(p.any() for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    found = outputs(call(model, example))
    assert all(t.isfinite().all() and t.abs().max() < 100 for t in found)
    generator = torch.Generator().manual_seed(0)
    torch.stack([(t * torch.randn(t.shape, generator=generator)).sum() for t in found]).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    model.train()
    for first, second in zip(outputs(call(model, example)), outputs(call(model, example)), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.slow
def test_a_deep_network_with_batch_norm_does_not_magnify_small_changes() -> None:
    model, images = one("timm/resnet50").real()
    with torch.no_grad():
        near = images + 1e-3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        here, there = model(images), model(near)
    assert 1e-4 < (here - there).std() / here.std() < 1e-2


@pytest.mark.parametrize(
    ("name", "millions"),
    [("timm/vit_7b_patch16_dinov3", 6716), ("open_clip/xlm-roberta-base-ViT-B-32", 366), ("transformers/llama", 6738)],
)
def test_a_model_on_meta_has_its_full_size(name: str, millions: int) -> None:
    model = one(name).meta()
    assert all(p.is_meta for p in model.parameters())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
