"""What people do with models, on small real ones of every mechanism: copy, cast, store, average, compile, export."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import merged, wake
from mechanisms import MODELS, both, make, run
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision.maths.bank import Bank
from uora_vision.structure.example import float_tensors
from uora_vision.weights.matrix import from_matrix, to_matrix


def cast(args: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in args)


def loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, len(y), dtype=y.dtype)).sum()


def gradients(model: nn.Module, y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(y), vectors(model))


def vectors(model: nn.Module) -> list[Tensor]:
    return [p for adapter in uora.adapters(model).values() for p in (adapter.b, adapter.d)]


def dense_weights(model: nn.Module, plain: nn.Module, leaves: list[Tensor]) -> dict[str, Tensor]:
    """W + diag(b) B diag(d) A of every adapted weight, role by role, from b and d of each (`leaves`)."""
    found = {}
    for (path, adapter), all_b, all_d in zip(uora.adapters(model).items(), leaves[::2], leaves[1::2], strict=True):
        full = path if path in dict(plain.named_parameters()) else f"{path}.weight"
        weight = plain.get_parameter(full)
        matrix = to_matrix(weight, adapter.form)
        for role, b, d in zip(adapter.roles, all_b.split([r.rows for r in adapter.roles]), all_d, strict=True):
            a, bm = adapter.bank.a(adapter.width).to(weight.dtype), adapter.bank.b(role.rows).to(weight.dtype)
            matrix = matrix.index_add(0, torch.tensor(role.span.indices()), torch.diag(b) @ bm @ torch.diag(d) @ a)
        found[full] = from_matrix(matrix, adapter.form, weight.shape)
    return found


def dense(model: nn.Module, plain: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A plain copy of the base with W + dW in its weights."""
    plain = copy.deepcopy(plain).to(dtype)
    with torch.no_grad():
        for name, weight in dense_weights(model, plain, [v.to(dtype) for v in vectors(model)]).items():
            plain.get_parameter(name).copy_(weight)
    return plain


def close(got: Any, want: Any, tolerance: float = 1e-5) -> bool:
    """Whether a tensor, or each of several, is another to within a share of its norm."""
    pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
    return all((x.double() - y.double()).norm() <= tolerance * y.double().norm() for x, y in pairs)


one_of_each = pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith("_mm")])


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_dense_weights(name: str) -> None:
    """Also of every expert by itself."""
    plain, model, args = both(name)
    dtype, tolerance = torch.float64, 1e-9
    if "grouped_mm" in name:  # it knows no float64
        dtype, tolerance = torch.float32, 1e-4
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")
    leaves = [v.detach().double().requires_grad_() for v in vectors(model)]
    plain.double(), model.to(dtype)
    args, wide = cast(args, dtype), cast(args, torch.float64)
    for mode in (True, False):
        assert all(adapter.training is mode for adapter in uora.adapters(model.train(mode)).values())
    want = run(lambda *a: functional_call(plain, dense_weights(model, plain, leaves), a), wide)
    got = run(model, args)
    assert close(got, want, tolerance) and not close(run(plain, wide), want, 0.05)
    with torch.no_grad():
        assert close(run(model, args), want, tolerance)
    grads = torch.autograd.grad(loss(want), leaves)
    assert close(gradients(model, got), grads, tolerance) and all(g.any() for g in grads)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}
AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "ModelEmaV3": lambda model: timm.utils.ModelEmaV3(model, decay=0.75),
    "AveragedModel": lambda model: swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.75)),
}


def saved(model: nn.Module) -> io.BytesIO:
    torch.save(model, file := io.BytesIO())
    return io.BytesIO(file.getvalue())


class TestCopies:
    @one_of_each
    @pytest.mark.parametrize("how", COPIES)
    def test_a_copy_computes_the_same_and_is_its_own(self, name: str, how: str) -> None:
        plain, model, args = both(name)
        want, twin = run(model, args), COPIES[how](model)
        assert torch.equal(run(twin, args), want)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        (bank,) = (m for m in twin.modules() if isinstance(m, Bank))
        assert all(a.bank is bank for a in uora.adapters(twin).values())
        wake(twin, seed=2)
        assert torch.equal(run(model, args), want) and not close(run(twin, args), want, 0.01)
        twin.load_state_dict(model.state_dict())
        assert torch.equal(run(twin, args), want)
        uora.merge(twin)
        assert close(run(twin, args), want) and list(twin.state_dict()) == list(plain.state_dict())

    @one_of_each
    def test_replicas_as_data_parallel_makes_them(self, name: str) -> None:
        _, model, args = both(name)
        want, got = run(model, args), run(replicate(model), args)
        assert torch.equal(got, want) and close(gradients(model, got), gradients(model, want))
        with torch.no_grad():
            assert close(run(replicate(model), args), want)

    @one_of_each
    @pytest.mark.parametrize("how", AVERAGES)
    def test_an_average_over_time_has_the_mean_vectors_and_computes_with_them(self, name: str, how: str) -> None:
        _, model, args = both(name)
        average = AVERAGES[how](model)
        update = average.update if how == "ModelEmaV3" else average.update_parameters
        update(model)  # an AveragedModel takes the first as it is
        before = [p.detach().clone() for p in vectors(model)]
        update(wake(model, 2.0, seed=2))
        want = [0.75 * old + 0.25 * new for old, new in zip(before, vectors(model), strict=True)]
        assert close(vectors(average.module), want)
        averaged = dict(average.module.named_parameters())
        assert close(run(average, args), run(lambda *a: functional_call(model, averaged, a), args))


def replicate(model: nn.Module) -> nn.Module:
    """What torch.nn.parallel.replicate makes for one device, on the CPU: plain tensors that lead back to the model."""
    made: dict[Any, Any] = {t: t.clone() for t in (*model.parameters(), *model.buffers())}
    made |= {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module in model.modules():
        replica = made[module]
        for kind in ("_modules", "_parameters", "_buffers"):
            for key, value in getattr(module, kind).items():
                if value is None:
                    getattr(replica, kind)[key] = None
                else:
                    setattr(replica, key, made[value])
    return made[model]


class TestStates:
    @one_of_each
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_a_cast_model_computes_what_it_did_to_within_rounding(self, name: str, dtype: torch.dtype) -> None:
        plain, model, args = both(name)
        want = run(dense(model, plain), cast(args, torch.float64))
        {torch.float64: model.double, torch.bfloat16: model.bfloat16, torch.float16: model.half}[dtype]()
        assert {p.dtype for p in model.parameters()} == {dtype}
        tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.03, torch.float16: 0.006}[dtype]
        got = run(model, cast(args, dtype))
        assert got.dtype == dtype and close(got, want, tolerance)
        assert close(run(model.to(torch.float32), args), want, max(tolerance, 1e-5))

    @one_of_each
    def test_on_the_meta_device_it_has_the_shapes(self, name: str) -> None:
        _, model, args = both(name)
        want = run(model, args)
        model.to("meta")
        if "eager" not in name:  # which asks which experts were hit
            assert run(model, tuple(t.to("meta") for t in args)).shape == want.shape
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}

    @one_of_each
    def test_another_base_can_be_loaded_under_the_adapter(self, name: str) -> None:
        (plain, args), (other, _) = make(name), make(name)
        model = wake(uora.inject(plain, rank=4), 2.0)
        report = model.load_state_dict(other.state_dict(), strict=False)
        assert not report.unexpected_keys and len(report.missing_keys) == len(vectors(model)) + 2
        assert all(".uora" in f".{key}" for key in report.missing_keys)
        assert close(run(model, args), run(dense(model, other, torch.float32), args))

    @one_of_each
    def test_a_functional_call_uses_what_it_is_given(self, name: str) -> None:
        _, model, args = both(name)
        before, twin = run(model, args), wake(copy.deepcopy(model), 2.0, seed=5)
        want, got = run(twin, args), run(lambda *a: functional_call(model, dict(twin.named_parameters()), a), args)
        assert torch.equal(got, want) and not close(before, want, 0.01)
        assert all(g.any() for g in gradients(twin, got)) and torch.equal(run(model, args), before)

    @one_of_each
    def test_a_weight_can_be_assigned(self, name: str) -> None:
        plain, model, args = both(name)
        for path in uora.adapters(model):
            full = path if path in dict(plain.named_parameters()) else f"{path}.weight"
            owner, _, tensor = full.rpartition(".")
            new = nn.Parameter(torch.randn_like(plain.get_parameter(full)) * 0.2)
            for m in (model, plain):
                setattr(m.get_submodule(owner), tensor, new)
        assert close(run(model, args), run(dense(model, plain, torch.float32), args))
        assert model.state_dict().keys() == wake(uora.inject(plain, rank=4)).state_dict().keys()

    @one_of_each
    def test_reading_a_weight(self, name: str) -> None:
        """As stored where the module is called, W + dW where the model reads it."""
        plain, model, _ = both(name)
        summed, read = dense(model, plain, torch.float32), 0
        for p in uora.plan(plain, rank=4).projections:
            pair = (model, summed if p.read else plain)
            got, want = (getattr(m.get_submodule(p.module_path), p.tensor) for m in pair)
            torch.testing.assert_close(
                got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor), rtol=1e-5, atol=1e-6
            )
            read += p.read
        assert (read > 0) == (name not in ("vit", "convnext", "sequence", "gpt2"))

    @one_of_each
    def test_remove_gives_back_every_class_attribute_and_hook(self, name: str) -> None:
        model, args = make(name)
        for m in list(model.modules())[::3]:
            m.register_forward_hook(lambda *_: None)
        before, held, want = snapshot(model), holdings(model), run(model, args)
        wake(uora.inject(model, rank=4))
        run(model, args)
        uora.remove(model)
        assert_same(before, model)
        assert holdings(model) == held and torch.equal(run(model, args), want)


def holdings(model: nn.Module) -> dict[str, list[Any]]:
    """What is in every dict and list of every module, by identity."""
    held = {f"{n} {k}": v for n, m in model.named_modules() for k, v in vars(m).items() if isinstance(v, dict | list)}
    seen = lambda v: id(v() if isinstance(v, weakref.ref) else v)  # noqa: E731
    return {key: [seen(v) for v in (x.values() if isinstance(x, dict) else x)] for key, x in held.items()}


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "boolean": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "float": {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(2))},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "both": {"attn_mask": torch.ones(5, 5).triu(2).bool(), "key_padding_mask": torch.arange(10).view(2, 5) % 5 > 3},
    "unaveraged": {"average_attn_weights": False},
}  # fmt: skip


class TestAttention:
    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("mask", MASKS)
    def test_every_path_computes_with_the_adapter(self, mask: str, batch_first: bool, need_weights: bool) -> None:
        plain = nn.MultiheadAttention(16, 2, batch_first=batch_first).eval()
        nn.init.normal_(plain.in_proj_bias), nn.init.normal_(plain.out_proj.bias)
        model = wake(uora.inject(copy.deepcopy(plain), rank=4))
        x = torch.randn(2, 5, 16) if batch_first else torch.randn(5, 2, 16)
        options = {"need_weights": need_weights, **MASKS[mask]}
        want = dense(model, plain, torch.float32)(x, x, x, **options)
        with torch.no_grad(), torch.autograd.profiler.profile() as ran:
            fast = model(x, x, x, **options)
        native = "aten::_native_multi_head_attention" in {event.name for event in ran.function_events}
        assert native == (batch_first and mask != "float")
        assert (want[1] is None) != need_weights
        for result in (model(x, x, x, **options), fast):
            assert close([*float_tensors(result)], [*float_tensors(want)])
        assert not close(plain(x, x, x, **options)[0], want[0], 0.1)

    def test_an_encoder_over_nested_tensors(self) -> None:
        plain, model, (x,) = both("encoder")
        padding = MASKS["padding"]["key_padding_mask"]
        want = dense(model, plain, torch.float32)(x, None, padding)
        assert close(model(x, None, padding), want)
        with torch.no_grad(), torch.autograd.profiler.profile() as ran:
            got = model(x, None, padding)
        names = {event.name for event in ran.function_events}
        assert {"aten::_transformer_encoder_layer_fwd", "aten::_nested_tensor_from_mask"} <= names
        assert close(got[~padding], want[~padding]) and not got[padding].any()


class TestTraining:
    @one_of_each
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_gives_the_same_gradients(self, name: str, reentrant: bool) -> None:
        _, model, args = both(name)
        want, leaf = run(model, args), torch.ones((), requires_grad=True)
        got = checkpoint(lambda one: run(model, args) * one, leaf, use_reentrant=reentrant)
        loss(got).backward()
        assert close(got, want) and close([p.grad for p in vectors(model)], gradients(model, want))

    @pytest.mark.slow
    def test_threads_with_and_without_gradients_do_not_meet(self) -> None:
        _, model, args = both("mixtral, eager")
        want = run(model, args)
        grads, wrong = gradients(model, want), []

        def work(grad: bool) -> None:
            for _ in range(20):
                with torch.set_grad_enabled(grad):
                    got = run(model, args)
                if got.requires_grad != grad or not close(got, want):
                    wrong.append("output")
                if grad and not close(gradients(model, got), grads):
                    wrong.append("gradient")

        threads = [threading.Thread(target=work, args=(grad,)) for grad in (False, True, True, False)]
        [t.start() for t in threads], [t.join() for t in threads]
        assert not wrong and not any("folds" in key for m in model.modules() for key in vars(m))


COMPILED = {  # which part of each model: compiling all of them takes a minute
    "vit": "blocks.0.mlp", "convnext": "stages.0.blocks.0.mlp", "beit": "blocks.0.attn", "encoder": "layers.0",
    "lstm": "", "gpt2": "transformer.h.0.mlp", "mixtral, grouped_mm": "model.layers.0.mlp.experts",
    "gpt_oss, batched_mm": "model.layers.0.mlp.experts",
}  # fmt: skip


class TestCompilers:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", COMPILED)
    def test_compiled_in_one_graph_it_computes_as_it_did(self, name: str) -> None:
        _, model, args = both(name)
        want, part = run(model, args), model.get_submodule(COMPILED[name])
        part.compile(backend="aot_eager", fullgraph=not isinstance(part, nn.LSTM))  # torch leaves LSTMs uncompiled
        got = run(model, args)
        assert close(got, want) and close(gradients(model, got), gradients(model, want))

    @pytest.mark.parametrize("how", ["trace", "export"])
    @pytest.mark.parametrize("name", ["vit", "lstm"])
    @pytest.mark.slow
    def test_a_merged_model_can_be_traced_and_exported(self, name: str, how: str) -> None:
        _, model, args = both(name)
        want, plain = run(model, args), merged(model)
        made = torch.jit.trace(plain, args) if how == "trace" else torch.export.export(plain, args).module()
        assert close(run(made, args), want)
