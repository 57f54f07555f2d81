"""A and B taken from the frozen weights: against torch's SVD in float64, and in whatever an adapter goes through."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged, outputs, small_vit, wake
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanisms import MODELS, make, run
from safetensors.torch import load_file
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.lifecycle import apply
from uora_vision.maths.draws import keyed_generator, singular_rows
from uora_vision.maths.rounding import round_rows
from uora_vision.storage.folder import TENSOR_FILE
from uora_vision.structure.survey import Survey
from uora_vision.weights.matrix import take, to_matrix

SHARED = Path(__file__).parents[3] / "shared" / "models"


def fresh(rank: int = 8, base: nn.Module | None = None, **options: Any) -> nn.Module:
    return uora.inject(small_vit() if base is None else base, rank=rank, init="svd", **options)


def matrices(model: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for a in uora.adapters(model).values() for side in a.matrices() for t in side]


def same(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(matrices(one), matrices(two), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6))]


def singular(w: Tensor, rank: int = 8) -> tuple[Tensor, Tensor]:
    return singular_rows(w, rank, keyed_generator(0, "x"))


class TestVectors:
    @pytest.mark.parametrize("name", MODELS)
    def test_they_are_the_leading_singular_vectors_of_each_projection(self, name: str) -> None:
        plain, args = make(name)
        model = uora.inject(copy.deepcopy(plain), rank=2, init="svd")
        with torch.no_grad():
            torch.testing.assert_close(run(model, args), run(plain, args), atol=1e-5, rtol=1e-5)
        places, seen = Survey(plain).parameters, 0
        for path, adapter in uora.adapters(model).items():
            held = places.get(path) or places[f"{path}.weight"]
            whole = to_matrix(held.tensor.detach(), adapter.form).bfloat16().double()
            A, B = adapter.matrices()
            for k, role in enumerate(adapter.roles):
                u, s, v = torch.linalg.svd(take(whole, role.span))
                a, b = A[k % len(A)].double(), B[k % len(B)].t().double()
                if (s[:2] / s[1:3] if len(s) > 2 else s[:1] / s[1:2]).min() < 1.01:
                    continue
                torch.testing.assert_close((a @ v[:2].t()).abs(), torch.eye(2).double(), atol=0.02, rtol=0)
                torch.testing.assert_close((b @ u[:, :2]).abs(), torch.eye(2).double(), atol=0.02, rtol=0)
                signs = (a * v[:2]).sum(1).sign() * (b * u.t()[:2]).sum(1).sign()
                assert (signs > 0).all(), "A and B are pairs"
                seen += 1
        assert seen

    @settings(max_examples=30, deadline=None)
    @given(rows=st.integers(8, 24), width=st.integers(8, 24), seed=st.integers(0, 999))
    def test_before_rounding_they_are_those_of_float64(self, rows: int, width: int, seed: int) -> None:
        w = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        a, b = singular(w, 5)
        s = torch.linalg.svdvals(w)
        torch.testing.assert_close((b @ w @ a.t()).diag(), s[:5], atol=1e-9, rtol=0)
        for t in (a, b):
            torch.testing.assert_close(t @ t.t(), torch.eye(5).double(), atol=1e-9, rtol=0)

    @pytest.mark.parametrize("values", [[3, 2, 2, 2, 1], [3, 3, 1, 1, 1], [1, 1, 1, 1, 1], [3, 2, 1, 0, 0], [0] * 5])
    def test_equal_singular_values_do_not_leave_it_to_last_bits(self, values: list[float]) -> None:
        """Where any basis of their vectors is one, noise of last bits must not choose."""
        g = torch.Generator().manual_seed(0)
        u, v = (torch.linalg.qr(torch.randn(12, n, generator=g, dtype=torch.float64)).Q for n in (5, 5))
        w = u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.t()
        want = singular(w, 4)
        for _ in range(4):
            noise = max(values) * 1e-16 * torch.randn(12, 12, generator=g, dtype=torch.float64)
            for got, side in zip(singular(w + noise, 4), want, strict=True):
                torch.testing.assert_close(got, side, atol=1e-9, rtol=0)
                torch.testing.assert_close(got @ got.t(), torch.eye(4).double(), atol=1e-9, rtol=0)
        a, b = want
        torch.testing.assert_close((b @ w @ a.t()).diag(), torch.tensor(values[:4], dtype=torch.float64))

    def test_cutting_through_equal_values_gives_the_same_first_rows(self) -> None:
        g = torch.Generator().manual_seed(0)
        w = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
        torch.testing.assert_close(singular(w, 3)[0], singular(w, 7)[0][:3])

    def test_signs_are_not_those_of_lapack(self, monkeypatch: pytest.MonkeyPatch) -> None:
        w = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        want, eigh = singular(w), torch.linalg.eigh
        monkeypatch.setattr(torch.linalg, "eigh", lambda m: (eigh(m)[0], -eigh(m)[1]))
        for got, side in zip(singular(w), want, strict=True):
            torch.testing.assert_close(got, side)

    def test_they_are_the_same_in_any_number_of_threads(self) -> None:
        base = small_vit()
        found, before = [], torch.get_num_threads()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                found.append(fresh(base=copy.deepcopy(base)))
            finally:
                torch.set_num_threads(before)
        assert same(found[0], found[1]) and same(found[0], found[2])

    def test_a_base_in_another_type_has_the_same(self) -> None:
        base = small_vit()
        want = fresh(base=copy.deepcopy(base)).uora._first
        for dtype in (torch.float64, torch.bfloat16):
            got = fresh(base=copy.deepcopy(base).to(dtype)).uora._first
            assert got.keys() == want.keys() and all(torch.equal(t, want[name]) for name, t in got.items())

    def test_rates_are_those_of_orthonormal_matrices(self) -> None:
        groups = [
            [(len(g["params"]), g["lr"]) for g in uora.param_groups(uora.inject(small_vit(), rank=8, init=init))]
            for init in ("haar", "svd")
        ]
        assert [n for n, _ in groups[0]] == [n for n, _ in groups[1]]
        assert [lr for _, lr in groups[0]] == pytest.approx([lr for _, lr in groups[1]], rel=0.01)


class TestLife:
    @pytest.mark.slow
    def test_files_hold_none_of_them_and_load_to_the_bit(self, images: Tensor, tmp_path: Path) -> None:
        base = small_vit()
        model = wake(fresh(base=copy.deepcopy(base)), 2.0)
        drawn = wake(uora.inject(copy.deepcopy(base), rank=8), 2.0)
        sizes = []
        for name, of in (("svd", model), ("haar", drawn)):
            uora.save(of, tmp_path / name)
            sizes.append((tmp_path / name / TENSOR_FILE).stat().st_size)
        assert abs(sizes[0] - sizes[1]) < 64 and set(load_file(tmp_path / "svd" / TENSOR_FILE)) == set(
            load_file(tmp_path / "haar" / TENSOR_FILE)
        )
        loaded = uora.load(copy.deepcopy(base), tmp_path / "svd")
        assert same(model, loaded) and torch.equal(outputs(model, images), outputs(loaded, images))
        other = fresh(base=copy.deepcopy(base))
        other.load_state_dict(model.state_dict())
        assert torch.equal(outputs(model, images), outputs(other, images))
        assert torch.equal(outputs(copy.deepcopy(model), images), outputs(model, images))
        torch.testing.assert_close(outputs(merged(model), images), outputs(loaded, images), atol=1e-5, rtol=1e-5)

    @pytest.mark.slow
    def test_another_base_is_refused_and_a_file_with_all_loads_there(self, images: Tensor, tmp_path: Path) -> None:
        model, other = wake(fresh(), 2.0), small_vit(seed=5)
        uora.save(model, tmp_path / "a")
        with pytest.raises(uora.FormatError, match="made for other weights"):
            uora.load(other, tmp_path / "a")
        with pytest.raises(uora.FormatError, match=r"init='svd' are taken from the weights of the base, and come out"):
            uora.load(other, tmp_path / "a", check_base=False)
        assert not hasattr(other, "uora")
        uora.save(model, tmp_path / "all", save_banks="all")
        loaded = uora.load(other, tmp_path / "all", check_base=False)
        assert same(model, loaded)
        uora.save(loaded, tmp_path / "again")
        assert same(uora.load(small_vit(seed=5), tmp_path / "again"), model), "what was given stays in the file"
        with pytest.raises(uora.StateError, match="taken from the weights of another base"):
            fresh(base=small_vit(seed=5)).load_state_dict(model.state_dict())

    def test_adapters_of_one_base_share_them(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        model = wake(fresh(), 2.0)
        uora.save(model, tmp_path)
        monkeypatch.setattr(apply, "rows_of_weight", lambda *a: pytest.fail("they are there"))
        uora.inject(model, name="second", rank=8, init="svd")
        uora.load(model, tmp_path, name="third")
        first, third = (model.__dict__["_uora_library"].entries[name].bank for name in ("default", "third"))
        assert first is third

    def test_informed_rows_of_a_stand_beside_b(self, images: Tensor, tmp_path: Path) -> None:
        base = small_vit()
        nn.init.normal_(base.head.weight, std=0.1)
        model = fresh(base=copy.deepcopy(base))
        before = outputs(model, images)
        b = [t.clone() for a in uora.adapters(model).values() for t in a.matrices()[1]]
        uora.inform(model, batches())
        assert torch.equal(outputs(model, images), before)
        adapter = uora.adapters(model)["blocks.0.attn.qkv"]
        assert [len(side) for side in adapter.matrices()] == [1, 3], "q, k and v share A, and have B of their own"
        assert all(map(torch.equal, b, [t for a in uora.adapters(model).values() for t in a.matrices()[1]]))
        wake(model, 2.0)
        uora.save(model, tmp_path)
        assert "banks/shared" not in load_file(tmp_path / TENSOR_FILE), "the base gives B still"
        loaded = uora.load(copy.deepcopy(base), tmp_path)
        assert same(model, loaded) and torch.equal(outputs(model, images), outputs(loaded, images))

    @pytest.mark.parametrize("scope", ["shared", "layer"])
    @pytest.mark.parametrize("source", ["random", "informed"])
    @pytest.mark.slow
    def test_redraws_are_of_one_projection_and_go_on(self, scope: str, source: str, tmp_path: Path) -> None:
        if (scope, source) == ("shared", "informed"):
            scope = "layer"
        base = small_vit()
        model = wake(fresh(base=copy.deepcopy(base)), 1.0)
        more = {"batches": batches()} if source == "informed" else {}
        optimizer = torch.optim.AdamW(uora.param_groups(model))
        reinit = uora.Reinitializer(model, scope=scope, source=source, optimizer=optimizer, **more)  # type: ignore[arg-type]
        before = [[t.clone() for t in side] for side in uora.adapters(model)["blocks.0.attn.qkv"].matrices()]
        with torch.no_grad():
            uora.adapters(model)["blocks.0.attn.qkv"].d[1, 3] = 0.0
        assert reinit.step() == 1
        for side, old in zip(uora.adapters(model)["blocks.0.attn.qkv"].matrices(), before, strict=True):
            assert torch.equal(side[0], old[0]) and torch.equal(side[2], old[2])
        changed = uora.adapters(model)["blocks.0.attn.qkv"].matrices()[0][1] != before[0][1]
        assert changed.any(1).nonzero().flatten().tolist() == [3]
        uora.save(model, tmp_path)
        loaded = uora.load(copy.deepcopy(base), tmp_path)
        assert same(model, loaded)
        again = fresh(base=copy.deepcopy(base))
        again.load_state_dict(model.state_dict())
        resumed = uora.Reinitializer(again, scope=scope, source=source, optimizer=optimizer.__class__(  # type: ignore[arg-type]
            uora.param_groups(again)), **more)  # fmt: skip
        resumed.load_state_dict(reinit.state_dict())
        assert same(model, again)

    def test_a_mixed_batch(self, images: Tensor) -> None:
        model = wake(fresh(), 1.0)
        want = [outputs(model, images)]
        wake(uora.inject(model, name="two", rank=8, init="svd"), 2.0, seed=3)
        want.append(outputs(model, images))
        with torch.no_grad(), uora.route(model, ["default", "two"]):
            got = model.eval()(images[:2])
        torch.testing.assert_close(got, torch.stack([want[0][0], want[1][1]]), atol=1e-5, rtol=1e-5)

    def test_low_rank_factors_are_the_same_function(self) -> None:
        from uora_vision.interop.low_rank import factors

        model = wake(fresh(), 2.0)
        for adapter in uora.adapters(model).values():
            rows = sum(role.rows for role in adapter.roles)
            left, right = factors(adapter, rows)
            torch.testing.assert_close(left @ right, torch.cat(adapter.delta_weight(torch.float64)))


class TestRefused:
    def test_a_rank_beyond_the_smaller_side(self) -> None:
        with pytest.raises(uora.ConfigError, match=r"init='svd' gives as many .* 65, .*blocks.0.attn.qkv \(64\)"):
            fresh(rank=65)

    def test_one_matrix_of_all(self) -> None:
        with pytest.raises(uora.ConfigError, match="layout='slice' one of all"):
            uora.UoraConfig(init="svd", layout="slice")

    @pytest.mark.parametrize("kind", ["meta", "nan"])
    def test_weights_without_values(self, kind: str) -> None:
        base = small_vit()
        if kind == "meta":
            base = base.to("meta")
        else:
            base.blocks[0].mlp.fc1.weight.data[0, 0] = torch.nan
        with pytest.raises(uora.ConfigError, match="on the meta device" if kind == "meta" else "fc1 has values that"):
            fresh(base=base)
        assert not hasattr(base, "uora") and base.blocks[0].mlp.fc1.weight.requires_grad
        assert uora.plan(base, rank=8, init="svd").parameters


@pytest.mark.slow
def test_compiled_in_one_graph(images: Tensor) -> None:
    model = wake(fresh(), 1.0).eval()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), outputs(model, images), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "torchao int8"])
def test_of_a_quantised_base_they_are_of_what_the_codes_stand_for(kind: str, tmp_path: Path) -> None:
    from quantised_models import quantised_llama

    from uora_vision.weights.quantised import dequantised

    base = quantised_llama(kind)
    w = dequantised(base.get_submodule("model.layers.0.self_attn.q_proj")).bfloat16().double()
    model = wake(uora.inject(base, rank=4, init="svd", train=()), 1.0)
    a, b = uora.adapters(model)["model.layers.0.self_attn.q_proj"].matrices()
    u, _, v = torch.linalg.svd(w)
    torch.testing.assert_close((a[0].double() @ v[:4].t()).abs(), torch.eye(4).double(), atol=0.03, rtol=0)
    torch.testing.assert_close((b[0].t().double() @ u[:, :4]).abs(), torch.eye(4).double(), atol=0.03, rtol=0)
    uora.save(model, tmp_path)
    assert same(uora.load(quantised_llama(kind), tmp_path), model)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no real models beside the repository")
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "stories260K"])
def test_real_models(name: str, tmp_path: Path) -> None:
    """No entry of A and B hangs on the algorithm: LAPACK's SVD gives the same after rounding."""
    import timm
    import transformers

    def base() -> nn.Module:
        if name == "stories260K":
            return transformers.AutoModelForCausalLM.from_pretrained(SHARED / name)
        return timm.create_model(f"local-dir:{SHARED / name}", pretrained=True, dynamic_img_size=True)

    model = wake(uora.inject(base(), rank=16, init="svd", blocks=[0, -1], train=()), 1.0)
    x = torch.arange(12)[None] if name == "stories260K" else torch.randn(1, 3, 56, 56)
    whole, places = Survey(base()).parameters, 0
    for path, adapter in uora.adapters(model).items():
        for k, role in enumerate(adapter.roles):
            w = take(to_matrix(whole[f"{path}.weight"].tensor.detach(), adapter.form), role.span).bfloat16().double()
            u, _, v = torch.linalg.svd(w, full_matrices=False)
            A, B = adapter.matrices()
            a, b = A[k % len(A)], B[k % len(B)].t()
            for got, want in ((a, v[:16]), (b, u.t()[:16])):
                want = want * (got.double() * want).sum(1, keepdim=True).sign()
                assert torch.equal(got, round_rows(want.float().contiguous(), "int8")), path
            places += 1
    assert places == 14 if name == "stories260K" else places == 12
    uora.save(model, tmp_path)
    loaded = uora.load(base(), tmp_path)
    model.eval(), loaded.eval()
    with torch.no_grad():
        assert torch.equal(run(model, (x,)), run(loaded, (x,)))
