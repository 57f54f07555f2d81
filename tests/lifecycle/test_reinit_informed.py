"""Redraws by saliency, and with rows that the gradient asks for: against references in float64, and in all that a run
goes through."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_two_processes
from redrawn import Net, X, out, wake
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import uora_vision as uora

BATCHES = [(torch.randn(6, 12, generator=torch.Generator().manual_seed(k)), (torch.arange(6) + k) % 3) for k in (0, 1)]
INFORMED: dict[str, Any] = {"scope": "layer", "source": "informed", "batches": BATCHES}
SALIENT: dict[str, Any] = {"criterion": "saliency", "relative": True, "threshold": 0.5}


def fresh(awake: bool = True, **options: Any) -> nn.Module:
    model = uora.inject(Net(), rank=4, targets="all", **options)
    return wake(model, 1) if awake else model


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(uora.param_groups(model, lr=0.05))


def train(model: nn.Module, optimizer: Any, reinit: Any, steps: range, loss: Any = None) -> list[int]:
    fired = []
    for step in steps:
        optimizer.zero_grad()
        x, y = BATCHES[step % 2]
        cross_entropy((model if loss is None else loss)(x), y).backward()
        optimizer.step()
        fired.append(reinit.step())
    return fired


def vectors(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for a in uora.adapters(model).values() for p in (a.b, a.d)]


def rows(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for a in uora.adapters(model).values() for side in a.matrices() for t in side]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


class TestSaliency:
    @settings(max_examples=15, deadline=None)
    @given(every=st.integers(1, 3), tau=st.floats(0.1, 1.5), seed=st.integers(0, 99))
    @pytest.mark.slow
    def test_the_rule_one_direction_at_a_time(self, every: int, tau: float, seed: int) -> None:
        """A running mean of |d g| in float64, in plain Python."""
        model, g = fresh(), torch.Generator().manual_seed(seed)
        reinit = uora.Reinitializer(
            model, criterion="saliency", relative=True, threshold=tau, every=every, source="none", optimizer=adam(model)
        )
        mean: dict[tuple[int, int], float] = {}
        counts: dict[tuple[int, int], int] = {}
        want = []
        for step in range(1, 9):
            for adapter in uora.adapters(model).values():
                adapter.d.data = torch.randn(adapter.d.shape, generator=g)
                adapter.d.grad = torch.randn(adapter.d.shape, generator=g)
            d = torch.cat([a.d.detach() for a in uora.adapters(model).values()]).double().tolist()
            grad = torch.cat([a.d.grad for a in uora.adapters(model).values()]).double().tolist()
            reinit.step()
            for layer, values in enumerate(d):
                for i, value in enumerate(values):
                    now = abs(value * grad[layer][i])
                    mean[layer, i] = 0.9 * mean[layer, i] + 0.1 * now if (layer, i) in mean else now
                median = sorted(mean[layer, i] for i in range(4))[1]
                for i in range(4):
                    if mean[layer, i] < tau * median:
                        counts[layer, i] = counts.get((layer, i), 0) + 1
                        if counts[layer, i] % every == 0:
                            want.append([step, layer, i])
                            mean[layer, i] = median
        assert reinit.history().tolist() == want and (want or tau < 0.3 or every > 1)

    def test_what_fires_is_given_time(self) -> None:
        """A direction without any saliency goes on from its role's median, which falls by a tenth a step."""
        model = fresh()
        options = {**SALIENT, "source": "none", "optimizer": adam(model)}
        reinit = uora.Reinitializer(model, **options)
        steps = []
        for _ in range(20):
            for adapter in uora.adapters(model).values():
                adapter.d.grad = torch.ones_like(adapter.d)
                adapter.d.data = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand_as(adapter.d).clone()
            steps.append(reinit.step())
        assert steps == [4, *[0] * 6, 4, *[0] * 6, 4, *[0] * 5]  # 0.9^7 < 0.5

    def test_a_function_is_a_criterion_and_sees_d_and_its_gradient(self) -> None:
        model, seen = fresh(), []

        def score(d: Tensor, grad: Tensor) -> Tensor:
            seen.append((d.clone(), grad.clone()))
            return torch.tensor([0.0, 1, 2, 3]).expand_as(d)

        reinit = uora.Reinitializer(model, criterion=score, threshold=1.5, source="none", optimizer=adam(model))
        for adapter in uora.adapters(model).values():
            adapter.d.grad = torch.full_like(adapter.d, 7.0)
        assert reinit.step() == 8 and set(reinit.history()[:, 2].tolist()) == {0, 1}
        assert torch.equal(seen[0][0], torch.cat([a.d.detach() for a in uora.adapters(model).values()]))
        assert (seen[0][1] == 7).all()

    def test_gradients_that_overflowed_are_left_out(self) -> None:
        model = fresh()
        reinit = uora.Reinitializer(model, **SALIENT, source="none", optimizer=adam(model))
        for bad in (False, True):
            for adapter in uora.adapters(model).values():
                adapter.d.grad = torch.full_like(adapter.d, torch.inf if bad else 1.0)
            reinit.step()
        first = reinit.state_dict()["scores"]
        assert first.isfinite().all() and (first > 0).all()


class TestFunction:
    @settings(max_examples=20, deadline=None)
    @given(
        source=st.sampled_from(["informed", "random"]),
        criterion=st.sampled_from(["saliency", "magnitude"]),
        init=st.sampled_from(["haar", "kaiming"]),
        seed=st.integers(0, 99),
    )
    @pytest.mark.slow
    def test_it_changes_by_what_the_fired_directions_did_alone(
        self, source: str, criterion: str, init: str, seed: int
    ) -> None:
        if (source, criterion) == ("random", "magnitude"):  # the paper's way: d stays, as small as it is
            criterion = "saliency"
        model = wake(fresh(init=init), seed)
        more: dict[str, Any] = {**INFORMED, "source": source} | ({} if source == "informed" else {"batches": None})
        options = {"criterion": criterion, "relative": True, "threshold": 1.2}
        optimizer = adam(model)
        cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
        without = copy.deepcopy(model)
        reinit = uora.Reinitializer(model, **options, **more, optimizer=optimizer)  # type: ignore[arg-type]
        before = rows(model)
        assert reinit.step()
        assert not same(before, rows(model))
        for adapter, layer in zip(uora.adapters(without).values(), range(4), strict=True):
            fired = [i for _, where, i in reinit.history().tolist() if where == layer]
            adapter.d.data[:, fired] = 0
        torch.testing.assert_close(out(model), out(without), atol=1e-6, rtol=1e-5)

    def test_the_control_changes_moments_alone(self) -> None:
        model = fresh()
        optimizer = adam(model)
        reinit = uora.Reinitializer(model, threshold=0.0)
        train(model, optimizer, reinit, range(2))
        reinit = uora.Reinitializer(model, threshold=0.3, source="none", optimizer=optimizer)
        was, saved = [*vectors(model), *rows(model)], {}
        for adapter in uora.adapters(model).values():
            saved[adapter.name] = optimizer.state[adapter.d]["exp_avg"].clone()
            assert saved[adapter.name].all()
        assert 0 < reinit.step() < 16
        assert same(was, [*vectors(model), *rows(model)]) and not reinit.bank.log
        for layer, adapter in enumerate(uora.adapters(model).values()):
            fired = [i for _, where, i in reinit.history().tolist() if where == layer]
            saved[adapter.name][:, fired] = 0
            assert torch.equal(optimizer.state[adapter.d]["exp_avg"], saved[adapter.name])


class TestInformed:
    def test_the_row_is_what_the_gradient_has_beside_the_others(self) -> None:
        """Of each layer: what the fresh rows hold of G without the kept rows, against the best there is, in float64; G
        is of the adapted model, W + dW."""
        model = fresh()
        for adapter in uora.adapters(model).values():
            adapter.b.data.mul_(20)  # so that W + dW is far from W
            adapter.d.data[:, 1:3] = 0
        dense = copy.deepcopy(model)
        uora.merge(dense)
        dense.double().train().requires_grad_(True)
        sum(cross_entropy(dense(x.double()), y) for x, y in BATCHES).backward()
        kept = [a.matrices()[0][0].double()[[0, 3]] for a in uora.adapters(model).values()]
        reinit = uora.Reinitializer(model, **INFORMED, optimizer=adam(model))
        assert reinit.step() == 8
        for old, (path, adapter) in zip(kept, uora.adapters(model).items(), strict=True):
            a = adapter.matrices()[0][0].double()
            assert torch.equal(a[[0, 3]], old)
            new, q = a[1:3], torch.linalg.qr(old.t()).Q
            torch.testing.assert_close(a @ a.t(), torch.eye(4).double(), atol=0.02, rtol=0)  # rounded to int8
            g = dense.get_submodule(path).weight.grad
            rest = g - (g @ q) @ q.t()
            best = torch.linalg.svdvals(rest)[:2].square().sum()
            assert (rest @ new.t()).square().sum() > 0.8 * best, path

    def test_where_the_gradient_gives_nothing_rows_are_random_beside_the_others(self) -> None:
        model = fresh()
        model.blocks[1].requires_grad_(False)
        nn.init.zeros_(model.blocks[1][2].weight)  # nothing comes through to its first layer
        uora.adapters(model)["blocks.1.2"].b.data.zero_()
        for adapter in uora.adapters(model).values():
            adapter.d.data[:, :2] = 0
        assert uora.Reinitializer(model, **INFORMED, optimizer=adam(model)).step() == 8
        a = uora.adapters(model)["blocks.1.0"].matrices()[0][0]
        torch.testing.assert_close(a @ a.t(), torch.eye(4), atol=0.02, rtol=0)

    def test_gradients_modes_and_random_numbers_are_left_as_they_were(self) -> None:
        model = fresh()
        model.norm.train()
        cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).backward()
        was = [p.grad.clone() for p in model.parameters() if p.grad is not None], model.norm.running_mean.clone()
        for adapter in uora.adapters(model).values():
            adapter.d.data[:, 1] = 0
        state = torch.get_rng_state()
        assert uora.Reinitializer(model, **INFORMED, optimizer=adam(model)).step() == 4
        assert same(was[0], [p.grad for p in model.parameters() if p.grad is not None])
        assert torch.equal(was[1], model.norm.running_mean) and torch.equal(state, torch.get_rng_state())

    def test_batches_without_a_loss_change_nothing(self) -> None:
        model = fresh()
        options = {**INFORMED, "loss": lambda model, batch: model(batch[0]).sum() * torch.nan}
        reinit = uora.Reinitializer(model, **options, optimizer=adam(model))
        for adapter in uora.adapters(model).values():
            adapter.d.data[:, 1] = 0
        was = [*vectors(model), *rows(model)]
        with pytest.raises(uora.OptionError, match="one finite number, got nan"):
            reinit.step()
        assert same(was, [*vectors(model), *rows(model)]) and not reinit.firings and not reinit.bank.log


class TestRun:
    @pytest.mark.parametrize("options", [{**INFORMED, **SALIENT}, {**SALIENT, "scope": "layer"}, SALIENT],
                             ids=["informed", "random", "shared"])  # fmt: skip
    @pytest.mark.slow
    def test_resumed_it_is_the_same_run(self, options: dict[str, Any], tmp_path: Path) -> None:
        model = fresh(awake=False)
        optimizer = adam(model)
        reinit = uora.Reinitializer(model, **options, optimizer=optimizer)
        train(model, optimizer, reinit, range(8))
        torch.save((model.state_dict(), optimizer.state_dict(), reinit.state_dict()), tmp_path / "state.pt")
        fired = train(model, optimizer, reinit, range(8, 16))
        assert sum(fired) and reinit.firings > sum(fired)
        again = fresh(awake=False)
        states = torch.load(tmp_path / "state.pt", weights_only=True)
        other = adam(again)
        resumed = uora.Reinitializer(again, **options, optimizer=other)
        for thing, state in zip((again, other, resumed), states, strict=True):
            thing.load_state_dict(state)
        assert train(again, other, resumed, range(8, 16)) == fired
        assert same(vectors(model), vectors(again)) and same(rows(model), rows(again))
        assert reinit.history().tolist() == resumed.history().tolist()

    @pytest.mark.parametrize("informed", [False, True], ids=["drawn", "informed before"])
    @pytest.mark.slow
    def test_files_copies_and_averages_hold_the_rows(self, informed: bool, tmp_path: Path) -> None:
        model = fresh(awake=False)
        if informed:
            uora.inform(model, BATCHES)
        optimizer = adam(model)
        train(model, optimizer, uora.Reinitializer(model, **INFORMED, **SALIENT, optimizer=optimizer), range(12))
        assert any(e.rows is not None for e in next(iter(uora.adapters(model).values())).bank.log)
        for banks in (None, "changed", "all"):
            uora.save(model, tmp_path / str(banks), save_banks=banks)  # type: ignore[arg-type]
            loaded = uora.load(Net(), tmp_path / str(banks))
            assert same(rows(model), rows(loaded)) and torch.equal(out(model), out(loaded))
            uora.save(loaded, tmp_path / "again", save_banks=banks)  # type: ignore[arg-type]
            files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in (str(banks), "again")]
            assert files[0].keys() == files[1].keys() and "log/values" in files[0]
            assert all(torch.equal(t, files[1][name]) for name, t in files[0].items())
        copied = copy.deepcopy(model)
        assert torch.equal(out(copied), out(model))
        average = torch.optim.swa_utils.AveragedModel(uora.load(Net(), tmp_path / "None"))
        average.update_parameters(model)
        assert same(rows(average.module), rows(model))
        uora.merge(model)
        torch.testing.assert_close(out(model), out(copied), atol=1e-5, rtol=1e-5)

    def test_a_mixed_batch_takes_each_its_rows(self) -> None:
        model = fresh(awake=False)
        optimizer = adam(model)
        train(model, optimizer, uora.Reinitializer(model, **INFORMED, **SALIENT, optimizer=optimizer), range(12))
        want = out(model)
        uora.inject(model, name="other", rank=4, targets="all")
        model.eval()
        with torch.no_grad(), uora.route(model, ["default"] * len(X)):
            torch.testing.assert_close(model(X), want, atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    def test_compiled_and_checkpointed_it_is_the_same_run_to_rounding(self) -> None:
        found = []
        for way in ("plain", "compiled", "checkpointed"):
            model = fresh(awake=False)
            model.norm = nn.Identity()  # which a checkpoint would give its statistics twice
            optimizer = adam(model)
            reinit = uora.Reinitializer(model, **INFORMED, **SALIENT, optimizer=optimizer)
            run: Any = {
                "plain": model, "compiled": torch.compile(model, backend="eager"),
                "checkpointed": lambda x, m=model: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False),
            }[way]  # fmt: skip
            train(model, optimizer, reinit, range(8), run)
            found.append((reinit.history().tolist(), out(model)))
        assert found[0][0] == found[1][0] == found[2][0] != []
        for _, got in found[1:]:
            torch.testing.assert_close(got, found[0][1], atol=1e-4, rtol=1e-4)


def in_one_of_two(rank: int, world: int, wrap: str) -> dict[str, Any]:
    model = fresh(awake=False)
    model.norm = nn.Identity()
    if wrap == "sharded":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    run = nn.parallel.DistributedDataParallel(model) if wrap == "ddp" else model
    optimizer = adam(model)
    mine = [(x[rank::world], y[rank::world]) for x, y in BATCHES]
    reinit = uora.Reinitializer(model, **{**INFORMED, "batches": mine}, **SALIENT, optimizer=optimizer)
    for step in range(10):
        optimizer.zero_grad()
        x, y = mine[step % 2]
        cross_entropy(run(x), y).backward()
        optimizer.step()
        reinit.step()
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
    return {
        "history": reinit.history().tolist(),
        "rows": rows(model),
        "d": [whole(a.d).detach() for a in uora.adapters(model).values()],
    }


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "sharded"])
def test_two_processes_draw_the_same_rows(tmp_path: Path, wrap: str) -> None:
    one, two = in_two_processes(tmp_path, in_one_of_two, wrap=wrap)
    assert one["history"] == two["history"] != []
    assert same(one["rows"], two["rows"]) and same(one["d"], two["d"])


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"criterion": "size"}, "criterion must be one of magnitude, saliency or a function, got 'size'"),
            ({"criterion": "saliency"}, "give relative=True"),
            ({"source": "gradient"}, "source must be one of random, informed, none, got 'gradient'"),
            ({"source": "informed", "scope": "layer"}, "needs batches="),
            ({**INFORMED, "scope": "shared"}, "needs scope='layer'.* in scope 'shared' all layers"),
            ({**INFORMED, "scope": "quorum"}, "needs scope='layer'"),
            ({**INFORMED, "batches": iter(BATCHES)}, "gone through again.*got list_iterator"),
            ({**INFORMED, "alpha": 0.1}, "alpha and interpolation mix"),
            ({**INFORMED, "interpolation": "spherical"}, "alpha and interpolation mix"),
            ({"batches": BATCHES}, "for source='informed', got source='random'"),
            ({"source": "none", "loss": lambda model, batch: None}, "for source='informed', got source='none'"),
        ],
    )
    def test_options(self, options: dict[str, Any], error: str) -> None:
        with pytest.raises(uora.ConfigError, match=error):
            uora.Reinitializer(fresh(), **options)

    def test_a_rank_that_leaves_no_room(self) -> None:
        with pytest.raises(uora.ConfigError, match=r"rank below every input width; the rank is 12 .*blocks.0.0 \(12\)"):
            uora.Reinitializer(uora.inject(Net(), rank=12, targets="all"), **INFORMED)

    def test_steps_that_cannot_be_told_from_what_is_there(self) -> None:
        model = fresh()
        with pytest.raises(uora.ConfigError, match=r"source='informed' clears the moments .* needs the optimizer"):
            uora.Reinitializer(model, **INFORMED).step()
        reinit = uora.Reinitializer(model, **SALIENT, optimizer=adam(model))
        with pytest.raises(uora.StateError, match=r"before optimizer.zero_grad\(\)"):
            reinit.step()
        assert reinit.steps == 0
        reinit = uora.Reinitializer(model, criterion=lambda d, grad: d.sum(), optimizer=adam(model))
        for adapter in uora.adapters(model).values():
            adapter.d.grad = torch.ones_like(adapter.d)
        with pytest.raises(uora.OptionError, match=r"shape \(4, 4\), and gave \(\)"):
            reinit.step()

    def test_the_state_of_another_criterion(self) -> None:
        model = fresh()
        one, two = uora.Reinitializer(model), uora.Reinitializer(model, **SALIENT, optimizer=adam(model))
        for reinit, state in ((one, two.state_dict()), (two, one.state_dict())):
            with pytest.raises(uora.FormatError, match="another criterion"):
                reinit.load_state_dict(state)
