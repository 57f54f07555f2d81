"""Models whose own methods fuse weights, with adapters in them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import merged, need_timm, small_vit, wake
from refusals import adapted, snapshot
from timm.models import ByobNet
from timm.models.byobnet import ByoBlockCfg, ByoModelCfg
from timm.models.repghost import RepGhostNet
from timm.utils import reparameterize_model
from torch import Tensor, nn

import uora_vision as uora


def byob(kind: str) -> nn.Module:
    stages = tuple(ByoBlockCfg(type=kind, d=2, c=channels, s=2, gs=0) for channels in (16, 24))
    return ByobNet(ByoModelCfg(stages, stem_type=kind, stem_chs=8), num_classes=5)


FUSING: dict[str, tuple[Callable[[], nn.Module] | dict[str, Any], bool]] = {
    "levit_128s": ({"img_size": 64, "embed_dim": (32, 48, 64), "key_dim": 16, "num_heads": (2, 3, 4),
                    "depth": (1, 1, 1)}, True),
    "efficientvit_m0": ({"img_size": 64, "embed_dim": (16, 32, 48), "depth": (1, 1, 1), "num_heads": (2, 2, 2)}, True),
    "shvit_s1": ({"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "partial_dim": (8, 8, 8)}, True),
    "nextvit_small": ({"stem_chs": (16, 8, 16), "depths": (1, 2, 5, 1)}, True),
    "repvit_m0_9": ({"embed_dim": (16, 24, 32, 48), "depth": (1, 1, 1, 1)}, True),
    "iformer_t": ({"dims": (16, 16, 32, 32), "depths": (1, 1, 3, 3), "attn_groups": (0, 0, 1, 1)}, True),
    "efficientvim_m1": ({"embed_dim": (16, 32, 32), "depths": (1, 1, 1)}, True),
    "repvgg": (lambda: byob("rep"), True),
    "mobileone": (lambda: byob("one"), True),
    "repghost": (lambda: RepGhostNet([[[3, 16, 16, 0, 1]], [[3, 48, 24, 0.25, 2]]], num_classes=5), True),
    "tiny_vit_5m_224": ({"embed_dims": (16, 32, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2),
                         "window_sizes": (4, 4, 4, 2)}, False),
    "fastvit_sa12": ({"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "layer_scale_init_value": 1.0}, False),
}  # fmt: skip
"""Options or maker, and whether the model would fuse adapted weights."""


def fusing(name: str) -> tuple[nn.Module, Tensor]:
    """An injected model with awake adapters and the statistics of a batch in its norms, and images for it."""
    make = FUSING[name][0]
    model = make() if callable(make) else timm.create_model(name, num_classes=5, **make)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    uora.inject(model.eval(), rank=4, targets="conv" if callable(make) else "all")
    return wake(model), torch.randn(2, 3, 64, 64)


def assert_near(got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


class TestFusing:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", FUSING)
    def test_never_makes_a_wrong_model(self, name: str) -> None:
        need_timm(name)
        model, images = fusing(name)
        with torch.no_grad():
            wanted = model(images)
            if FUSING[name][1]:
                before = list(vars(model))
                for inner in (model, pickle.loads(pickle.dumps(model))):
                    with pytest.raises(uora.StateError, match=r"merge\(\) the model first"):
                        reparameterize_model(inner)
                assert list(vars(model)) == before
            else:
                other = reparameterize_model(model)
                assert type(other) is type(model) and len(list(other.modules())) < len(list(model.modules()))
                assert_near(other(images), wanted)
                assert_near(merged(other)(images), wanted)
            assert torch.equal(model(images), wanted)
            asleep = uora.remove(copy.deepcopy(model))(images)
            assert (asleep - wanted).abs().max() > 1e-2 * wanted.abs().max()
            assert_near(reparameterize_model(merged(model))(images), wanted)

    def test_the_method_of_the_model_itself_refuses_before_it_begins(self) -> None:
        model, _ = fusing("shvit_s1")
        before = snapshot(model)
        with pytest.raises(uora.StateError, match=r"^fuse\(\) would"):
            model.fuse()
        assert snapshot(model)["modules"] == before["modules"]

    def test_remove_gives_the_methods_back(self) -> None:
        model, images = fusing("levit_128s")
        with torch.no_grad():
            uora.remove(model)
            assert not any("fuse" in vars(m) for m in model.modules())
            assert_near(reparameterize_model(model)(images), model(images))

    def test_remove_leaves_what_was_fused_or_replaced_since(self) -> None:
        model, images = fusing("tiny_vit_5m_224")
        fused = reparameterize_model(model)
        fused.patch_embed.conv1.bias.requires_grad_(False)
        uora.remove(fused), uora.remove(model)
        assert not fused.patch_embed.conv1.bias.requires_grad and fused.head.fc.weight.requires_grad
        with torch.no_grad():
            assert_near(fused(images), model(images))

    def test_a_forward_that_is_called_so_is_left_alone(self, images: Tensor) -> None:
        class Joint(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = small_vit(), small_vit(seed=2)
                self.reparameterize = nn.Identity()

            def fuse(self, x: Tensor, y: Tensor) -> Tensor:
                return x * y

            def forward(self, x: Tensor) -> Tensor:
                return self.reparameterize(self.fuse(self.one(x), self.two(x)))

        assert len(adapted(Joint(), images)) == 16
