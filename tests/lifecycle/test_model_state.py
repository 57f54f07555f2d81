"""Redraws are part of a model's state: whatever copies, averages or stores a model carries them, or refuses."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from redrawn import Net, X, made, out, redraw, same, wake
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import uora_vision as uora
from uora_vision.maths import carried
from uora_vision.maths.carried import Carried

SCOPES = ("shared", "quorum", "layer")


def expected(average: nn.Module, model: nn.Module) -> Tensor:
    """What an average must compute: its own vectors and base with the matrices of the model."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for mine, other in zip(twin.parameters(), average.parameters(), strict=True):
            mine.copy_(other)
        twin.norm.load_state_dict(average.norm.state_dict())
    return out(twin)


def in_double(model: nn.Module) -> Any:
    if "dtype" not in inspect.signature(timm.utils.ModelEmaV3).parameters:
        pytest.skip(f"ModelEmaV3 of timm {timm.__version__} takes no dtype")
    return timm.utils.ModelEmaV3(model, decay=0.9999, dtype=torch.float64)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "ModelEma": lambda m: timm.utils.ModelEma(m, decay=0.9),
    "ModelEmaV2": lambda m: timm.utils.ModelEmaV2(m, decay=0.9),
    "ModelEmaV2 slow": lambda m: timm.utils.ModelEmaV2(m, decay=0.9999),
    "ModelEmaV3": lambda m: timm.utils.ModelEmaV3(m, decay=0.9),
    "ModelEmaV3 one by one": lambda m: timm.utils.ModelEmaV3(m, decay=0.9, foreach=False),
    "ModelEmaV3 in double": in_double,
    "ModelEmaV3 without buffers": lambda m: timm.utils.ModelEmaV3(m, decay=0.9, exclude_buffers=True),
    "AveragedModel": AveragedModel,
    "AveragedModel with buffers": lambda m: AveragedModel(m, use_buffers=True),
    "AveragedModel, multi": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True),
    "AveragedModel, one": lambda m: AveragedModel(m, avg_fn=get_ema_avg_fn(0.999), use_buffers=True),
}

TURNS = [(how, SCOPES[number % 3]) for number, how in enumerate(AVERAGES)]
"""What an average does is nothing that hangs on the scope of a redraw."""


def inner(average: Any) -> nn.Module:
    return average.ema if isinstance(average, timm.utils.ModelEma) else average.module


def update(average: Any, model: nn.Module) -> None:
    average.update_parameters(model) if isinstance(average, AveragedModel) else average.update(model)


class TestAverages:
    @pytest.mark.parametrize(("how", "scope"), TURNS)
    def test_an_average_has_the_mean_vectors_and_the_matrices_of_its_model(self, how: str, scope: str) -> None:
        model = made()
        average = AVERAGES[how](model)
        update(average, model)
        for k in range(3):  # several before anybody looks at the average
            redraw(model, scope, times=2, quorum=0.1)
            update(average, model)
            update(average, model)
            if k == 1:
                continue
            got = inner(average)
            x = X.to(next(got.parameters()).dtype)
            got.eval()
            with torch.no_grad():
                torch.testing.assert_close(got(x).float(), expected(got, model), atol=1e-5, rtol=1e-5)
        assert inner(average).uora.log and inner(average).uora.digest == model.uora.digest

    @pytest.mark.parametrize(("how", "scope"), TURNS)
    def test_a_saved_average_is_the_average_also_of_a_model_that_is_gone(
        self, how: str, scope: str, tmp_path: Path
    ) -> None:
        model = made()
        average = AVERAGES[how](model)
        update(average, redraw(model, scope, quorum=0.1))
        del model
        uora.save(inner(average).float(), tmp_path)
        assert same(uora.load(Net(), tmp_path), inner(average))

    def test_only_what_was_averaged_follows(self) -> None:
        model = made()
        teacher, average = copy.deepcopy(model), AveragedModel(model)
        before = out(teacher)
        average.update_parameters(redraw(model))
        want = out(average.module)
        redraw(model, times=3)
        assert torch.equal(out(teacher), before) and torch.equal(out(average.module), want)

    @pytest.mark.parametrize("scope", SCOPES)
    def test_models_that_swap_their_tensors_swap_their_redraws(self, scope: str) -> None:
        """As Lightning's WeightAveraging does around validation."""
        model = redraw(made(), scope, quorum=0.1)
        average = AveragedModel(model, use_buffers=True)
        average.update_parameters(redraw(model, scope, quorum=0.1))
        average.update_parameters(redraw(model, scope, times=3, quorum=0.1))
        of_model, of_average = out(model), out(average.module)

        def swap() -> None:
            pairs = zip(
                (*average.module.parameters(), *average.module.buffers()), (*model.parameters(), *model.buffers()),
                strict=True,
            )  # fmt: skip
            for one, two in pairs:
                kept = one.data.clone()
                one.data.copy_(two.data)
                two.data.copy_(kept)

        redraw(average.module, scope, quorum=0.1)
        of_average = out(average.module)
        for want_model, want_average in ((of_average, of_model), (of_model, of_average)):
            swap()
            torch.testing.assert_close(out(model), want_model)
            torch.testing.assert_close(out(average.module), want_average)

    def test_a_mean_of_models_that_do_not_know_each_other_is_refused(self) -> None:
        one, two = redraw(made()), redraw(made(), "layer", times=2)
        with torch.no_grad():
            one.uora.mark.copy_((one.uora.mark + two.uora.mark + 0.1) / 3)
        with pytest.raises(uora.StateError, match="other redraws"):
            one(X)

    def test_a_cast_is_no_average(self) -> None:
        model = redraw(made(), times=2)
        want = out(model)
        assert torch.allclose(out(copy.deepcopy(model).bfloat16().float()), want, atol=0.05)
        model.to("meta").to_empty(device="cpu")
        assert torch.equal(model.uora.A12, redraw(made(), times=2).uora.A12)


class TestStateDicts:
    @pytest.mark.slow
    @pytest.mark.parametrize("scope", SCOPES)
    def test_a_state_dict_carries_redraws_to_and_from_any_state(self, scope: str) -> None:
        states = [made(), redraw(made(), scope, quorum=0.1), redraw(made(), scope, times=3, quorum=0.1)]
        states += [redraw(made(), other) for other in SCOPES if other != scope]
        for one in states:
            for two in states:
                model = copy.deepcopy(two)
                model.load_state_dict(one.state_dict())
                assert same(model, one) and [e.step for e in model.uora.log] == [e.step for e in one.uora.log]

    @pytest.mark.slow
    @pytest.mark.parametrize("scope", SCOPES)
    def test_a_compiled_model_computes_with_the_redraws_that_it_loaded(self, scope: str) -> None:
        model, other = made(), redraw(made(), scope, quorum=0.1)
        compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
        with torch.no_grad():
            compiled(X)
            model.load_state_dict(other.state_dict())
            assert torch.allclose(compiled(X), out(other), atol=1e-5)

    def test_through_a_file_in_another_process(self, tmp_path: Path) -> None:
        model = redraw(redraw(made()), "layer")
        torch.save(model.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        again = made()
        again.uora._family.logs.clear()
        again.load_state_dict(state)
        assert same(again, model)

    @pytest.mark.parametrize("option", [{"seed": 1}, {"init": "kaiming"}, {"layout": "slice"}, {"rank": 4, "seed": 2}])
    def test_matrices_of_another_first_draw_are_refused_before_anything_changes(self, option: dict[str, Any]) -> None:
        model, other = uora.inject(Net(), **{"rank": 4, "targets": "all"} | option), redraw(made())
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(uora.StateError, match=r"drawn with .* here with"):
            model.load_state_dict(other.state_dict())
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    @pytest.mark.slow
    @pytest.mark.parametrize("informed", [False, True])
    def test_matrices_that_a_file_gave_are_those_that_the_seed_draws(self, informed: bool, tmp_path: Path) -> None:
        drawn = uora.inject(Net(), rank=4, targets="all")
        if informed:
            uora.inform(drawn, [X], lambda model, x: model(x).square().mean())
        uora.save(drawn, tmp_path / "drawn")
        wake(drawn, 1)
        uora.save(redraw(drawn), tmp_path / "given", save_banks="all")
        given, want = uora.load(Net(), tmp_path / "given"), out(drawn)
        assert given.uora.given
        for source in (given, drawn):
            for target in ("given", "drawn"):
                model = wake(uora.load(Net(), tmp_path / target), 7)
                model.load_state_dict(source.state_dict())
                assert torch.equal(out(model), want)
        for other in (uora.inject(Net(), rank=4, targets="all", seed=5), made() if informed else None):
            if other is not None:
                with pytest.raises(uora.StateError, match="drawn with"):
                    other.load_state_dict(given.state_dict())
        given.uora._first["B24"] += 1  # as matrices of another origin
        with pytest.raises(uora.StateError, match="drawn with"):
            given.load_state_dict(drawn.state_dict())

    def test_other_layers_are_refused(self) -> None:
        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = Net()

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

        wrapped = uora.inject(Wrapped(), rank=4, targets="all")
        state = {k if k.startswith("uora.") else f"net.{k}": t for k, t in redraw(made(), "layer").state_dict().items()}
        with pytest.raises(uora.FormatError, match="does not have"):
            wrapped.load_state_dict(state)

    @pytest.mark.parametrize("at", [0, 4, 6, 12, 40])
    def test_damage_is_seen(self, at: int) -> None:
        state = redraw(made()).state_dict()
        state["uora._extra_state"][at] += 1
        model = made()
        before = out(model)
        with pytest.raises(uora.FormatError, match="cannot be read"):
            model.load_state_dict(state)
        assert torch.equal(out(model), before)

    def test_the_mean_of_checkpoints_with_the_same_redraws_loads_and_of_others_does_not(self) -> None:
        one = redraw(made())
        two, three = wake(copy.deepcopy(one), 9), redraw(copy.deepcopy(one))
        for other in (two, three):
            a, b = one.state_dict(), other.state_dict()
            mean = {name: (a[name].double() + b[name].double()) / 2 for name in a}
            model = made()
            if other is two:
                model.load_state_dict(mean)
                assert torch.allclose(out(model), expected(model, one), atol=1e-6)
            else:
                with pytest.raises(uora.FormatError, match="mean"):
                    model.load_state_dict(mean)

    def test_a_state_dict_without_its_redraws_is_told(self) -> None:
        state = dict(redraw(made()).named_parameters())
        with pytest.raises(RuntimeError, match="Missing"), pytest.warns(UserWarning, match="not its redraws"):
            made().load_state_dict(state)
        with pytest.warns(UserWarning, match="not its redraws"):
            made().load_state_dict(state, strict=False)

    @pytest.mark.slow
    def test_it_is_small_whatever_the_width_and_grows_with_the_log(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, early = redraw(made(), times=2), made()
        monkeypatch.setattr(carried, "banks", lambda: [model.uora, early.uora])  # the room is that of all in a process
        monkeypatch.setattr(Carried, "_room", 16384)
        assert sum(model.state_dict()[f"uora.{n}"].nbytes for n in ("mark", "_extra_state")) == 16384 + 64
        monkeypatch.setattr(Carried, "_room", 512)
        average = timm.utils.ModelEmaV3(model, decay=0.0)
        redraw(model, "layer", times=9)
        average.update(model)
        state = model.state_dict()
        assert len(state["uora._extra_state"]) == len(early.state_dict()["uora._extra_state"]) == 1024
        early.load_state_dict(state)
        assert same(early, model) and same(average.module, model)

    def test_the_base_takes_no_notice(self) -> None:
        model, base = redraw(made()), Net()
        want = out(model)
        assert set(model.load_state_dict(base.state_dict(), strict=False).missing_keys) >= {"uora.mark"}
        assert not any("uora" in name for name in base.load_state_dict(model.state_dict(), strict=False).missing_keys)
        torch.testing.assert_close(out(model), want)
        uora.remove(model)
        assert (
            not model._load_state_dict_pre_hooks
            and not model._load_state_dict_post_hooks
            and not any("uora" in name for name in model.state_dict())
        )

    def test_copies_and_pickles(self) -> None:
        for scope in SCOPES:
            model = redraw(made(), scope, quorum=0.1)
            torch.save(model, file := io.BytesIO())
            file.seek(0)
            for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
                assert torch.equal(out(twin), out(model))
                redraw(twin, scope, quorum=0.1)
                assert not same(twin, model) and len(twin.uora.log) == 2 * len(model.uora.log)
