"""Informed rows: against whole gradients in float64, and whatever an adapter with them goes through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged, small_vit, wake
from mechanisms import MODELS, make, run
from safetensors.torch import load_file
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision.integrations.state import restore
from uora_vision.lifecycle.informing import informed_rows, put_informed_rows
from uora_vision.maths.informed import narrowest
from uora_vision.storage.folder import TENSOR_FILE
from uora_vision.structure.survey import Survey
from uora_vision.weights.matrix import take, to_matrix


def batches(count: int = 2, classes: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 32, 32, generator=generator), (torch.arange(6) + k) % classes) for k in range(count)]


def fresh(rank: int = 8, **options: Any) -> nn.Module:
    model = small_vit()
    nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(9))
    return uora.inject(model, rank=rank, **options)


def informed(**options: Any) -> nn.Module:
    model = fresh()
    uora.inform(model, batches(), **options)
    return model


def rows(model: nn.Module) -> dict[str, Tensor]:
    return {path: adapter.matrices()[0][0] for path, adapter in uora.adapters(model).items()}


class TestRows:
    @pytest.mark.parametrize("name", MODELS)
    def test_they_hold_nearly_all_that_rows_can_hold_of_the_gradient(self, name: str) -> None:
        """Of each weight: |G A^T|^2 against the sum of its r largest squared singular values, G in float64."""
        plain, args = make(name)
        noise = torch.randn(run(plain, args).shape, generator=torch.Generator().manual_seed(3))
        loss = lambda model, batch: (run(model, batch) * noise).sum()  # noqa: E731
        model = uora.inject(copy.deepcopy(plain), rank=4)
        uora.inform(model, [args], loss, store="float32")
        exact = copy.deepcopy(plain).requires_grad_(True)
        loss(exact, args).backward()
        seen = 0
        for path, adapter in uora.adapters(model).items():
            held = Survey(exact).parameters.get(path) or Survey(exact).parameters[f"{path}.weight"]
            whole = to_matrix(held.tensor.grad, adapter.form).double()
            g = torch.cat([take(whole, role.span) for role in adapter.roles])
            a = adapter.matrices()[0][0].double()
            best = torch.linalg.svdvals(g)[:4].square().sum()
            if (
                adapter.width <= 4
                or not best > 0
                or adapter.bank.matrix("A", adapter.width, (adapter.origin, ""))[-2] != ":"
            ):
                continue
            torch.testing.assert_close(a @ a.t(), torch.eye(4).double(), atol=1e-5, rtol=0)
            shared = [n for n, o in uora.adapters(model).items() if o.bank.matrix("A", o.width, (o.origin, ""))
                      == adapter.bank.matrix("A", adapter.width, (adapter.origin, ""))]  # fmt: skip
            assert (g @ a.t()).square().sum() > (0.85 if len(shared) == 1 else 0.5) * best, path
            seen += 1
        assert seen

    def test_what_a_packed_weight_shares_separate_ones_share_too(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

            def forward(self, x: Tensor) -> Tensor:
                q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
                return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v))

        torch.manual_seed(0)
        model = uora.inject(nn.Sequential(*(Attention() for _ in range(2))), rank=4)
        x = torch.randn(3, 5, 16)
        uora.inform(model, [x], lambda model, batch: model(batch).square().sum())
        bank = uora.adapters(model)["0.q_proj"].bank
        assert bank.widths.informed == {
            "0.q_proj": "A16:0", "0.k_proj": "A16:0", "0.v_proj": "A16:0", "0.o_proj": "A16:1",
            "1.q_proj": "A16:2", "1.k_proj": "A16:2", "1.v_proj": "A16:2", "1.o_proj": "A16:3",
        }  # fmt: skip

    def test_by_width_all_weights_of_a_width_share(self) -> None:
        model = informed(share="width")
        names = uora.adapters(model)["blocks.0.attn.qkv"].bank.widths.informed
        assert {path.rpartition(".")[2]: name for path, name in names.items()} == {
            "qkv": "A64:0", "proj": "A64:0", "fc1": "A64:0", "fc2": "A256:0",
        }  # fmt: skip
        assert len({id(t) for t in rows(model).values()}) == 2

    def test_few_classes_give_few_rows_and_random_ones_fill_up(self) -> None:
        torch.manual_seed(0)
        model = uora.inject(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), rank=8)
        x = torch.randn(3, 16)
        with pytest.warns(uora.UoraWarning, match=r"gradients of 2 weights have a lower rank .* 8: 0 \(3\), 2 \(3\)"):
            shares = uora.inform(model, [x], lambda model, batch: model(batch).square().sum(), store="float32")
        assert min(shares.values()) == pytest.approx(1)
        for a in rows(model).values():
            torch.testing.assert_close(a @ a.t(), torch.eye(8), atol=1e-5, rtol=0)

    def test_they_learn_in_a_step_what_random_rows_cannot(self) -> None:
        """With b = 0 a step of plain descent on b lowers the loss at first order by |dL/db|^2, which is |G A^T| in
        part: more with rows along G."""

        def decrease(model: nn.Module) -> float:
            x, y = batches(1)[0]
            nn.functional.cross_entropy(model(x), y).backward()
            return sum(a.b.grad.square().sum().item() for a in uora.adapters(model).values())

        assert decrease(informed()) > 2 * decrease(fresh())

    @pytest.mark.slow
    def test_the_model_computes_with_the_rounded_rows(self) -> None:
        assert {narrowest(a) for a in rows(informed()).values()} == {"int8"}
        assert {narrowest(a) for a in rows(informed(store="float16")).values()} == {"float16"}
        assert {narrowest(a) for a in rows(informed(store="float32")).values()} == {"float32"}


class TestModel:
    def test_it_computes_what_it_did_before_and_nothing_of_the_pass_is_left(self) -> None:
        model, (x, _) = fresh(), batches(1)[0]
        torch.manual_seed(7)
        before, state = model.eval()(x), torch.get_rng_state()
        kept = snapshot(model)
        uora.inform(model, batches())
        assert torch.equal(model(x), before) and torch.equal(torch.get_rng_state(), state)
        after = snapshot(model)
        del kept["state"]["uora.mark"], after["state"]["uora.mark"], kept["state"]["uora._extra_state"]
        del after["state"]["uora._extra_state"]  # which say that these are other rows
        changed = {part for part in kept if not _equal(kept[part], after[part])}
        assert changed <= {"buffers", "attributes"}  # the rows, and the bank that has them
        assert all(p.grad is None for p in model.parameters())

    def test_merging_removing_and_copying(self) -> None:
        model, (x, _) = wake(informed(), 0.3), batches(1)[0]
        want = model.eval()(x)
        assert torch.equal(copy.deepcopy(model)(x), want)
        torch.testing.assert_close(merged(copy.deepcopy(model))(x), want, atol=1e-4, rtol=1e-4)
        assert torch.equal(uora.remove(model)(x), uora.remove(fresh().eval())(x))

    def test_it_takes_turns_with_others_and_is_routed_beside_them(self) -> None:
        model, (x, _) = wake(informed()), batches(1)[0]
        mine = model.eval()(x)
        wake(uora.inject(model, rank=8, name="plain"), seed=1)
        plain = model.eval()(x)
        uora.activate(model, "default")
        assert torch.equal(model(x), mine) and not torch.allclose(mine, plain)
        with uora.route(model, ["default", "plain", None, "default", "plain", "default"]):
            out = model(x)
        for i, want in ((0, mine), (1, plain), (3, mine)):
            torch.testing.assert_close(out[i], want[i], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("scope", ["shared", "layer"])
    def test_its_directions_are_redrawn_too(self, scope: Any) -> None:
        model = wake(informed())
        before = {path: a.clone() for path, a in rows(model).items()}
        reinit = uora.Reinitializer(model, threshold=0.05, scope=scope)
        assert reinit.step() > 0
        after = {path: adapter.matrices()[0] for path, adapter in uora.adapters(model).items()}
        assert any(not torch.equal(before[path], a[0]) for path, a in after.items())
        names = {event.matrix for event in uora.adapters(model)["blocks.0.attn.qkv"].bank.log}
        assert any(":" in name for name in names) == (scope == "shared")

    @pytest.mark.parametrize("scope", ["shared", "layer"])
    def test_a_reinitializer_made_before_redraws_the_new_rows(self, scope: Any) -> None:
        model = fresh()
        early = uora.Reinitializer(model, threshold=0.05, scope=scope)
        uora.inform(model, batches())
        late, other = wake(model), wake(informed())
        assert early.step() == uora.Reinitializer(other, threshold=0.05, scope=scope).step() > 0
        assert torch.equal(late(batches(1)[0][0]), other(batches(1)[0][0]))
        assert uora.adapters(model)["blocks.0.attn.qkv"].bank.log

    @pytest.mark.parametrize("options", [{}, {"init": "kaiming"}, {"init": "kaiming", "layout": "slice"}])
    def test_rates_stay_and_rows_are_as_long_as_those_before(self, options: dict[str, Any]) -> None:
        """So an optimizer that was made before, or in a run that is resumed, has the same groups."""
        model = fresh(**options)
        before, length = uora.param_groups(model), {path: a.norm() for path, a in rows(model).items()}
        uora.inform(model, batches())
        after = uora.param_groups(model)
        assert [(g["lr"], len(g["params"])) for g in after] == [(g["lr"], len(g["params"])) for g in before]
        for path, a in rows(model).items():
            assert a.norm().item() == pytest.approx(length[path].item(), rel=0.01)


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_equal(v, two[k]) for k, v in one.items())
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


def trained() -> nn.Module:
    return wake(fresh())


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], type[Exception], str]] = {
    "trained": (trained, {}, uora.StateError, "has trained"),
    "informed": (informed, {}, uora.StateError, "informed already"),
    "merged": (lambda: merged(trained(), reversible=True), {}, uora.StateError, "merged reversibly"),
    "no adapter": (small_vit, {}, uora.StateError, r"call inject\(\)"),
    "no batches": (fresh, {"batches": []}, uora.OptionError, "no batches"),
    "NaN": (fresh, {"loss": lambda m, b: m(b[0]).sum() * float("nan")}, uora.OptionError, "finite number, got nan"),
    "no number": (fresh, {"loss": lambda m, b: m(b[0])}, uora.OptionError, "one finite number"),
    "no loss": (fresh, {"batches": [{"x": torch.randn(2, 3, 32, 32)}]}, uora.OptionError, "give loss="),
    "no labels": (fresh, {"batches": [torch.randn(2, 3, 32, 32)]}, uora.OptionError, "give loss="),
    "no gradient": (fresh, {"loss": lambda m, b: m(b[0]).detach().sum()}, uora.DeadAdapterError, "no gradient"),
    "share": (fresh, {"share": "all"}, uora.ConfigError, "input, width"),
    "store": (fresh, {"store": "int4"}, uora.ConfigError, "float32, float16, int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_informed_is_told_and_left_alone(case: str) -> None:
    make_model, options, error, text = REFUSED[case]
    model = make_model()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        uora.inform(model, **{"batches": batches(), **options})
    assert_same(before, model)


def test_a_head_of_zeros_is_told() -> None:
    model = fresh()
    nn.init.zeros_(model.head.weight)
    with pytest.raises(uora.DeadAdapterError, match="head of zeros"):
        uora.inform(model, batches())


def test_routed_and_disabled_models_are_refused() -> None:
    model = fresh()
    with uora.disabled(model), pytest.raises(uora.StateError, match="disabled"):
        uora.inform(model, batches())
    with uora.route(model, ["default"] * 6), pytest.raises(uora.StateError, match="routed"):
        uora.inform(model, batches())


def test_an_interrupt_in_the_middle_changes_nothing() -> None:
    model = fresh()
    before = snapshot(model)

    def stop(model: nn.Module, batch: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uora.inform(model, batches(), stop)
    assert_same(before, model)


class TestFiles:
    @pytest.mark.parametrize("store", ["float32", "float16", "int8"])
    @pytest.mark.parametrize("share", ["input", "width"])
    def test_a_saved_adapter_comes_back_to_the_bit(self, tmp_path: Path, share: Any, store: Any) -> None:
        model, (x, _) = wake(informed(share=share, store=store)), batches(1)[0]
        want = model.eval()(x)
        uora.save(model, tmp_path)
        loaded = uora.load(small_vit(), tmp_path)
        assert torch.equal(loaded(x), want)
        again = tmp_path / "again"
        uora.save(loaded, again)
        first, second = load_file(tmp_path / TENSOR_FILE), load_file(again / TENSOR_FILE)
        assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())

    @pytest.mark.slow
    def test_the_file_is_as_large_as_its_rows(self, tmp_path: Path) -> None:
        size = {}
        for name, model in {
            "drawn": fresh(),
            "int8": informed(),
            "float16": informed(store="float16"),
            "float32": informed(store="float32"),
            "width": informed(share="width"),
        }.items():
            size[name] = (uora.save(model, tmp_path / name) / TENSOR_FILE).stat().st_size
        numbers = 8 * 2 * (3 * 64 + 256)
        assert 0 <= size["int8"] - size["drawn"] - numbers < 1000
        assert size["float16"] - size["int8"] == pytest.approx(numbers, abs=200)
        assert size["float32"] - size["float16"] == pytest.approx(2 * numbers, abs=200)
        assert size["width"] - size["drawn"] < 8 * (64 + 256) + 1000

    @pytest.mark.parametrize("scope", ["shared", "layer"])
    def test_redraws_of_informed_rows_come_back(self, tmp_path: Path, scope: Any) -> None:
        model, (x, _) = wake(informed()), batches(1)[0]
        assert uora.Reinitializer(model, threshold=0.05, scope=scope).step() > 0
        wake(model, seed=4)
        uora.save(model, tmp_path)
        assert torch.equal(uora.load(small_vit(), tmp_path)(x), model.eval()(x))

    @pytest.mark.slow
    def test_one_of_the_same_rows_shares_the_bank_and_others_do_not(self, tmp_path: Path) -> None:
        uora.save(wake(informed()), tmp_path / "a")
        uora.save(wake(informed(share="width")), tmp_path / "b")
        model = uora.load(small_vit(), tmp_path / "a", name="a")
        uora.load(model, tmp_path / "a", name="again")
        uora.load(model, tmp_path / "b", name="b")
        banks = {}
        for name in uora.adapter_names(model):
            uora.activate(model, name)
            banks[name] = next(iter(uora.adapters(model).values())).bank
        assert banks["a"] is banks["again"] is not banks["b"]

    def test_another_head_and_a_wrapper(self, tmp_path: Path) -> None:
        model, (x, _) = wake(informed()), batches(1)[0]
        uora.save(model, tmp_path)
        wrapped = nn.Module()
        wrapped.backbone = small_vit()
        uora.load(wrapped, tmp_path)
        assert torch.equal(wrapped.backbone(x), model.eval()(x))

    @pytest.mark.parametrize("export", [uora.export.to_peft_lora, uora.export.to_peft_vera])
    def test_exports_are_the_same_function(self, tmp_path: Path, export: Any) -> None:
        peft = pytest.importorskip("peft")
        model, (x, _) = wake(informed(), 0.3), batches(1)[0]
        report = export(model, tmp_path)
        assert report.worst == 0
        there = peft.PeftModel.from_pretrained(small_vit(), tmp_path).eval()
        torch.testing.assert_close(there(x), model.eval()(x), atol=1e-4, rtol=1e-4)

    @pytest.mark.slow
    def test_a_state_dict_goes_to_a_model_with_the_same_rows_alone(self) -> None:
        model, (x, _) = wake(informed()), batches(1)[0]
        same = informed()
        same.load_state_dict(model.state_dict())
        assert torch.equal(same.eval()(x), model.eval()(x))
        for other in (fresh(), informed(share="width")):
            before = snapshot(other)
            with pytest.raises(uora.StateError, match="A and B are drawn with"):
                other.load_state_dict(model.state_dict())
            assert_same(before, other)

    @pytest.mark.slow
    def test_a_checkpoint_puts_rows_back(self, tmp_path: Path) -> None:
        model = informed(store="float16")
        state = copy.deepcopy(informed_rows(model))
        wake(model)
        saved = uora.save(model, tmp_path)
        for other in (fresh(), informed(share="width")):
            put_informed_rows(other, state)
            assert all(torch.equal(a, rows(model)[path]) for path, a in rows(other).items())
            assert torch.equal(wake(other)(batches(1)[0][0]), model(batches(1)[0][0]))
        for other in (fresh(), informed(share="width"), informed(store="float16")):
            restore(other, saved)
            assert torch.equal(other(batches(1)[0][0]), model(batches(1)[0][0]))
        assert informed_rows(fresh()) == {}
        put_informed_rows(other, {})
        assert informed_rows(other) == {} and torch.equal(
            rows(other)["blocks.0.attn.qkv"], rows(fresh())["blocks.0.attn.qkv"]
        )
