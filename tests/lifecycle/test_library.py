"""Several adapters on one model: each keeps what is its own, and the base is never copied nor changed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from conftest import kill, small_vit, wake
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora

KINDS = {
    "plain": {"rank": 8},
    "qv": {"rank": 8, "targets": "qv"},
    "narrow": {"rank": 4, "seed": 3},
    "slices": {"rank": 8, "layout": "slice"},
    "norms": {"rank": 8, "train": ("head", "norm")},
    "redrawn": {"rank": 8},
    "own rows": {"rank": 8},
}
SCOPES = {"redrawn": "shared", "own rows": "layer"}


def add(model: nn.Module, name: str, seed: int) -> nn.Module:
    """An adapter as after training: b, d, what else trains, and rows that were redrawn."""
    wake(uora.inject(model, name=name, **KINDS[name]), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.requires_grad and "uora" not in path:
                p.add_(torch.randn(p.shape, generator=generator))
    if name in SCOPES:
        reinit = uora.Reinitializer(model, threshold=1e-3, scope=SCOPES[name])  # type: ignore[arg-type]
        for step in range(3):
            kill(model, {layer: [step, step + 3] for layer in reinit.layers[step::2]})
            reinit.step()
        wake(model, seed=seed)
    return model


def alone(name: str, seed: int, images: Tensor) -> Tensor:
    return add(small_vit(), name, seed)(images)


@pytest.fixture(scope="module")
def seven() -> nn.Module:
    model = small_vit()
    for seed, name in enumerate(KINDS):
        add(model, name, seed)
    return model


@pytest.fixture
def many(seven: nn.Module) -> nn.Module:
    return copy.deepcopy(seven)


class TestSwitching:
    def test_each_computes_what_it_does_alone(self, many: nn.Module, images: Tensor) -> None:
        assert uora.adapter_names(many) == list(KINDS) and uora.active_adapter(many) == "own rows"
        wanted = {name: alone(name, seed, images) for seed, name in enumerate(KINDS)}
        for name in [*KINDS, *reversed(KINDS)]:
            assert uora.activate(many, name) is many
            assert torch.equal(many(images), wanted[name]), name

    def test_disabled_is_the_base_and_its_head_to_the_bit(self, many: nn.Module, images: Tensor) -> None:
        want, before = small_vit()(images), many(images)
        with uora.disabled(many):
            assert torch.equal(many(images), want) and uora.active_adapter(many) is None
            with pytest.raises(uora.StateError, match="disabled"):
                uora.adapters(many)
            with uora.disabled(many):
                pass
        assert torch.equal(many(images), before)

    def test_disabled_ends_after_an_error_too(self, many: nn.Module) -> None:
        with pytest.raises(KeyError), uora.disabled(many):
            raise KeyError
        assert uora.active_adapter(many) == "own rows"

    def test_the_base_is_one_and_the_same_tensor(self, vit: nn.Module) -> None:
        weights = {name: p for name, p in vit.named_parameters() if not name.startswith("head")}
        for seed, name in enumerate(n for n in KINDS if n != "norms"):
            add(vit, name, seed)
            assert all(vit.get_parameter(name) is p for name, p in weights.items())

    @pytest.mark.slow
    def test_remove_gives_the_base_back(self, vit: nn.Module, images: Tensor) -> None:
        vit.blocks[0].requires_grad_(False)
        before, want = snapshot(vit), vit(images)
        for seed, name in enumerate(KINDS):
            add(vit, name, seed)
        uora.remove(vit)
        assert torch.equal(vit(images), want)
        after = snapshot(vit)
        for part in ("classes", "grad", "attributes"):
            assert before[part] == after[part], part
        assert before["state"].keys() == after["state"].keys()

    def test_adapters_that_draw_the_same_share_a_bank(self, many: nn.Module) -> None:
        banks = {}
        for name in KINDS:
            uora.activate(many, name)
            banks[name] = id(next(iter(uora.adapters(many).values())).bank)
        same = {banks[n] for n in ("plain", "qv", "norms", "redrawn", "own rows")}
        assert len(same) == 1 and len(set(banks.values())) == 3

    def test_delete(self, many: nn.Module, images: Tensor) -> None:
        want = many(images)
        uora.delete(many, "plain")
        assert "plain" not in uora.adapter_names(many) and torch.equal(many(images), want)
        with pytest.raises(uora.StateError, match="active"):
            uora.delete(many, "own rows")
        add(many, "plain", 0)
        assert torch.equal(many(images), alone("plain", 0, images))

    @pytest.mark.slow
    def test_copies_and_pickles_are_their_own(self, many: nn.Module, images: Tensor) -> None:
        wanted = {name: uora.activate(many, name)(images) for name in KINDS}
        for other in (copy.deepcopy(many), pickle.loads(pickle.dumps(many))):
            for name in KINDS:
                assert torch.equal(uora.activate(other, name)(images), wanted[name])
                wake(other, seed=99)
        assert all(torch.equal(uora.activate(many, name)(images), want) for name, want in wanted.items())


class TestTraining:
    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    def test_one_trains_and_the_others_stay(self, many: nn.Module, images: Tensor) -> None:
        wanted = {name: uora.activate(many, name)(images) for name in KINDS}
        uora.activate(many, "qv")
        optimizer = torch.optim.AdamW(uora.param_groups(many, lr=0.1))
        self.train(many, optimizer, images)
        assert not torch.equal(many(images), wanted["qv"])
        for name in KINDS.keys() - {"qv"}:
            assert torch.equal(uora.activate(many, name)(images), wanted[name])

    @pytest.mark.slow
    def test_training_by_turns_is_training_one_after_the_other(self, images: Tensor) -> None:
        def run(turns: list[str]) -> list[Tensor]:
            model = add(add(small_vit(), "redrawn", 1), "qv", 2)
            optimizers, reinits = {}, {}
            for name in ("redrawn", "qv"):
                uora.activate(model, name)
                optimizers[name] = torch.optim.AdamW(uora.param_groups(model, lr=0.01))
                reinits[name] = uora.Reinitializer(model, threshold=0.1, relative=True)
            for name in turns:
                uora.activate(model, name)
                self.train(model, optimizers[name], images)
                reinits[name].step()
            assert reinits["qv"].firings
            return [uora.activate(model, name)(images) for name in ("redrawn", "qv")]

        first, second = run(["qv", "redrawn"] * 3), run(["qv"] * 3 + ["redrawn"] * 3)
        assert all(map(torch.equal, first, second))

    def test_a_reinitializer_of_another_adapter_says_so(self, many: nn.Module) -> None:
        reinit = uora.Reinitializer(many)
        uora.activate(many, "plain")
        with pytest.raises(uora.StateError, match="another adapter is active"):
            reinit.step()

    def test_only_the_active_one_is_among_the_parameters(self, many: nn.Module) -> None:
        uora.activate(many, "qv")
        names = [n for n, p in many.named_parameters() if p.requires_grad and not n.startswith("head")]
        assert names == [f"blocks.{i}.attn.qkv.uora.{v}" for i in (0, 1) for v in ("b", "d")]


class TestFiles:
    @pytest.mark.slow
    def test_each_is_saved_and_loaded_as_it_is(self, many: nn.Module, images: Tensor, tmp_path: Path) -> None:
        wanted = {}
        for name in KINDS:
            wanted[name] = uora.activate(many, name)(images)
            uora.save(many, tmp_path / name)
        other = small_vit()
        for name in KINDS:
            uora.load(other, tmp_path / name, name=name, activate=False)
        assert uora.active_adapter(other) is None and torch.equal(other(images), small_vit()(images))
        for name, want in wanted.items():
            assert torch.equal(uora.activate(other, name)(images), want), name

    def test_a_head_of_other_classes(self, images: Tensor, tmp_path: Path) -> None:
        model = small_vit(num_classes=3)
        model.load_state_dict({k: v for k, v in small_vit().state_dict().items() if "head" not in k}, strict=False)
        add(model, "plain", 1)
        want = model(images)
        uora.save(model, tmp_path)
        other = add(small_vit(), "qv", 2)
        before = other(images)
        uora.load(other, tmp_path, name="three")
        assert torch.equal(other(images), want) and other.head.out_features == 3
        assert torch.equal(uora.activate(other, "qv")(images), before) and other.head.out_features == 7


class TestErrors:
    def test_names(self, many: nn.Module) -> None:
        before = snapshot(many)
        with pytest.raises(uora.StateError, match="already has an adapter 'qv'"):
            uora.inject(many, name="qv")
        with pytest.raises(uora.StateError, match=r"no adapter 'x'; there are 'plain', 'qv'"):
            uora.activate(many, "x")
        with pytest.raises(uora.StateError, match="no adapter"):
            uora.delete(many, "x")
        assert_same(before, many)

    def test_a_base_that_trains_besides_is_not_taken_for_an_adapter(self, many: nn.Module) -> None:
        many.pos_embed.requires_grad_(True)
        with pytest.raises(uora.StateError, match=r"pos_embed trains.*train="):
            uora.activate(many, "plain")

    def test_a_failed_verification_leaves_the_others(self, many: nn.Module, images: Tensor) -> None:
        before = snapshot(many)
        many.blocks[0].attn.forward = lambda x, **_: x  # its adapters would not train
        with pytest.raises(uora.UoraError):
            uora.inject(many, name="dead", rank=8, example_input=images)
        del many.blocks[0].attn.forward
        assert_same(before, many)
        assert "dead" not in uora.adapter_names(many)


class TestMerging:
    @pytest.mark.parametrize("shares", [{"plain": 0.3, "own rows": -1.5, "redrawn": 2.0}, {"qv": 1.0}])
    @pytest.mark.slow
    def test_shares_of_several(self, shares: dict[str, float], images: Tensor) -> None:
        """Against dW = diag(b) B diag(d) A of each, and heads, written out in float64."""
        model, base = small_vit().double(), small_vit().double()
        for seed, name in enumerate(KINDS):
            add(model, name, seed)
        want = dict(base.named_parameters())
        with torch.no_grad():
            for name, share in shares.items():
                uora.activate(model, name)
                head = {n: p for n, p in model.named_parameters() if n.startswith("head")}
                for path, adapter in uora.adapters(model).items():
                    first, (a, bm) = 0, adapter.matrices()
                    for k, role in enumerate(adapter.roles):
                        b = adapter.b[first : first + role.rows].double()
                        dw = b[:, None] * bm[k % len(bm)].double() * adapter.d[k].double() @ a[k % len(a)].double()
                        want[f"{path}.weight"][role.start : role.start + role.rows] += share * dw
                        first += role.rows
                for n, p in head.items():
                    want[n] += share * (p - small_vit().double().get_parameter(n))
        assert uora.merge(model, shares=shares).weights == (2 if shares.keys() == {"qv"} else 8)
        assert type(model.blocks[0].attn.qkv) is nn.Linear and not hasattr(model, "uora")
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, want[name], rtol=1e-10, atol=1e-10)

    def test_bad_shares_change_nothing(self, many: nn.Module) -> None:
        before = snapshot(many)
        for shares, error in (
            ({"x": 1.0}, uora.StateError), ({"qv": float("nan")}, uora.ConfigError), ({}, uora.ConfigError),
        ):  # fmt: skip
            with pytest.raises(error):
                uora.merge(many, shares=shares)
        with pytest.raises(uora.ConfigError, match="reversible"):
            uora.merge(many, shares={"qv": 1.0}, reversible=True)
        assert_same(before, many)
