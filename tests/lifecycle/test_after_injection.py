"""What people do to a model around adapters: prune it, give it another head, trace it, spread it over devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import timm
import torch
import torchvision
from accelerate.hooks import remove_hook_from_module
from conftest import SMALL, outputs, small_vit, wake
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from training import assert_all_train, assert_same

import uora_vision as uora

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def two(make: Callable[[], nn.Module] = small_vit) -> nn.Module:
    """A model with "a" and "b", which is active."""
    model = wake(uora.inject(make(), rank=4, name="a"), seed=1)
    return wake(uora.inject(model, rank=4, name="b"), seed=2)


class TestPruning:
    def pruned(self, model: nn.Module) -> nn.Module:
        model.prune_intermediate_layers([1], prune_norm=False, prune_head=True)
        return model

    def test_what_is_left_computes_as_before(self, tmp_path: Path) -> None:
        model = wake(uora.inject(small_vit(depth=4), rank=4))
        (before,) = model.forward_intermediates(X, indices=[1], intermediates_only=True)
        (after,) = self.pruned(model).forward_intermediates(X, indices=[1], intermediates_only=True)
        assert torch.equal(before, after) and len(uora.adapters(model)) == 8
        assert_all_train(model, model.forward_features(X))
        uora.save(model, tmp_path)
        other = uora.load(self.pruned(small_vit(depth=4)), tmp_path)
        assert_same(other.forward_features(X), model.forward_features(X))
        uora.merge(model)
        assert_same(other.forward_features(X), model.forward_features(X))

    def test_an_adapter_whose_head_is_gone_is_named(self) -> None:
        model = self.pruned(two(lambda: small_vit(depth=4)))
        before = outputs(model, X)
        with pytest.raises(uora.StateError, match=r"an adapter trains head\.\w+ of the base, which this VisionTrans"):
            uora.activate(model, "a")
        assert uora.active_adapter(model) == "b" and torch.equal(outputs(model, X), before)
        with uora.disabled(model):
            assert not torch.equal(outputs(model, X), before)
        assert torch.equal(outputs(model, X), before)
        uora.delete(model, "a")


class TestAnotherHead:
    def test_a_new_classifier_is_the_active_adapter_s(self, tmp_path: Path) -> None:
        model = two()
        first = outputs(model, X)
        model.reset_classifier(11)
        nn.init.normal_(model.head.weight)
        after = outputs(model, X)
        assert after.shape == (2, 11) and model.head.weight.requires_grad
        uora.activate(model, "a")
        assert outputs(model, X).shape == (2, 7)
        uora.activate(model, "b")
        assert torch.equal(outputs(model, X), after)
        with uora.disabled(model):
            assert_same(outputs(model, X), outputs(small_vit(), X))
        assert torch.equal(outputs(model, X), after)
        assert not torch.equal(after[:, :7], first)
        held = [p for group in uora.param_groups(model, lr=1.0) for p in group["params"]]
        assert any(p is model.head.weight for p in held)
        uora.save(model, tmp_path)
        other = small_vit()
        other.reset_classifier(11)
        assert_same(outputs(uora.load(other, tmp_path), X), after)

    def test_no_classifier(self, tmp_path: Path) -> None:
        model = wake(uora.inject(small_vit(), rank=4))
        model.reset_classifier(0)
        after = outputs(model, X)
        assert after.shape == (2, 64)
        with uora.disabled(model):
            assert outputs(model, X).shape == (2, 64)
        assert torch.equal(outputs(model, X), after)
        uora.save(model, tmp_path)
        other = small_vit()
        other.reset_classifier(0)
        assert_same(outputs(uora.load(other, tmp_path), X), after)


EXTRACTED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "torchvision's ViT": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32),
        "encoder.layers.encoder_layer_1.add_1", "encoder.layers.encoder_layer_1",
    ),
    "ConvNeXt": (lambda: torchvision.models.convnext_tiny(num_classes=3), "features.1", "features.1"),
    "timm's ViT": (small_vit, "blocks.1.add_1", "blocks.1"),
}  # fmt: skip


class TestFeatureExtractor:
    @pytest.mark.parametrize("name", EXTRACTED)
    def test_features_are_those_of_the_adapted_model(self, name: str) -> None:
        make, node, path = EXTRACTED[name]
        torch.manual_seed(0)
        model = make().eval()
        seen: list[Tensor] = []
        model.get_submodule(path).register_forward_hook(lambda *given: seen.append(given[2]))
        model(X)
        plain = seen[0]
        wake(uora.inject(model, rank=4, targets="*"))
        extractor = create_feature_extractor(model, [node])
        seen.clear()  # of what stands for a tensor while tracing
        model(X)
        (found,) = extractor(X).values()
        assert_same(found, seen[0])
        assert not torch.allclose(found, plain, atol=1e-3)
        found.sum().backward()
        assert sum(a.b.grad is not None for a in uora.adapters(model).values()) >= 2
        with torch.no_grad():  # no part of an adapter is a constant of the graph
            for adapter in uora.adapters(model).values():
                adapter.b.mul_(0.5)
        seen.clear()
        model(X)
        assert_same(next(iter(extractor(X).values())), seen[0])

    @pytest.mark.slow
    def test_a_weight_that_is_read_is_refused(self) -> None:
        model = uora.inject(torchvision.models.swin_t(), rank=4)
        with pytest.raises(uora.StateError, match=r"torch\.fx cannot trace a model that reads the weight"):
            create_feature_extractor(model, ["features.1"])
        uora.merge(model)
        create_feature_extractor(model.eval(), ["features.1"])


def on_devices(model: nn.Module) -> nn.Module:
    """As `device_map="auto"` puts a model on several devices: hooks on every layer."""
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def spread(model: nn.Module) -> nn.Module:
    for module in model.modules():  # what dispatch_model does for two devices, on one
        if next(module.parameters(recurse=False), None) is not None:
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu"))
    return model


def patched(model: nn.Module) -> nn.Module:
    """With a forward of its own on the instance of every Linear."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = (lambda own: lambda x: own(x) * 1.0)(module.forward)
    return model


class TestHooksOnInstances:
    @pytest.mark.parametrize("hook", [on_devices, spread, patched])
    def test_adapters_of_a_model_that_has_them(self, hook: Callable[[nn.Module], nn.Module]) -> None:
        base, want = outputs(small_vit(), X), outputs(wake(uora.inject(small_vit(), rank=4)), X)
        model = wake(uora.inject(hook(small_vit()), rank=4))
        assert_same(outputs(model, X), want)
        assert_all_train(model, model(X))
        with uora.disabled(model):
            assert_same(outputs(model, X), base)
        assert_same(outputs(model, X), want)
        uora.remove(model)
        assert_same(outputs(model, X), base)
        uora.merge(wake(uora.inject(model, rank=4)))
        assert_same(outputs(model, X), want)

    @pytest.mark.parametrize("hook", [on_devices, spread])
    def test_hooks_that_come_and_go_later(self, hook: Callable[[nn.Module], nn.Module]) -> None:
        base = outputs(small_vit(), X)
        model = wake(uora.inject(small_vit(), rank=4))
        want = outputs(model, X)
        assert_same(outputs(hook(model), X), want)
        with uora.disabled(model):
            assert_same(outputs(model, X), base)
        remove_hook_from_module(model, recurse=True)  # leaves a forward on every instance
        assert_same(outputs(model, X), want)
        uora.remove(model)
        assert_same(outputs(model, X), base)
        assert_same(outputs(wake(uora.inject(model, rank=4)), X), want)

    def test_offloaded_parameters_are_refused_by_name(self, tmp_path: Path) -> None:
        model = wake(uora.inject(small_vit(), rank=4))
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with pytest.raises(uora.StateError, match=r"b and d of blocks\.0\.attn\.qkv were offloaded"):
            model(X)
        model = small_vit()
        before = outputs(model, X)
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        with pytest.raises(uora.StateError, match=r"the weights of blocks\.0\.attn\.qkv are offloaded"):
            uora.inject(model, rank=4)
        assert torch.equal(outputs(model, X), before)


def test_a_model_on_meta_with_an_example_input() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    meta = X.to("meta")
    assert len(uora.plan(model, example_input=meta).projections) == len(uora.plan(small_vit()).projections)
    for call, given, words in (
        (uora.plan, X, "the model is on the meta device and the example input is not"),
        (uora.inject, X, "the model is on the meta device and the example input is not"),
        (uora.inject, meta, "a model on the meta device computes nothing"),
    ):
        with pytest.raises(uora.StateError, match=words):
            call(model, example_input=given, **({"rank": 4} if call is uora.inject else {}))
    assert not any("uora" in name for name, _ in model.named_modules())
    with pytest.raises(uora.StateError, match="the example input is on the meta device"):
        uora.verify(uora.inject(small_vit(), rank=4), meta)


def test_a_name_that_is_deleted_and_loaded_again_is_routed_anew(tmp_path: Path) -> None:
    model = two()
    other = wake(uora.inject(small_vit(), rank=4, name="b"), seed=9)
    uora.save(other, tmp_path)
    uora.activate(model, "a")
    with torch.no_grad(), uora.route(model, ["a", "b"]):
        old = model(X)
    uora.delete(model, "b")
    uora.load(model, tmp_path, name="b", activate=False)
    with torch.no_grad(), uora.route(model, ["a", "b"]):
        new = model(X)
        for change in (lambda: uora.delete(model, "b"), lambda: uora.activate(model, "b")):
            with pytest.raises(uora.StateError, match="a mixed batch is being routed"):
                change()
        assert torch.equal(model(X), new)
    assert_same(new[:1], old[:1])
    assert_same(new[1:], outputs(other, X)[1:])
    assert not torch.allclose(new[1], old[1], atol=1e-3)


def test_two_adapters_in_one_loss_with_checkpointing_are_refused_not_mixed_up() -> None:
    model = small_vit()
    model.set_grad_checkpointing(True)
    model.train()
    for seed, name in enumerate("ab"):
        wake(uora.inject(model, rank=4, name=name), seed=seed)
    loss = torch.zeros(())
    for name in "ab":
        uora.activate(model, name)
        loss = loss + model(X).square().sum()
    with pytest.raises(uora.StateError, match="a checkpoint is recomputed while another adapter is active"):
        loss.backward()
    for name in "ab":  # one after the other
        uora.activate(model, name)
        model(X).square().sum().backward()
        assert all(a.b.grad is not None and a.b.grad.any() for a in uora.adapters(model).values())
