"""What cannot be adapted is refused by name before anything changes, and only if it was to be adapted."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import transformers
from conftest import small_vit, wake
from refusals import QKV, adapted, refusal, refused
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.structure import rules


class TestSharing:
    @pytest.mark.slow
    def test_one_parameter_in_two_modules(self) -> None:
        model = small_vit()
        model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
        refused(model, uora.StateError, "blocks.0.attn.qkv is shared with blocks.1.attn.qkv.weight", "clone()")
        refused(model, uora.StateError, "blocks.1.attn.qkv is shared with blocks.0.attn.qkv.weight", blocks=[1])

    def test_two_parameters_in_one_storage(self) -> None:
        model = small_vit()
        model.blocks[1].norm1.weight = nn.Parameter(model.blocks[0].attn.proj.weight.detach()[3])
        refused(model, uora.StateError, "blocks.0.attn.proj is shared with blocks.1.norm1.weight")
        assert len(adapted(model, None, exclude="blocks.0.attn.proj")) == 7

    def test_also_on_the_meta_device(self) -> None:
        model = small_vit().to("meta")
        assert len(uora.plan(model).projections) == 8
        model.blocks[1].attn.proj.weight = nn.Parameter(model.blocks[0].attn.proj.weight.detach())
        refused(model, uora.StateError, "blocks.0.attn.proj is shared with blocks.1.attn.proj.weight")

    def test_parts_of_one_storage_side_by_side_are_not_shared(self, images: Tensor) -> None:
        model = small_vit()
        weights = [model.blocks[i].attn.proj for i in range(2)]
        flat = torch.cat([m.weight.detach().flatten() for m in weights])
        for m, part in zip(weights, flat.split(64 * 64), strict=True):
            m.weight = nn.Parameter(part.view(64, 64))
        assert len(adapted(model, images)) == 8

    def test_ties_between_weights_that_are_left_are_no_obstacle(self) -> None:
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert len(adapted(model, None)) == 4

    def test_one_module_in_two_places_is_not_a_shared_weight(self, images: Tensor) -> None:
        model = small_vit()
        model.blocks[1].mlp = model.blocks[0].mlp
        assert len(adapted(model, images)) == 6


class TestDevices:
    def test_wholly_on_meta_works(self) -> None:
        model = uora.inject(small_vit().to("meta"), rank=4)
        assert uora.summary(model).adapter_parameters == uora.plan(small_vit(), rank=4).parameters
        assert all(p.is_meta for p in model.parameters())

    @pytest.mark.parametrize("path", [QKV, "blocks.0", "patch_embed", "head"])
    def test_partly_on_meta(self, path: str) -> None:
        model = small_vit()
        model.get_submodule(path).to("meta")
        with refusal(model, uora.StateError, f"{path}.", "meta", "load_state_dict"):
            uora.inject(model)
        assert len(uora.plan(model).projections) == 8  # transformers builds some models so

    def test_mixed(self, other_device: str) -> None:
        model = small_vit()
        model.get_submodule(QKV).to(other_device)
        refused(model, uora.StateError, f"{QKV} is on {other_device}", "blocks.0.attn.qkv on cpu", "one device")
        assert len(uora.plan(model, exclude=QKV).projections) == 7

    @pytest.mark.parametrize("kind", ["head", "mlp"])
    def test_lazy(self, kind: str) -> None:
        model, path = small_vit(), {"head": "head", "mlp": "blocks.0.mlp.fc1"}[kind]
        model.set_submodule(path, nn.LazyLinear(256))
        refused(model, uora.StateError, f"weight of {path}", "batch")


@pytest.fixture(scope="module")
def other_device() -> str:
    """A device that is not the CPU: torch's lazy one on machines that have no other."""
    if torch.cuda.is_available():
        return "cuda:0"
    from torch._lazy import ts_backend

    ts_backend.init()
    return "lazy:0"


class TestTypes:
    def test_a_half_base_beside_single_norms_is_fine(self, images: Tensor) -> None:
        model = small_vit(depth=1)
        mixed(model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2)
        with torch.no_grad():
            base = model(images)
            uora.inject(model, rank=4, targets="mlp")
            assert (model(images) - base).abs().max() < 1e-2 < (wake(model)(images) - base).abs().max()

    @pytest.mark.parametrize("half", ["fc1", "fc2"])
    def test_two_types_among_the_adapted_compute_what_one_does(self, half: str, images: Tensor) -> None:
        """Whichever of them comes first."""
        model = small_vit(depth=1)
        mixed(getattr(model.blocks[0].mlp, half))
        exact = copy.deepcopy(model).double()
        for each in (model, exact):
            wake(uora.inject(each, rank=4, targets="mlp"))
        wanted = exact(images.double())
        base = uora.remove(exact)(images.double())
        error = (model(images) - wanted).abs().max()
        assert error < 0.02 * (wanted - base).abs().max()
        uora.merge(model)
        assert model.blocks[0].mlp.get_submodule(half).weight.dtype == torch.bfloat16
        assert (model(images) - wanted).abs().max() < 0.05 * (wanted - base).abs().max()


def mixed(*modules: nn.Module) -> None:
    """Store these in bfloat16, in a model that computes in float32 around them."""
    for module in modules:
        module.bfloat16()
        module.register_forward_pre_hook(lambda m, args: (args[0].to(m._parameters["weight"].dtype),))
        module.register_forward_hook(
            lambda m, args, out: out.to(torch.float64 if out.dtype.itemsize > 4 else torch.float32)
        )


class TestFreezing:
    def test_complex_parameters_too_and_back(self) -> None:
        model = small_vit()
        model.blocks[0].filter = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        uora.inject(model, rank=4)
        assert not model.blocks[0].filter.requires_grad
        assert uora.remove(model).blocks[0].filter.requires_grad


class Volume(nn.Module):
    """A weight of five dimensions that no layer of torch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Parameter(torch.randn(2, 3, 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cells.sum()


class Ensemble(nn.Linear):
    """Two weights in one, (2, out, in)."""

    def __init__(self) -> None:
        super().__init__(64, 32)
        self.weight = nn.Parameter(torch.randn(2, 32, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.weight)


class TestPaths:
    """A target that names what is there but is no projection is answered with what it is."""

    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("blocks.0.extra", "is a Volume with cells (2, 3, 4, 4, 4). Adapters go on"),
            ("blocks.0.extra.cells", "is cells of a Volume, of shape (2, 3, 4, 4, 4). Adapters go on"),
            ("blocks.0.norm1", "is a LayerNorm with weight (64,), bias (64,)"),
            ("blocks.0.attn.qkv.bias", "is bias of a Linear, of shape (192,)"),
            ("blocks.0.attn.qkv.weight", "is the weight of a projection that goes by 'blocks.0.attn.qkv'"),
            ("blocks.0.attn", "is a Attention, not a weight; 'blocks.0.attn.*' adapts all that is in it"),
            ("blocks.0.mlp.act", "is a GELU with no parameter of its own"),
            ("head", "(Linear, 7 x 64) is never adapted: part of the head"),
            ("pos_embed", "is pos_embed of a VisionTransformer, of shape (1, 65, 64)"),
        ],
    )
    def test_what_is_there(self, path: str, words: str) -> None:
        model = small_vit()
        model.blocks[0].extra = Volume()
        refused(model, uora.TargetError, f"'{path}' {words}", targets=path)
        refused(model, uora.TargetError, f"'{path}' {words}", targets=["mlp", path])

    def test_what_is_not_there_is_answered_with_the_roles(self) -> None:
        refused(small_vit(), uora.TargetError, "no projection matched 'blocks.0.extra'", targets="blocks.0.extra")

    @pytest.mark.parametrize("path", ["blocks.0.attn.qkv", "blocks.0.attn.qkv.v", "patch_embed.proj"])
    def test_projections_are(self, path: str) -> None:
        assert len(uora.plan(small_vit(), targets=path).projections) == 1

    def test_a_weight_of_other_dimensions_than_its_layer_has(self) -> None:
        model = small_vit()
        model.blocks[0].extra = Ensemble()
        refused(model, uora.TargetError, "blocks.0.extra (Ensemble)", "(2, 32, 64)", "2 dimensions", targets="other")
        assert len(uora.plan(model).projections) == 8

    @pytest.mark.parametrize("named", ["class", "name"])
    def test_a_registered_rule(self, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rules, "registered", OrderedDict())
        monkeypatch.setattr("uora_vision.structure.checks.registered", rules.registered)
        model = small_vit()
        model.blocks[0].extra = Volume()
        uora.register_rule(Volume if named == "class" else "Volume", {"cells": "cells"})
        refused(
            model, uora.TargetError, "registered for Volume names 'cells'", "blocks.0.extra is a Volume with cells (2,"
        )
        assert len(uora.plan(small_vit()).projections) == 8
