"""Compiled models are compiled once: batches of other sizes, steps, firings and switches of the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import kill, small_vit, wake
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.functional import cross_entropy
from training import Checkpointed, assert_equal, gradients, injected

import uora_vision as uora


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        torch.compiler.reset()
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return aot_eager(graph, inputs)


def compiled(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Counting]:
    backend = Counting()
    return torch.compile(model, fullgraph=True, backend=backend), backend


def batch(n: int) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_batches_of_any_size_take_two_graphs() -> None:
    """One for the first size, one for all others."""
    model = injected(depth=1)
    run, backend = compiled(model)
    for n in (2, 3, 5, 7):
        close(run(batch(n)), model(batch(n)))
    assert backend.graphs <= 2


@pytest.mark.slow
def test_sizes_that_take_another_form_need_one_more_graph() -> None:
    mlp = injected(depth=1).blocks[0].mlp
    run, backend = compiled(mlp)
    for n, graphs in ((10, 1), (20, 2), (50, 2), (52, 3), (70, 3)):  # 64 x 256 is folded from 52 tokens on
        x = torch.randn(n, 1, 64)
        close(run(x), mlp(x))
        assert backend.graphs == graphs, n


@pytest.mark.slow
def test_steps_and_shared_firings_do_not_recompile() -> None:
    model, x = injected(depth=1).train(), batch(3)
    run, backend = compiled(model)
    optimizer = torch.optim.AdamW(uora.param_groups(model, lr=1e-2, head_lr=1e-2))
    reinit = uora.Reinitializer(model)
    for step in range(5):
        optimizer.zero_grad()
        y = run(x)
        close(y, model(x))
        cross_entropy(y, torch.arange(3)).backward()
        optimizer.step()
        if step % 2:
            kill(model, {"blocks.0.attn.qkv.q": [step]})
            assert reinit.step() == 1
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("second", [{}, {"seed": 4, "rank": 4, "targets": "qv"}], ids=["alike", "another"])
def test_switching_adapters_compiles_once_for_each(second: dict[str, Any]) -> None:
    model, x = injected(depth=1), batch(3)
    wake(uora.inject(model, name="second", **{"rank": 8, **second}), seed=2)
    run, backend = compiled(model)
    outputs = []
    for name in ("default", "second") * 3:
        uora.activate(model, name)
        outputs.append(run(x))
        close(outputs[-1], model(x))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2
    assert backend.graphs <= 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_whose_inputs_are_kept_on_the_host_give_the_same_bits(images: Tensor, reentrant: bool) -> None:
    model = injected(dropout=0.3).train()
    want = gradients(model, images)
    images.requires_grad_()  # a reentrant checkpoint needs an input with a gradient
    model.blocks = nn.Sequential(*(Checkpointed(block, reentrant) for block in model.blocks))
    with torch.autograd.graph.save_on_cpu():
        got = {n.replace(".block.", "."): g for n, g in gradients(model, images).items()}
    assert_equal(want, got)


def test_activations_kept_on_the_host_give_the_same_bits(images: Tensor) -> None:
    model = injected()
    want = gradients(model, images)
    with torch.autograd.graph.save_on_cpu():
        assert_equal(want, gradients(model, images))


@pytest.mark.slow
def test_equal_blocks_share_their_graphs() -> None:
    """One for the first block, whose input needs no gradient, and one for all others; so for each further size."""
    model, plain = injected(depth=4).train(), injected(depth=4).train()
    backend = Counting()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    graphs = []

    def compare(n: int, scope: str | None = None) -> None:
        for one in (model, plain) if scope else ():
            reinit = uora.Reinitializer(one, threshold=1e-3, scope=scope)  # type: ignore[arg-type]
            kill(one, {layer: [1, 2] for layer in reinit.layers})
            assert reinit.step()
        assert_equal(gradients(model, batch(n)), gradients(plain, batch(n)), atol=1e-5, rtol=1e-4)
        graphs.append(backend.graphs)

    compare(3)
    compare(3, "shared")
    compare(5)
    compare(7)
    for one in (model, plain):
        wake(uora.inject(one, rank=8, seed=1, name="two"), seed=7)
    compare(7)
    for one in (model, plain):
        uora.activate(one, "default")
    compare(7)
    assert graphs == [2, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("path", ["", "blocks.1", "blocks.1.attn.qkv"])
@pytest.mark.slow
def test_parts_that_were_compiled_in_place_can_be_adapted(path: str) -> None:
    for ran in (True, False):
        model, base = small_vit(), small_vit()(batch(3))
        model.get_submodule(path).compile(backend=Counting())
        if ran:
            close(model(batch(3)), base)
        wake(uora.inject(model, rank=4))
        want = wake(uora.inject(small_vit(), rank=4))
        close(model(batch(3)), want(batch(3)))
        with uora.disabled(model):
            close(model(batch(3)), base)
        for one in (model, want):
            wake(one, seed=5)
        close(model(batch(3)), want(batch(3)))
        uora.merge(model)
        torch.testing.assert_close(model(batch(3)), want(batch(3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["informed", "svd"])
@pytest.mark.slow
def test_equal_blocks_share_their_graphs_with_rows_of_their_own(way: str) -> None:
    """As with shared matrices; and whatever replaces the tensors of the bank is followed."""
    models = []
    for _ in range(2):
        model = uora.inject(small_vit(depth=4).train(), rank=4, init="svd" if way == "svd" else "haar")
        if way == "informed":
            uora.inform(model, [batch(4)], lambda model, x: model(x).square().mean())
        models.append(wake(model))
    model, plain = models
    backend = Counting()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)

    def compare() -> None:
        close(model(batch(3)), plain(batch(3)))

    reinits = [uora.Reinitializer(one, threshold=1e-3) for one in models]

    def redraw() -> None:
        for one, reinit in zip(models, reinits, strict=True):
            kill(one, {layer: [1, 2] for layer in reinit.layers})
            assert reinit.step()
            wake(one, seed=3)

    compare()
    assert backend.graphs <= 2
    state = model.state_dict()
    for one in models:
        one.double().float()
    redraw()
    compare()
    for one in models:
        wake(uora.inject(one, rank=4, name="two"), seed=7)
    compare()
    for one in models:
        uora.activate(one, "default")
    redraw()
    compare()
    for one in models:
        one.load_state_dict(state)
    compare()
    assert backend.graphs <= 4  # two of the second adapter, whose matrices are shared
    with pytest.raises(AssertionError):  # that it was no other all the time
        close(model(batch(3)), small_vit(depth=4)(batch(3)))
