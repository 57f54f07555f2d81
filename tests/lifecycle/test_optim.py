"""Learning rates that mean the same at every rank, width, law and d_init."""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
from conftest import small_vit
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.lifecycle.parameter_groups import HEAD_LR, LR, gain


class Net(nn.Module):
    """Two projections and a head."""

    def __init__(self, width: int = 24, hidden: int = 96) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.fc2(self.fc1(x).relu()))


def adapted(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return uora.inject(Net(), targets="mlp", **options)


@pytest.mark.parametrize(
    "options", [{}, {"layout": "slice"}, {"init": "kaiming"}, {"init": "kaiming", "layout": "slice"}]
)
@pytest.mark.parametrize("rank", [4, 24, 200])
def test_the_gain_is_what_the_banks_do_to_random_inputs(options: dict[str, Any], rank: int) -> None:
    model = adapted(rank=rank, **options)
    for adapter in uora.adapters(model).values():
        a, bm = (m[0].double() for m in adapter.matrices())
        x = torch.randn(4000, adapter.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        signs = 1 - 2 * torch.randint(2, (rank,), generator=torch.Generator().manual_seed(1)).double()
        measured = ((x @ a.t() * signs) @ bm.t()).pow(2).mean().sqrt().item()
        assert gain(adapter) == pytest.approx(measured, rel=0.15)


def test_the_gain_of_orthonormal_banks_and_of_veras() -> None:
    fc1, fc2 = uora.adapters(adapted(rank=6)).values()
    assert gain(fc1) == pytest.approx(math.sqrt(6 / 96), rel=1e-6)
    assert gain(fc2) == pytest.approx(math.sqrt(6 / 24), rel=1e-6)
    vera = uora.adapters(adapted(rank=64, init="kaiming"))
    assert [gain(adapter) for adapter in vera.values()] == pytest.approx([2, 2], rel=0.05)


def test_roles_of_several_heights_share_their_mean() -> None:
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    model = uora.inject(nn.ModuleDict({"attn": Attention()}), rank=2, targets="attention", train=())
    found = {path.rpartition(".")[2]: gain(a) for path, a in uora.adapters(model).items()}
    assert found == pytest.approx({"q": math.sqrt(2 / 16), "k": math.sqrt(2 / 4), "v": math.sqrt(2 / 4)}, rel=1e-6)


@pytest.mark.parametrize(
    "options", [{"rank": 4}, {"rank": 64}, {"rank": 4, "init": "kaiming"}, {"rank": 4, "d_init": 1.0}]
)
def test_rates_of_b_and_d_times_the_gain_are_the_same_for_all(options: dict[str, Any]) -> None:
    model = adapted(**options)
    groups = uora.param_groups(model, lr=0.3)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for adapter in uora.adapters(model).values():
        assert rate[id(adapter.b)] * rate[id(adapter.d)] * gain(adapter) == pytest.approx(0.3**2, rel=1e-4)
        assert rate[id(adapter.d)] == pytest.approx(0.3 * options.get("d_init", 0.1) / 0.1, rel=1e-4)


def trained(model: nn.Module, **rates: Any) -> Tensor:
    """Outputs after some steps; eps is far below every gradient, as the invariances ask for."""
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(3))
    y = torch.arange(8) % 3
    optimizer = torch.optim.Adam(uora.param_groups(model, **rates), eps=1e-30)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model(x).detach()


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 40, "init": "kaiming"}])
def test_d_init_does_not_change_what_training_does(options: dict[str, Any]) -> None:
    one, two = (trained(adapted(**options, d_init=d)) for d in (0.1, -2.0))
    assert torch.allclose(one, two, atol=2e-4)
    plain = trained(adapted(**options, d_init=2.0), scaled=False, lr=LR)
    assert not torch.allclose(one, plain, atol=2e-2)


def test_nor_do_larger_banks() -> None:
    before, larger = adapted(rank=4), adapted(rank=4)
    bank = next(iter(uora.adapters(larger).values())).bank
    for name in bank.matrices:
        bank.get_buffer(name).mul_(3)
        bank._first[name] = bank._first[name] * 3
    assert torch.allclose(trained(before), trained(larger), atol=2e-4)
    assert not torch.allclose(trained(adapted(rank=4), scaled=False), trained(larger, scaled=False), atol=2e-2)


def test_defaults_and_the_plain_rate() -> None:
    model = adapted(rank=4, train=("head", "norm"))
    heads = [group for group in uora.param_groups(model) if group["name"].startswith("head")]
    assert [group["lr"] for group in heads] == [HEAD_LR] * 2
    plain = uora.param_groups(model, lr=0.3, scaled=False)
    assert [(group["name"], group["lr"]) for group in plain] == [
        ("adapter", 0.3), ("head", HEAD_LR), ("head_vectors", HEAD_LR),
    ]  # fmt: skip
    assert len(plain[0]["params"]) == 4


def test_groups_are_the_same_after_redraws() -> None:
    """So that a run resumed with redrawn banks can load its optimizer's state."""
    model = uora.inject(small_vit(), rank=8)
    before = [(g["name"], g["lr"], len(g["params"])) for g in uora.param_groups(model)]
    for scope in ("shared", "layer"):
        for adapter in uora.adapters(model).values():
            nn.init.zeros_(adapter.d)
        assert uora.Reinitializer(model, alpha=0.0, scope=scope).step() > 0
        assert [(g["name"], g["lr"], len(g["params"])) for g in uora.param_groups(model)] == before


def rates(model: nn.Module, decay: float) -> dict[str, float]:
    """The share of its rate that each trained parameter keeps, by its name."""
    whole, decayed = ({id(p): g["lr"] for g in uora.param_groups(model, 1.0, 1.0, scaled=False, layer_decay=d)
                       for p in g["params"]} for d in (1.0, decay))  # fmt: skip
    return {name: decayed[id(p)] / whole[id(p)] for name, p in model.named_parameters() if p.requires_grad}


class TestLayerDecay:
    def test_of_a_vit_it_is_timms(self) -> None:
        from timm.optim import param_groups_layer_decay

        model = uora.inject(small_vit(depth=3), rank=4, train=("head", "norm", "bias"))
        names = {id(p): name for name, p in model.named_parameters()}
        want = {
            names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(model, layer_decay=0.5) for p in g["params"]
        }
        got = rates(model, 0.5)
        own = [name for name in got if not name.startswith("uora")]
        assert len(own) > 40 and {name: got[name] for name in own} == pytest.approx({name: want[name] for name in own})
        assert got["blocks.0.mlp.fc1.uora.b" if "blocks.0.mlp.fc1.uora.b" in got else own[0]] in (0.125, 0.0625)

    def test_stages_follow_each_other_and_towers_are_counted_apart(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.image, self.text = small_vit(), small_vit(depth=3)

        swin = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 2), num_heads=(1, 2), embed_dim=16, num_classes=2
        )
        got = rates(uora.inject(swin, rank=4), 0.5)
        shares = [
            next(v for n, v in got.items() if f"layers.{i}.blocks.{j}.attn" in n) for i, j in ((0, 0), (1, 0), (1, 1))
        ]
        assert shares == pytest.approx([0.125, 0.25, 0.5])
        got = rates(uora.inject(Two(), rank=4), 0.5)
        firsts = [next(v for n, v in got.items() if n.startswith(f"{tower}.blocks.0.")) for tower in ("image", "text")]
        assert firsts == pytest.approx([0.25, 0.125])

    @pytest.mark.parametrize("decay", [0, -1.0, 1.5, float("nan")])
    def test_what_is_no_share_is_refused(self, decay: float) -> None:
        with pytest.raises(uora.ConfigError, match="layer_decay must be in"):
            uora.param_groups(uora.inject(small_vit(), rank=4), layer_decay=decay)
