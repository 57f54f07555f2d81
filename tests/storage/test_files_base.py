"""An adapter and the base that it was made for: renamed, changed, another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import small_vit, trained
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision.storage.base import Base
from uora_vision.storage.folder import read_folder


class Wrapped(nn.Module):
    """A model inside another, as training code makes them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def renamed(model: nn.Module) -> nn.Module:
    """The ViT with its blocks under another name; its forward looks for them there."""
    model.add_module("layers", model.blocks)
    del model.blocks
    type(model).forward  # noqa: B018
    model.forward = lambda x: model.forward_head(model.norm(model.layers(model._pos_embed(model.patch_embed(x)))))
    return model


class TestRenamed:
    @pytest.mark.slow
    @pytest.mark.parametrize("scope", [None, "shared", "layer"])
    @pytest.mark.parametrize("how", [Wrapped, renamed])
    def test_blocks_and_roles_find_the_weights_of_renamed_modules(
        self, images: Tensor, tmp_path: Path, scope: str | None, how: Callable[[nn.Module], nn.Module]
    ) -> None:
        model = trained(scope=scope, train=("head", "norm"))
        with torch.no_grad():
            model.blocks[1].norm1.weight.mul_(3)
        uora.save(model, tmp_path / "a")
        moved = uora.load(how(small_vit()), tmp_path / "a")
        torch.testing.assert_close(moved(images), model(images))
        assert not set(uora.adapters(moved)) & set(uora.adapters(model))
        uora.save(moved, tmp_path / "b")
        for make in (lambda: how(small_vit()), small_vit):  # and back
            torch.testing.assert_close(uora.load(make(), tmp_path / "b")(images), model(images))

    def test_an_adapter_of_some_blocks(self, images: Tensor, tmp_path: Path) -> None:
        model = trained(blocks=[1])
        uora.save(model, tmp_path)
        torch.testing.assert_close(uora.load(Wrapped(small_vit()), tmp_path)(images), model(images))

    def test_a_trained_part_is_not_found_by_the_last_word_of_its_name_alone(self, tmp_path: Path) -> None:
        """`scores.weight` has the shape of `head.weight`, as many a matrix might; only `x.head.weight` is that head."""
        uora.save(trained(), tmp_path)
        model = renamed(small_vit())
        model.scores, model.head = model.head, nn.Identity()
        before = snapshot(model)
        with pytest.raises(uora.FormatError, match=r"trained head\.bias of shape \(7,\).* does not exist"):
            uora.load(model, tmp_path)
        assert_same(before, model)

    def test_what_is_ambiguous_is_refused(self, tmp_path: Path) -> None:
        class Two(nn.Module):  # both attentions have their q, k, v and proj in one block
            def __init__(self, first: str, second: str) -> None:
                super().__init__()
                block = nn.Module()
                for name in (first, second):
                    block.add_module(name, nn.MultiheadAttention(16, 2))
                self.blocks = nn.ModuleList([block])

        torch.manual_seed(0)
        uora.save(uora.inject(Two("a", "b"), rank=2), tmp_path)
        torch.manual_seed(0)
        model = Two("c", "d")
        before = snapshot(model)
        with pytest.raises(uora.FormatError, match=r"2 others there have its block and role 0/attn"):
            uora.load(model, tmp_path)
        assert_same(before, model)


class TestBase:
    @pytest.mark.parametrize("other", [lambda: small_vit(seed=1), lambda: perturbed(small_vit())])
    def test_other_weights_are_refused_unless_asked_for(
        self, tmp_path: Path, images: Tensor, other: Callable[[], nn.Module]
    ) -> None:
        uora.save(trained(), tmp_path)
        model = other()
        before = snapshot(model)
        with pytest.raises(uora.FormatError, match=r"made for other weights.*check_base=False"):
            uora.load(model, tmp_path)
        assert_same(before, model)
        assert uora.load(model, tmp_path, check_base=False) is model

    def test_the_head_and_what_was_trained_do_not_matter(self, tmp_path: Path) -> None:
        uora.save(trained(train=("head", "norm", "bias")), tmp_path)
        model = small_vit()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.startswith("head") or p.dim() == 1:
                    p.normal_()
        uora.load(model, tmp_path)

    @pytest.mark.parametrize("saved", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("loaded", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_copies_in_other_types_are_the_same_base(
        self, tmp_path: Path, saved: torch.dtype, loaded: torch.dtype
    ) -> None:
        uora.save(uora.inject(small_vit().to(saved), rank=4), tmp_path)
        uora.load(small_vit().to(loaded), tmp_path)
        with pytest.raises(uora.FormatError, match="other weights"):
            uora.load(small_vit(seed=3).to(loaded), tmp_path)

    def test_a_quantised_copy_is_the_same_base(self, tmp_path: Path) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        uora.save(uora.inject(small_vit(), rank=4), tmp_path)
        for seed in (0, 1):
            model = small_vit(seed=seed)
            quantize_(model, Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and name != "head")
            if seed == 0:
                assert uora.load(model, tmp_path) is model
            else:
                with pytest.raises(uora.FormatError, match="other weights"):
                    uora.load(model, tmp_path)

    def test_what_the_base_is_called_is_kept(self, tmp_path: Path) -> None:
        uora.save(trained(), tmp_path)
        assert read_folder(tmp_path).identity.name == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"

    def test_a_folder_of_the_writers_machine_is_not_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import ViTConfig, ViTModel

        model = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
        model.layernorm.weight.data[0] = 0.5
        monkeypatch.chdir(tmp_path)
        (tmp_path / "google" / "vit").mkdir(parents=True)
        for name, kept in (
            ("/home/me/models/vit", "vit"),
            ("/home/me/models/vit/", "vit"),
            ("google/vit", "vit"),
            ("/home/me/models/v\x1b[31mit", None),
            ("google/vit-base-patch16-224", "google/vit-base-patch16-224"),
        ):
            model.config._name_or_path = name
            assert Base(model).name == kept

    def test_weights_of_elsewhere_have_no_published_name(self, tmp_path: Path) -> None:
        made = timm.create_model("test_vit")
        assert Base(made).name is None and Base(made).architecture == "test_vit"
        made.norm.weight.data[0] = 0.5  # as after training
        assert Base(made).name == "timm/test_vit.r160_in1k"
        timm.models.save_for_hf(made, tmp_path / "mine")
        assert Base(timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)).name == "mine"
        torch.save(made.state_dict(), tmp_path / "weights.pth")
        overlay = {"file": str(tmp_path / "weights.pth")}
        other = timm.create_model("test_vit", pretrained=True, pretrained_cfg_overlay=overlay)
        assert Base(other).name == "weights.pth"
        other.pretrained_cfg = {**made.pretrained_cfg, "source": "hf-hub", "hf_hub_id": "someone/flowers"}
        assert Base(other).name == "someone/flowers"
        other.pretrained_cfg = {**made.pretrained_cfg, "state_dict": made.state_dict()}
        assert Base(other).name is None

    def test_a_model_made_from_the_configuration_alone_has_no_published_name(self) -> None:
        from transformers import LlamaConfig, LlamaModel

        model = LlamaModel(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                       vocab_size=9, name_or_path="someone/llama"))  # fmt: skip
        assert Base(model).name is None
        uora.inject(model, rank=2, train="norm")
        model.norm.weight.data[0] = 0.5
        assert Base(model).name is None
        uora.remove(model)
        model.norm.weight.data[0] = 0.5
        assert Base(model).name == "someone/llama"

    def test_many_adapters_cost_one_look_at_the_base(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        uora.save(trained(train=()), tmp_path)
        model = small_vit()
        base = Base(model)
        uora.load(model, tmp_path, base=base, name="first")
        for name in ("find_candidates", "walk"):
            monkeypatch.setattr(f"uora_vision.structure.survey.{name}", lambda *_: pytest.fail("looked again"))
        for name in ("check_model", "check_weights", "sketch_of", "weights_digest"):
            monkeypatch.setattr(f"uora_vision.storage.base.{name}", lambda *_: pytest.fail("looked again"))
        uora.load(model, tmp_path, base=base, name="second", activate=False)


def perturbed(model: nn.Module) -> nn.Module:
    """As a fine-tuned one: every weight has moved by a few per cent."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return model
