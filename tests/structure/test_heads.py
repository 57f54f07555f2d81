"""What looks new trains wholly, or is named with the option that trains it; nothing of it is frozen in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_vit
from torch import Tensor, nn

import uora_vision as uora


def said_of(model: nn.Module, **options: Any) -> list[str]:
    """Inject, and give what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        uora.inject(model, rank=4, **options)
    assert all(w.category is uora.UoraWarning for w in said)
    return [str(w.message) for w in said]


def trained(model: nn.Module, path: str) -> bool:
    found = [p.requires_grad for n, p in model.named_parameters() if n.startswith(f"{path}.") or n == path]
    adapted = any(path == name or name.startswith(f"{path}.") for name in uora.adapters(model))
    return bool(found) and all(found) and not adapted


class Around(nn.Module):
    """A backbone of timm, and parts around it."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.backbone = small_vit(num_classes=0)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 5)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "classifier2": lambda: nn.Linear(64, 5),
    "projector": lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 16)),
    "decode_head": lambda: nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 3, 1)),
    "mlp": Two,
    "neck": lambda: nn.ModuleList([nn.Conv2d(64, 8, 3), nn.BatchNorm2d(8)]),
    "pooler": lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh()),
    "deep": lambda: nn.ModuleDict({"inner": nn.Sequential(nn.LayerNorm(64), Two())}),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("nested", [False, True])
def test_what_stands_around_a_backbone_trains_wholly(name: str, nested: bool) -> None:
    model: nn.Module = Around(**{name: PARTS[name]()})
    path = name
    if nested:
        model, path = nn.Sequential(model), f"0.{name}"
    assert path in uora.plan(model, rank=4).trained
    assert said_of(model) == [] and trained(model, path)
    rates = {id(p): g["lr"] for g in uora.param_groups(model, lr=1.0, head_lr=2.0) for p in g["params"]}
    assert all(rates[id(p)] == 2.0 for n, p in model.named_parameters() if n.startswith(path))
    assert any(name.endswith("backbone.blocks.0.attn.qkv") for name in uora.adapters(model))


def test_bare_parameters_around_a_backbone_train() -> None:
    model = Around()
    model.prototypes = nn.Parameter(torch.randn(5, 64))
    assert said_of(model) == [] and trained(model, "prototypes")


def test_the_head_of_a_model_inside_a_wrapper_trains() -> None:
    model = nn.Sequential(small_vit(), nn.Linear(7, 2))
    assert said_of(model) == [] and trained(model, "0.head") and trained(model, "1")


def test_what_was_frozen_on_purpose_stays_frozen() -> None:
    model = Around(fixed=nn.Linear(64, 5).requires_grad_(False), teacher=small_vit().requires_grad_(False))
    assert said_of(model) == []
    assert not any(p.requires_grad for p in model.fixed.parameters())
    assert not model.teacher.head.weight.requires_grad


def test_what_was_frozen_with_all_else_trains() -> None:
    model = Around(top=nn.Linear(64, 5)).requires_grad_(False)
    assert said_of(model) == [] and trained(model, "top")


def test_a_decoder_with_attention_is_named_with_the_option_that_trains_it() -> None:
    decoder = nn.TransformerDecoderLayer(64, 2, 128)
    model = Around(decoder=decoder, second=copy.deepcopy(decoder))
    what = uora.plan(model, rank=4)
    assert what.new == ("decoder", "second") and what.to_dict()["new"] == ["decoder", "second"]
    (text,) = said_of(model)
    assert "decoder, second" in text and "train=('head', 'decoder', 'second')" in text
    assert text in str(what) and text in str(uora.summary(model))
    model = Around(decoder=nn.TransformerDecoderLayer(64, 2, 128))
    assert said_of(model, train=("head", "decoder")) == [] and trained(model, "decoder")
    assert "may be new" not in str(uora.summary(model))


class Own(nn.Module):
    """A model that nobody knows, with a last part of some name."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.blocks = nn.ModuleList(small_vit().blocks)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.embed(x))


@pytest.mark.parametrize("name", PARTS)
def test_what_comes_after_the_last_block_of_an_unknown_model_is_named(name: str) -> None:
    model = Own(**{name: PARTS[name]()})
    new = uora.plan(model, rank=4).new
    assert new and all(path.startswith(name) for path in new)
    (text,) = said_of(model)
    assert name in text and not any(path.startswith(name) for path in uora.adapters(model))
    model = Own(**{name: PARTS[name]()})
    assert said_of(model, train=("head", name)) == [] and trained(model, name)


def test_a_part_of_a_customary_name_and_train_nothing_are_silent() -> None:
    assert said_of(Own(head=nn.Linear(64, 5))) == []
    assert said_of(Own(out=nn.Linear(64, 5)), train=()) == []


def test_train_takes_paths_patterns_and_parameters(vit: nn.Module) -> None:
    uora.inject(vit, rank=4, train=("patch_embed", "blocks.*.norm1", "cls_token", "blocks.1.attn.proj"))
    on = {n for n, p in vit.named_parameters() if p.requires_grad and "uora" not in n}
    assert on == {
        "cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "blocks.1.attn.proj.weight",
        "blocks.1.attn.proj.bias", *(f"blocks.{i}.norm1.{k}" for i in range(2) for k in ("weight", "bias")),
    }  # fmt: skip
    assert "blocks.1.attn.proj" not in uora.adapters(vit) and "blocks.0.attn.proj" in uora.adapters(vit)
    groups = {g["name"]: len(g["params"]) for g in uora.param_groups(vit, lr=1.0, head_lr=2.0)}
    assert groups["head"] + groups["head_vectors"] == len(on) and "base" not in groups


def test_what_train_names_must_be_there() -> None:
    with pytest.raises(uora.TargetError, match=r"train='decoder' is neither head, norm, bias .* there are net.decoder"):
        wrapped = nn.ModuleDict({"net": nn.ModuleDict({"decoder": nn.Linear(2, 2), "blocks": small_vit()})})
        uora.plan(wrapped, rank=4, train="decoder")


def test_trained_paths_are_saved_and_loaded(tmp_path: Path, images: Tensor) -> None:
    make = lambda: nn.Sequential(small_vit(num_classes=0), nn.Linear(64, 5))  # noqa: E731
    model = uora.inject(make(), rank=4, train=("1", "0.patch_embed"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    uora.save(model, tmp_path)
    assert torch.equal(uora.load(make(), tmp_path).eval()(images), model.eval()(images))


def test_a_plan_prints_the_path_of_all_that_is_left(vit: nn.Module) -> None:
    text = str(uora.plan(vit, rank=4, targets="attention"))
    for path in ("patch_embed.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2", "head"):
        assert path in text
    assert "Trains wholly: head." in text


def test_models_of_timm_have_nothing_new() -> None:
    assert uora.plan(small_vit(), rank=4).new == uora.plan(small_vit(num_classes=0), rank=4).new == ()


def test_a_head_inside_a_tower_is_a_part_of_the_base() -> None:
    """SigLIP's vision tower pools by attention under the name `head`."""
    from transformers import SiglipConfig, SiglipModel

    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(text_config=size | {"vocab_size": 50}, vision_config=size | {"image_size": 32})
    what = uora.plan(SiglipModel(config), rank=4)
    assert "vision_model.head.attention.in_proj_weight" in {p.path for p in what.projections}
    assert not any(path.startswith("vision_model") for path in what.trained)
