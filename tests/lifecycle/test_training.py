"""Injected models in training: checkpointing, compilation, autocast, optimizers, copies, PEFT's VeRA beside ours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import kill, small_vit, wake
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import Checkpointed, assert_equal, gradients, injected

import uora_vision as uora

Make = Callable[..., nn.Module]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients(images: Tensor, reentrant: bool, dropout: float) -> None:
    model = injected(dropout=dropout, train=("head", "norm")).train()
    want = gradients(model, images)
    kill(model, {"blocks.0.attn.qkv.q": [1]})
    uora.Reinitializer(model, scope="layer").step()
    fired = gradients(model, images)
    images.requires_grad_()  # a reentrant checkpoint needs an input with a gradient
    model.blocks = nn.Sequential(*(Checkpointed(block, reentrant) for block in model.blocks))
    got = {n.replace(".block.", "."): g for n, g in gradients(model, images).items()}
    assert_equal(fired, got)
    assert any(not torch.equal(want[n], g) for n, g in fired.items())


@pytest.mark.parametrize(("scope", "backend"), [("shared", "aot_eager"), ("layer", "inductor")])
@pytest.mark.slow
def test_a_compiled_model_matches_eager_also_after_firings(images: Tensor, scope: str, backend: str) -> None:
    torch.compiler.reset()
    model = injected(depth=1, train=("head", "norm"))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    reinit = uora.Reinitializer(model, scope=scope)  # type: ignore[arg-type]
    outputs = []
    for _ in range(2):
        want = gradients(model, images)
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
        got = {n.removeprefix("_orig_mod."): g for n, g in gradients(compiled, images).items()}
        assert_equal(want, got, rtol=1e-4, atol=1e-5)
        outputs.append(compiled(images).detach())
        kill(model, {"blocks.0.attn.qkv.k": [1], "blocks.0.mlp.fc2.fc2": [0, 3]})
        assert reinit.step() >= 2
        wake(model, seed=1)  # so that what was redrawn is seen
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.slow
def test_firings_in_layer_scope_recompile_seldom(images: Tensor) -> None:
    """Own rows grow by doubling, so 16 firings of one layer one by one meet few shapes."""
    torch.compiler.reset()
    graphs: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(1)
        return graph

    model = injected(rank=16, depth=1, targets="mlp")
    compiled = torch.compile(model, fullgraph=True, backend=count)
    reinit = uora.Reinitializer(model, scope="layer")
    with torch.no_grad():
        for i in range(16):
            kill(model, {"blocks.0.mlp.fc1.fc1": [i]})
            reinit.step()
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 2


def batch(n: int = 24) -> tuple[Tensor, Tensor]:
    """Images whose class is in them."""
    y = torch.arange(n) % 7
    x = torch.randn(n, 3, 32, 32) * 0.5
    x[:, 0] += (y - 3)[:, None, None] * 0.5
    return x, y


@pytest.mark.slow
@pytest.mark.parametrize("scope", [None, "shared", "layer"])
@pytest.mark.parametrize("options", [{}, {"train": (), "init": "kaiming"}, {"dropout": 0.2, "train": ("head", "bias")}])
def test_training_learns_and_leaves_the_frozen_base_to_the_bit(options: dict[str, Any], scope: str | None) -> None:
    model = uora.inject(small_vit(), rank=16, **options).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(uora.param_groups(model, lr=4e-2, head_lr=1e-2, weight_decay=0.1))
    reinit = uora.Reinitializer(
        model, scope=scope or "shared", relative=scope is not None, threshold=0.05 if scope else 0.0
    )  # type: ignore[arg-type]
    x, y = batch()
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step(), reinit.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert (reinit.firings > 0) == (scope is not None)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


@pytest.mark.slow
def test_autocast_trains_in_bfloat16_with_float32_vectors() -> None:
    model = uora.inject(small_vit(depth=1), rank=16).train()
    optimizer = torch.optim.AdamW(uora.param_groups(model, lr=2e-2, head_lr=1e-2))
    x, y = batch(14)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            assert out.dtype == torch.bfloat16
            loss = cross_entropy(out.float(), y)
        loss.backward()
        assert all(
            p.grad is not None and p.grad.dtype == torch.float32
            for a in uora.adapters(model).values()
            for p in a.parameters()
        )
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_autocast_gradients_are_those_of_float32_to_within_bfloat16(images: Tensor) -> None:
    model = injected()
    exact = gradients(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(model, images)
    for name, grad in exact.items():
        assert (got[name] - grad).norm() < 0.05 * grad.norm(), name


@pytest.mark.slow
def test_a_bfloat16_base_trains() -> None:
    model = uora.inject(small_vit(depth=1).bfloat16(), rank=16, train=()).train()
    optimizer = torch.optim.AdamW(uora.param_groups(model, lr=1e-1))
    x, y = batch(14)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = cross_entropy(model(x.bfloat16()).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_evaluation_in_inference_mode_leaves_nothing_that_training_stumbles_over(images: Tensor) -> None:
    model = injected()
    with torch.inference_mode():
        model(images)
    before = gradients(model, images)
    kill(model, {"blocks.0.attn.qkv.q": [1]})
    assert uora.Reinitializer(model).step() == 1
    assert any(not torch.equal(before[n], g) for n, g in gradients(model, images).items())
    with torch.inference_mode():
        got = model(images)
    assert torch.equal(got, model(images))


class TestDropout:
    def test_acts_on_the_branch_in_training_alone(self, images: Tensor) -> None:
        model, plain = injected(dropout=0.4), injected()
        assert torch.equal(model(images), plain(images))
        model.train()
        assert (model(images) - model(images)).abs().max() > 1e-4
        for adapter in uora.adapters(model).values():
            nn.init.zeros_(adapter.b)
        assert torch.equal(model(images), model(images)), "the frozen branch sees the whole input"

    @pytest.mark.slow
    def test_keeps_the_mean(self) -> None:
        model = injected(dropout=0.5)
        adapter, x = uora.adapters(model)["blocks.0.mlp.fc1"], torch.randn(4, 64)
        linear = model.blocks[0].mlp.fc1
        want = linear(x)
        linear.train()
        with torch.no_grad():
            got = torch.stack([linear(x) for _ in range(3000)])
        assert adapter.training and (got.mean(0) - want).abs().max() < 6 * got.std(0).max() / 3000**0.5

    def test_at_zero_probability_training_is_folded_as_ever(self, images: Tensor) -> None:
        one, two = injected(dropout=0.0).train(), injected().eval()
        assert torch.equal(one(images), two(images))


class TestVera:
    @pytest.mark.slow  # importing PEFT takes most of it
    def test_peft_trains_to_the_same_numbers(self) -> None:
        """The control of every comparison: PEFT's VeRA with our A and B, several optimizer steps in float64."""
        peft = pytest.importorskip("peft")
        targets = ["proj", "fc1", "fc2"]
        pattern = r"blocks\.\d+\.(attn\.proj|mlp\.fc[12])"
        config = peft.VeraConfig(r=12, target_modules=pattern, d_initial=0.1, vera_dropout=0.0)
        theirs = peft.get_peft_model(small_vit().double(), config).double()
        ours = uora.inject(
            small_vit().double(), rank=12, targets=targets, layout="slice", init="kaiming", d_init=0.1, train=()
        ).double()
        with torch.no_grad():
            for module in theirs.modules():
                for name in ("vera_A", "vera_B"):
                    if (shared := getattr(module, name, None)) is not None:
                        mine = ours.uora.A256 if name == "vera_A" else ours.uora.B256.t()
                        assert shared["default"].shape == mine.shape
                        shared["default"].copy_(mine)
        mine, their = [], []
        for path, adapter in uora.adapters(ours).items():
            layer = theirs.base_model.model.get_submodule(path)
            mine += [adapter.b, adapter.d]
            their += [layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]]
        assert sum(p.numel() for p in mine) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
        x, y = batch(8)
        runs = []
        for model, vectors in ((ours, mine), (theirs, their)):
            optimizer = torch.optim.AdamW(vectors, lr=1e-2, weight_decay=0.0)
            for _ in range(6):
                optimizer.zero_grad()
                cross_entropy(model(x.double()), y).backward()
                optimizer.step()
            runs.append([model(x.double()).detach(), *(v.detach().flatten() for v in vectors)])
        for one, two in zip(*runs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
        assert max(v.abs().max() for v in runs[0][1::2]) > 1e-2


class TestCopies:
    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    def test_compute_the_same_and_live_by_themselves(
        self, images: Tensor, how: Callable[[nn.Module], nn.Module]
    ) -> None:
        model = injected()
        reinit = uora.Reinitializer(model, scope="layer")
        kill(model, {"blocks.0.attn.qkv.k": [1]})
        reinit.step()
        wake(model)
        twin = how(model)
        y = model(images)
        assert torch.equal(twin(images), y)
        banks = {id(a.bank) for a in uora.adapters(twin).values()}
        assert banks == {id(twin.uora)} and twin.uora is not model.uora
        kill(twin, {"blocks.0.attn.qkv.q": [2], "blocks.0.attn.qkv.k": [1]})
        uora.Reinitializer(twin).step()
        wake(twin, seed=5)
        assert torch.equal(model(images), y) and not torch.equal(twin(images), y)
        assert isinstance(twin.blocks[0].attn.qkv, nn.Linear)
        uora.merge(twin)
        assert [type(m) for m in twin.modules()] == [type(m) for m in small_vit().modules()]

    def test_a_moved_model_keeps_its_function(self, images: Tensor) -> None:
        model = injected()
        y = model(images)
        torch.testing.assert_close(model.double()(images.double()).float(), y, rtol=1e-4, atol=1e-5)
        assert {a.bank.a(64).dtype for a in uora.adapters(model).values()} == {torch.float64}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(accumulate: int) -> None:
    model = injected()
    x, y = batch(8)
    for xs, ys in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
        (cross_entropy(model(xs), ys) / accumulate).backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal(want, got, rtol=1e-3, atol=1e-6)
