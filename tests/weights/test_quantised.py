"""Quantised bases, on the real layers of bitsandbytes and torchao, against dense float64 matrices."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wake
from quantised_models import KINDS, TOKENS, WIDTH, codes, llama, logits, quantised_llama
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.maths.linear import add_update
from uora_vision.maths.update import Update
from uora_vision.weights.kinds import base_class
from uora_vision.weights.matrix import Span
from uora_vision.weights.quantised import dequantised

bnb = pytest.importorskip("bitsandbytes", reason="the quantised layers are bitsandbytes'")


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 50, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def dense_weight(module: nn.Module) -> Tensor:
    """(out, in), by what the layer itself answers to unit vectors, and not by the library's dequantisation."""
    bare = copy.deepcopy(module)
    bare.register_parameter("bias", None)
    with torch.no_grad():
        return bare(torch.eye(module.in_features)).t().double()


def reference(layer: Any, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The formula in float64 on the dense matrix of an adapted layer: y, and the gradients of x, b and d."""
    adapter = layer.uora
    bare = base_class(layer)
    plain = copy.deepcopy(layer)
    plain.__class__ = bare
    del plain.uora
    weight, bias = dense_weight(plain), layer.bias.detach().double()
    x, b, d = (t.detach().double().requires_grad_() for t in (x, adapter.b, adapter.d))
    (a,), (bm,) = adapter.matrices()
    y = x @ weight.t() + bias + (((x @ a.double().t()) * d[0]) @ bm.double().t()) * b
    grads = torch.autograd.grad(y, (x, b, d), g.double())
    return dict(zip(("y", "x", "b", "d"), (y.detach(), *grads), strict=True))


def one_layer(kind: str, rank: int) -> tuple[nn.Module, Any]:
    """An MLP of which the first layer is quantised and awake, and that layer."""
    model = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
    KINDS[kind](model)
    wake(uora.inject(model.eval(), rank=rank, targets="0"))
    return model, model[0]


@pytest.mark.parametrize("rank", [8, 60], ids=["keeps u", "keeps x"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_the_formula_on_its_dequantised_matrix(kind: str, rank: int) -> None:
    _, layer = one_layer(kind, rank)
    x, g = torch.randn(3, TOKENS, WIDTH, requires_grad=True), torch.randn(3, TOKENS, 96)
    y = layer(x)
    got = dict(zip("xbd", torch.autograd.grad(y, (x, layer.uora.b, layer.uora.d), g), strict=True)) | {"y": y}
    want = reference(layer, x, g)
    for name, value in want.items():
        # bitsandbytes rounds the inputs of an 8-bit layer to 8 bits, and multiplies in float16.
        tolerance = 0.03 if kind == "8bit" and name == "y" else 2e-3 if kind == "8bit" and name == "x" else 1e-5
        error = (got[name].double() - value).abs().max() / value.abs().max()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_is_what_the_layer_multiplies_with(kind: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 96))
    KINDS[kind](model)
    want = dense_weight(model[0])
    assert (dequantised(model[0]).double() - want).abs().max() < 1e-3 * want.abs().max()


def test_what_is_kept_for_the_backward_is_of_the_rank_not_of_the_output() -> None:
    x, y = torch.randn(50, 20), torch.randn(50, 48, requires_grad=True)
    b, d = torch.randn(48, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        add_update(x, y, Update(b, d, (Span(0, 48),), (torch.randn(4, 20),), (torch.randn(48, 4),)))
    assert (50, 4) in shapes and not {(50, 48), (50, 20)} & set(shapes)


@pytest.mark.parametrize("case", ["one", "parts", "per role"])
def test_the_sum_for_packed_projections(case: str) -> None:
    """Gradients of all inputs, by finite differences."""
    spans = (Span(0, 4), Span(6, 3)) if case == "parts" else (Span(0, 5), Span(5, 5))
    n = 2 if case == "per role" else 1
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    a, bm = tuple(draw(2, 6) for _ in range(n)), tuple(draw(s.rows, 2) for s in spans)
    rows = [r for s in spans for r in s.indices()]
    x, y, b, d = draw(3, 6), draw(3, 10), draw(len(rows)), draw(2, 2)
    leaves = [t.requires_grad_() for t in (x, y, b, d)]
    run = lambda x, y, b, d: add_update(x, y, Update(b, d, spans, a, bm))  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)
    parts = [((x @ a[k % n].t() * d[k]) @ bm[k].t()) * part
             for k, part in enumerate(b.split([s.rows for s in spans]))]  # fmt: skip
    want = y.index_add(1, torch.tensor(rows), torch.cat(parts, dim=1))
    torch.testing.assert_close(run(x, y, b, d), want)


@pytest.mark.parametrize("kind", KINDS)
class TestModels:
    def test_the_plan_is_that_of_the_unquantised_model(self, kind: str, tokens: Tensor) -> None:
        plain, packed = uora.plan(llama(), rank=8), uora.plan(quantised_llama(kind), rank=8)
        assert packed.to_dict() == plain.to_dict()
        assert {r.label for p in packed.projections for r in p.roles} == {
            "attn.q", "attn.k", "attn.v", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        }  # fmt: skip
        assert packed.projections[-1].shape == (WIDTH, 96)

    def test_injecting_changes_nothing_and_awake_adapters_something(self, kind: str, tokens: Tensor) -> None:
        model = quantised_llama(kind)
        before = logits(model, tokens)
        keys = list(model.state_dict())
        uora.inject(model, rank=8, example_input={"input_ids": tokens}, train=())
        assert torch.equal(logits(model, tokens), before)
        assert all(a.b.dtype == torch.float32 for a in uora.adapters(model).values())
        assert model.uora.A64.dtype == torch.float32
        with torch.no_grad():
            assert (logits(wake(model), tokens) - before).abs().max() > 1e-2
        assert torch.equal(logits(uora.remove(model), tokens), before) and list(model.state_dict()) == keys

    def test_a_trace_finds_no_fault(self, kind: str, tokens: Tensor) -> None:
        assert uora.plan(quantised_llama(kind), example_input={"input_ids": tokens}).differences == ()

    @pytest.mark.slow
    def test_trains(self, kind: str, tokens: Tensor) -> None:
        model = uora.inject(quantised_llama(kind), rank=8, train=()).train()
        before = [dense_weight(copy.deepcopy(m)) for m in codes(uora.remove(copy.deepcopy(model)))]
        optimizer = torch.optim.Adam(uora.param_groups(model, lr=1e-1))
        reinit = uora.Reinitializer(model, optimizer=optimizer, threshold=0.05)
        losses = []
        for _ in range(20):
            loss = model(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            reinit.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0] and reinit.firings > 0
        after = [dense_weight(m) for m in codes(uora.remove(model))]
        assert len(after) == 14 and all(map(torch.equal, before, after))

    def test_verify_summary_and_copies(self, kind: str, tokens: Tensor) -> None:
        model = uora.inject(quantised_llama(kind), rank=8, train=())
        assert len(uora.verify(model, {"input_ids": tokens})) == 14
        assert uora.summary(model).total == sum(p.numel() for p in llama().parameters())
        wake(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            assert torch.equal(logits(twin, tokens), logits(model, tokens))
            for adapter in uora.adapters(twin).values():
                adapter.b.zero_()
            assert not torch.equal(logits(twin, tokens), logits(model, tokens))

    def test_saves_and_loads(self, kind: str, tokens: Tensor, tmp_path: Path) -> None:
        model = wake(uora.inject(quantised_llama(kind), rank=8, train=()))
        uora.save(model, tmp_path)
        with torch.no_grad():
            assert torch.equal(logits(uora.load(quantised_llama(kind), tmp_path), tokens), logits(model, tokens))
        assert uora.adapters(uora.load(llama(), tmp_path)).keys() == uora.adapters(model).keys()

    def test_merging_is_refused_and_done_on_request(self, kind: str, tokens: Tensor) -> None:
        model = wake(uora.inject(quantised_llama(kind), rank=8, train=()), scale=0.3)
        with pytest.raises(uora.StateError, match=r"14 of 14 .*quantised.*merge\(model, dequantize=True\)"):
            uora.merge(model)
        assert len(uora.adapters(model)) == 14
        with torch.no_grad():
            want = logits(model, tokens)
        exact = {path: reference_sum(model.get_submodule(path)) for path in uora.adapters(model)}
        report = uora.merge(model, {"input_ids": tokens}, dequantize=True)
        assert [type(m) for m in model.modules()] == [type(m) for m in llama().modules()]
        assert list(model.state_dict()) == list(llama().state_dict())
        for path, weight in exact.items():
            merged = model.get_submodule(path).weight
            assert merged.dtype == torch.float32 and not merged.requires_grad
            assert (merged.double() - weight).abs().max() < 1e-3 * weight.abs().max()
        with torch.no_grad():
            error = (logits(model, tokens) - want).abs().max().item()
        assert report.weights == 14 and report.output_error == pytest.approx(error)
        assert error < (0.1 if kind == "8bit" else 1e-4) * want.abs().max()

    def test_dropout(self, kind: str) -> None:
        _, layer = one_layer(kind, 8)
        layer.uora.dropout = 0.5
        x = torch.randn(200, WIDTH)
        still = layer(x)
        assert not torch.equal(layer.train()(x), still)
        with torch.no_grad():
            mean = torch.stack([layer(x) for _ in range(100)]).mean(0)
            assert (mean - still).norm() < 0.2 * (layer(x) - still).norm()


def reference_sum(layer: Any) -> Tensor:
    plain = copy.deepcopy(layer)
    plain.__class__ = base_class(layer)
    del plain.uora
    return dense_weight(plain) + torch.cat(layer.uora.delta_weight(torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_models_train(kind: str, tokens: Tensor) -> None:
    model = uora.inject(quantised_llama(kind, torch.bfloat16), rank=8, train=()).train()
    optimizer = torch.optim.Adam(uora.param_groups(model, lr=1e-1))
    losses = []
    for _ in range(20):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(a.b.dtype == torch.float32 and a.b.grad.dtype == torch.float32 for a in uora.adapters(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_adds_to_the_type_of_the_layer(kind: str) -> None:
    model, layer = one_layer(kind, 8)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    want = reference(layer, x, torch.ones(TOKENS, 96))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == uora.remove(copy.deepcopy(model))[0](x).dtype
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.dtype == torch.float32
    for got, name in ((y, "y"), (x.grad, "x"), (layer.uora.b.grad, "b"), (layer.uora.d.grad, "d")):
        assert (got.double() - want[name]).abs().max() < 0.02 * want[name].abs().max(), name


def test_a_quantised_weight_that_the_model_reads_is_refused() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.fc1.weight).relu(), self.fc2.weight)

    model = Reader()
    KINDS["torchao int8"](model)
    with pytest.raises(uora.TargetError, match=r"fc1 \(.*\) is quantised, and the model reads .*exclude='fc1'"):
        uora.inject(model, rank=4)
    assert not [name for name, _ in model.named_parameters() if "uora" in name]


def test_a_layer_that_is_not_quantised_yet_is_refused() -> None:
    model = nn.Sequential(bnb.nn.Linear4bit(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
    with pytest.raises(uora.TargetError, match=r"Params4bit of torch\.float32"):
        uora.inject(model, rank=4)


def test_a_weight_packed_for_inference_does_not_lose_the_gradient_in_silence() -> None:
    model, layer = one_layer("nf4", 4)
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(uora.StateError, match=r"packed a 4-bit weight for inference.*load it again"):
        model(torch.randn(2, WIDTH))


def test_an_adapted_layer_is_never_packed_for_inference() -> None:
    model, layer = one_layer("nf4", 4)
    x = torch.randn(2, WIDTH)
    want, codes_before = model(x), layer.weight.data.clone()
    layer.support_avx512bf16_for_cpu = True  # as on a processor for which bitsandbytes packs
    with torch.no_grad():
        assert torch.equal(model(x), want)
    assert torch.equal(layer.weight.data, codes_before) and layer.support_avx512bf16_for_cpu
