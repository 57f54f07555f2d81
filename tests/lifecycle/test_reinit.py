"""When directions fire, and what each scope promises of the model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import banks, injected, kill, outputs, small_vit, wake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import uora_vision as uora

Make = Callable[..., nn.Module]
TAU = 1e-5


def stack(model: nn.Module) -> Tensor:
    """Every d of the model, (roles, rank)."""
    return torch.cat([a.d for a in uora.adapters(model).values()]).detach()


class TestCounting:
    @settings(max_examples=12, deadline=None)
    @given(
        every=st.integers(1, 4),
        relative=st.booleans(),
        scope=st.sampled_from(["shared", "layer"]),
        seed=st.integers(0, 99),
    )
    def test_the_rule_one_index_at_a_time(self, every: int, relative: bool, scope: str, seed: int) -> None:
        from conftest import small_vit

        model = injected(small_vit(depth=1), rank=6, targets="attention")
        tau = 0.3 if relative else 0.05
        reinit = uora.Reinitializer(model, threshold=tau, every=every, scope=scope, relative=relative)  # type: ignore[arg-type]
        g = torch.Generator().manual_seed(seed)
        counts: dict[tuple[int, int], int] = {}
        want: list[tuple[int, int, int]] = []
        for step in range(1, 13):
            with torch.no_grad():
                for adapter in uora.adapters(model).values():
                    adapter.d.copy_(0.15 * torch.randn(adapter.d.shape, generator=g))
            before = len(want)
            for layer, row in enumerate(stack(model).tolist()):
                limit = tau * sorted(abs(v) for v in row)[(len(row) - 1) // 2] if relative else tau
                for index, value in enumerate(row):
                    if abs(value) < limit:
                        counts[layer, index] = counts.get((layer, index), 0) + 1
                        if counts[layer, index] % every == 0:
                            want.append((step, layer, index))
            assert reinit.step() == len(want) - before
        assert [tuple(row) for row in reinit.history().tolist()] == want
        assert reinit.firings == len(want) and reinit.steps == 12

    def test_exactly_at_the_threshold_is_not_below(self, vit: nn.Module) -> None:
        model = injected(vit, targets="qv")
        reinit = uora.Reinitializer(model, threshold=0.25)
        for adapter in uora.adapters(model).values():
            nn.init.constant_(adapter.d, -0.25)
        assert reinit.step() == 0
        kill(model, {"blocks.1.attn.qkv.v": [3]}, -0.2499)
        assert reinit.step() == 1 and reinit.history().tolist() == [[2, 3, 3]]

    def test_layers_are_named_in_the_order_of_the_history(self, vit: nn.Module) -> None:
        model = injected(vit, targets="qv+fc1")
        reinit = uora.Reinitializer(model)
        assert reinit.layers == [
            f"blocks.{i}.{r}" for i in range(2) for r in ("attn.qkv.q", "attn.qkv.v", "mlp.fc1.fc1")
        ]
        kill(model, {"blocks.1.mlp.fc1.fc1": [2], "blocks.0.attn.qkv.v": [5, 7]})
        assert reinit.step() == 3 and reinit.history().tolist() == [[1, 1, 5], [1, 1, 7], [1, 5, 2]]

    def test_never_fired_is_an_empty_history(self, vit: nn.Module) -> None:
        reinit = uora.Reinitializer(injected(vit), threshold=0.0)
        assert reinit.step() == 0 and reinit.history().shape == (0, 3) and reinit.firings == 0


class TestShared:
    def test_the_row_is_replaced_for_every_layer_of_the_bank_and_no_other(self, vit: nn.Module) -> None:
        model = injected(vit)
        kill(model, {"blocks.0.attn.qkv.k": [3]})
        before = banks(model)
        assert uora.Reinitializer(model).step() == 1
        after = banks(model)
        for name in before:
            changed = (before[name] != after[name]).any(1).nonzero().squeeze(1).tolist()
            assert changed == ([3] if name in ("A64", "B64") else []), name
        a, b = uora.adapters(model)["blocks.1.attn.qkv"].matrices()
        assert torch.equal(a[0], after["A64"]) and torch.equal(b[0].t(), after["B64"])

    def test_the_new_row_is_the_mix_at_alpha(self, make_vit: Make) -> None:
        rows = []
        for alpha in (0.0, 0.25):
            model = injected(make_vit())
            kill(model, {"blocks.0.attn.qkv.k": [3]})
            old = banks(model)["A64"][3]
            uora.Reinitializer(model, alpha=alpha).step()
            rows.append(banks(model)["A64"][3])
        torch.testing.assert_close(rows[1], 0.25 * old + 0.75 * rows[0], rtol=0, atol=1e-7)

    def test_many_layers_firing_one_index_draw_it_once(self, vit: nn.Module) -> None:
        model = injected(vit, targets="attention")
        kill(model, {f"blocks.{i}.attn.qkv.{r}": [2] for i in range(2) for r in "qkv"})
        assert uora.Reinitializer(model).step() == 6
        assert model.uora.draws("A64").tolist() == [0, 0, 1, 0, 0, 0, 0, 0]

    def test_the_function_of_other_layers_changes_with_it(self, vit: nn.Module, images: Tensor) -> None:
        model = injected(vit)
        kill(model, {"blocks.0.attn.qkv.k": [3]})
        before = outputs(model, images)
        uora.Reinitializer(model).step()
        assert (outputs(model, images) - before).abs().max() > 1e-3


class TestQuorum:
    def test_fires_at_the_share_and_not_below_it(self, make_vit: Make) -> None:
        for dead, fires in ((3, False), (4, True)):  # of 8 attention roles
            model = injected(make_vit(), targets="attention")
            reinit = uora.Reinitializer(model, scope="quorum", quorum=0.5)
            kill(model, {name: [5] for name in reinit.layers[:dead]} | {reinit.layers[7]: [1]})
            before = banks(model)
            assert reinit.step() == (dead if fires else 0)
            changed = {n: (before[n] != banks(model)[n]).any(1).nonzero().squeeze(1).tolist() for n in before}
            assert changed == ({"A64": [5], "B64": [5]} if fires else {"A64": [], "B64": []})

    def test_the_share_is_of_the_layers_of_each_matrix(self, vit: nn.Module) -> None:
        model = injected(vit)  # A256 and B256 belong to 2 roles each, A64 and B64 to 10
        reinit = uora.Reinitializer(model, scope="quorum", quorum=0.5)
        kill(model, {"blocks.0.mlp.fc1.fc1": [4]})
        before = banks(model)
        assert reinit.step() == 1
        assert [n for n in before if not torch.equal(before[n], banks(model)[n])] == ["B256"]

    def test_quorum_is_of_layers_below_the_threshold_whenever_they_count(self, vit: nn.Module) -> None:
        """With `every` above 1 layers reach their count at different steps; the share is of those below tau."""
        model = injected(vit, targets="attention", blocks=[0])
        reinit = uora.Reinitializer(model, scope="quorum", quorum=0.5, every=2)
        kill(model, {reinit.layers[0]: [5]})
        assert reinit.step() == 0
        kill(model, {reinit.layers[1]: [5]})
        assert reinit.step() == 1, "2 of 4 are below the threshold, and one of them is at its count"


class TestLayer:
    @pytest.mark.parametrize("interpolation", ["linear", "spherical"])
    @pytest.mark.parametrize("layout", ["shape", "slice"])
    def test_the_function_is_unchanged_to_within_tau(
        self, vit: nn.Module, images: Tensor, layout: str, interpolation: str
    ) -> None:
        model = injected(vit, layout=layout)
        reinit = uora.Reinitializer(model, threshold=TAU, scope="layer", interpolation=interpolation)  # type: ignore[arg-type]
        kill(model, {name: [1, 6] for name in reinit.layers}, TAU / 2)
        before, shared = outputs(model, images), banks(model)
        assert reinit.step() == 24
        assert (outputs(model, images) - before).abs().max() < 50 * TAU
        assert all(torch.equal(shared[n], t) for n, t in banks(model).items())

    def test_only_the_firing_role_gets_other_rows_and_uses_them(self, vit: nn.Module) -> None:
        model = injected(vit)
        kill(model, {"blocks.0.attn.qkv.k": [3]})
        reinit = uora.Reinitializer(model, scope="layer")
        reinit.step()
        shared = banks(model)
        for name, adapter in uora.adapters(model).items():
            a, b = adapter.matrices()
            for k, role in enumerate(adapter.roles):
                rows_a = a[k % len(a)] - model.uora.a(adapter.width)
                rows_b = b[k % len(b)] - model.uora.b(role.rows)
                mine = [3] if (name, role.name) == ("blocks.0.attn.qkv", "k") else []
                assert rows_a.any(1).nonzero().squeeze(1).tolist() == mine
                assert rows_b.any(0).nonzero().squeeze(1).tolist() == mine
        adapter = uora.adapters(model)["blocks.0.attn.qkv"]
        with torch.no_grad():
            adapter.b.zero_(), adapter.d.zero_()
            adapter.b[64:128], adapter.d[1, 3] = 1.0, 2.0
            delta = adapter.delta_weight(torch.float32)
        assert not delta[0].any() and not delta[2].any()
        want = 2 * torch.outer(adapter.matrices()[1][1][:, 3], adapter.matrices()[0][1][3])
        torch.testing.assert_close(delta[1], want)
        assert not torch.equal(adapter.matrices()[0][1][3], shared["A64"][3])

    def test_own_rows_pile_up_over_steps(self, vit: nn.Module) -> None:
        model = injected(vit, rank=24)
        reinit = uora.Reinitializer(model, scope="layer")
        adapter = uora.adapters(model)["blocks.0.mlp.fc1"]
        for i in range(24):
            kill(model, {"blocks.0.mlp.fc1.fc1": [i]})
            reinit.step()
            a, b = adapter.matrices()
            index, rows = model.uora.own("blocks.0.mlp.fc1.fc1/A")
            assert index.tolist() == list(range(i + 1)) and torch.equal(a[0][: i + 1], rows)
            assert torch.equal(a[0][i + 1 :], model.uora.a(64)[i + 1 :])
            assert torch.equal(b[0][:, : i + 1].t(), model.uora.own("blocks.0.mlp.fc1.fc1/B")[1])


class TestMoments:
    @pytest.mark.parametrize("scope", ["shared", "layer"])
    def test_those_of_fired_entries_are_cleared_and_no_others(self, vit: nn.Module, images: Tensor, scope: str) -> None:
        model = injected(vit)
        optimizer = torch.optim.AdamW(uora.param_groups(model, lr=1e-3), amsgrad=True)
        model(images).square().sum().backward()
        optimizer.step()
        kill(model, {"blocks.0.attn.qkv.v": [3], "blocks.1.mlp.fc2.fc2": [0]})
        before = {p: copy.deepcopy(s) for p, s in optimizer.state.items()}
        reinit = uora.Reinitializer(model, scope=scope, reset_moments=True, optimizer=optimizer)  # type: ignore[arg-type]
        assert reinit.step() == 2
        cleared = {}
        for path, adapter in uora.adapters(model).items():
            for name, value in optimizer.state[adapter.d].items():
                zeros = (value == 0).nonzero().tolist() if value.dim() else []
                cleared |= {(path, name): zeros} if zeros else {}
                keep = value != 0
                assert torch.equal(value[keep], before[adapter.d][name][keep])
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        want = {("blocks.0.attn.qkv", n): [[2, 3]] for n in names} | {("blocks.1.mlp.fc2", n): [[0, 0]] for n in names}
        assert cleared == want
        for p, state in before.items():
            if all(p is not a.d for a in uora.adapters(model).values()):
                assert all(torch.equal(v, optimizer.state[p][n]) for n, v in state.items())

    def test_by_default_they_are_kept(self, vit: nn.Module, images: Tensor) -> None:
        model = injected(vit)
        optimizer = torch.optim.AdamW(uora.param_groups(model, lr=1e-3))
        model(images).square().sum().backward()
        optimizer.step()
        kill(model, {"blocks.0.attn.qkv.v": [3]})
        uora.Reinitializer(model, optimizer=optimizer).step()
        assert (optimizer.state[uora.adapters(model)["blocks.0.attn.qkv"].d]["exp_avg"] != 0).all()


class TestSchedules:
    def test_alpha_falls_by_firing_of_an_index_to_its_floor(self, vit: nn.Module) -> None:
        model = injected(vit, targets="attention")
        reinit = uora.Reinitializer(model, alpha=uora.AlphaDecay(start=0.9, by=0.2, floor=0.5))
        kill(model, {"blocks.0.attn.qkv.v": [3]})
        for step in range(4):
            if step == 2:
                kill(model, {"blocks.0.attn.qkv.q": [6]})
            reinit.step()
        mine = [
            (e.indices.tolist(), [round(a, 6) for a in e.alpha.tolist()]) for e in model.uora.log if e.matrix == "A64"
        ]
        assert mine == [([3], [0.9]), ([3], [0.7]), ([3, 6], [0.5, 0.9]), ([3, 6], [0.5, 0.7])]

    def test_the_authors_alpha(self) -> None:
        got = uora.AlphaDecay()(torch.tensor([0, 1, 9, 10, 11, 50])).tolist()
        assert got == pytest.approx([1.0, 0.95, 0.55, 0.5, 0.5, 0.5])

    def test_the_authors_threshold_goes_up_and_down(self) -> None:
        wave = uora.ThresholdWave()
        assert wave(1) == wave(1000) == 1e-6
        assert wave(1001) == pytest.approx(2e-6)
        values = [wave(1 + 1000 * k) for k in range(400)]
        assert max(values) == pytest.approx(1e-4) and min(values) == pytest.approx(1e-6)
        assert values.index(max(values)) == 99 and values[198] == pytest.approx(1e-6)
        steps = [abs(y - x) for x, y in itertools.pairwise(values)]
        assert all(s == pytest.approx(1e-6, rel=1e-6) for s in steps)

    def test_a_wave_between_equal_thresholds_still_moves_by_one_step(self) -> None:
        wave = uora.ThresholdWave(low=1e-5, high=1e-5)
        assert [wave(step) for step in (1, 1001, 2001)] == pytest.approx([1e-5, 1.1e-5, 1e-5])

    def test_a_threshold_schedule_is_asked_at_every_step(self, vit: nn.Module) -> None:
        model = injected(vit, targets="qv")
        kill(model, {"blocks.0.attn.qkv.v": [3]}, 0.001)
        with torch.no_grad():
            for a in uora.adapters(model).values():
                a.d[a.d.abs() < 1e-3] = 1.0
        kill(model, {"blocks.0.attn.qkv.v": [3]}, 0.0005)
        seen: list[int] = []
        reinit = uora.Reinitializer(model, threshold=lambda step: seen.append(step) or (1e-3 if step == 3 else 1e-4))
        assert [reinit.step() for _ in range(4)] == [0, 0, 1, 0] and seen == [1, 2, 3, 4]


@pytest.mark.parametrize("scope", ["shared", "layer"])
def test_a_second_training_goes_on_from_the_log_of_the_first(scope: str, tmp_path: Path) -> None:
    first = uora.inject(small_vit(), rank=8)
    kill(first, {"blocks.0.attn.qkv.q": [1]})
    reinit = uora.Reinitializer(first, scope=scope, threshold=1e-3)  # type: ignore[arg-type]
    assert reinit.step() > 0
    uora.save(first, tmp_path / "first")
    second = uora.load(small_vit(), tmp_path / "first")
    again = uora.Reinitializer(second, scope=scope, threshold=1e-3)  # type: ignore[arg-type]
    assert again.firings == 0 and again.step() > 0 and again.steps == 2
    uora.save(second, tmp_path / "second")
    third = uora.load(small_vit(), tmp_path / "second")
    assert [e.step for e in third.uora.log] == [e.step for e in second.uora.log] and third.uora.log[-1].step == 2
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(wake(third)(x), wake(second)(x))
