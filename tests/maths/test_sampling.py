"""Token sampling: estimated gradients of b and d whose mean is the exact ones, and nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import small_vit, wake
from projections import Case, case, measured
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import uora_vision as uora
from uora_vision.maths.linear import add_update, project
from uora_vision.maths.token_sampling import depending

FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "folded": (203, {}),
    "factored": (9, {}),
    "an A for each role": (203, {"per_role": True}),
    "rows in another order": (203, {"spans": ((32, 16), (0, 16))}),
    "x kept": (203, {"rank": 40}),
}


class Sampled(Case):
    """A case that draws one token of every 4."""

    every = 4

    def call(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias, self.update, None, self.every)


def pair(**options: Any) -> tuple[Case, Sampled]:
    exact = case(**options)
    return exact, Sampled(exact.weight, exact.bias, exact.spans, exact.b, exact.d, exact.a, exact.bm)


def assert_mean(draws: list[dict[str, Tensor]], want: dict[str, Tensor]) -> None:
    """The mean of the draws is the exact gradient of b and d, to within what chance allows."""
    each = torch.stack([torch.cat([draw[name].flatten() for name in ("b", "d")]) for draw in draws])
    exact = torch.cat([want[name].flatten() for name in ("b", "d")])
    off = (each.mean(0) - exact) / (each.std(0) / len(draws) ** 0.5)
    assert each.std(0).min() > 0 and off.abs().max() < 5
    assert 0.5 < off.square().mean() < 2  # the errors are as large as chance makes them, no smaller


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_mean_gradient_is_the_exact_one(form: str) -> None:
    tokens, options = FORMS[form]
    exact, sampled = pair(**options)
    x, g = (torch.randn(tokens, n, dtype=torch.float64) + 0.5 for n in (20, 48))
    want = measured(exact, x, g, train_base=False)
    draws = [measured(sampled, x, g, train_base=False) for _ in range(600)]
    assert_mean(draws, want)
    for name in ("y", "x"):
        torch.testing.assert_close(draws[0][name], want[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_runs_of_equal_tokens_give_the_exact_gradient(form: str) -> None:
    """Whichever token is drawn, it stands for its run; the last run is shorter."""
    tokens, options = FORMS[form]
    exact, sampled = pair(**options)
    x, g = (torch.randn(tokens, n, dtype=torch.float64).repeat_interleave(4, dim=0)[: 4 * tokens - 3] for n in (20, 48))
    want, got = (measured(c, x, g, train_base=False) for c in (exact, sampled))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_over_a_layer_that_computes_its_own_output() -> None:
    c = case(spans=((0, 48),))
    x, g = torch.randn(203, 20, dtype=torch.float64), torch.randn(203, 48, dtype=torch.float64)
    y = x @ c.weight.t()

    def gradients(every: int) -> dict[str, Tensor]:
        leaves = {"x": x.detach().requires_grad_(), "b": c.b.requires_grad_(), "d": c.d.requires_grad_()}
        out = add_update(leaves["x"], y, c.update, None, every)
        return dict(zip(leaves, torch.autograd.grad((out * g).sum(), list(leaves.values())), strict=True))

    want, draws = gradients(1), [gradients(4) for _ in range(600)]
    assert_mean(draws, want)
    assert torch.equal(draws[0]["x"], want["x"])


def test_a_base_that_trains_has_the_exact_gradients() -> None:
    exact, sampled = pair()
    x, g = torch.randn(203, 20, dtype=torch.float64), torch.randn(203, 48, dtype=torch.float64)
    want, got = measured(exact, x, g), measured(sampled, x, g)
    assert all(torch.equal(got[name], value) for name, value in want.items())


@pytest.mark.parametrize("every", [2, 8])
def test_only_the_drawn_tokens_are_kept(every: int) -> None:
    _, sampled = pair()
    sampled.every = every
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        sampled.b.requires_grad_()
        sampled.call(torch.randn(203, 20, dtype=torch.float64, requires_grad=True))
    assert (-(-203 // every), 4) in kept and not [shape for shape in kept if shape and shape[0] == 203]


def model_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks_draw_the_same_tokens(images: Tensor, reentrant: bool) -> None:
    model = wake(uora.inject(small_vit(), rank=8, token_sampling=4)).train()
    want = model_gradients(model, images.requires_grad_())
    for block in model.blocks:
        block.forward = lambda x, run=block.forward: checkpoint(run, x, use_reentrant=reentrant)
    got = model_gradients(model, images)
    assert all(torch.equal(got[n], g) for n, g in want.items())
    state = torch.get_rng_state()
    model(images).sum().backward()
    assert not torch.equal(torch.get_rng_state(), state), "the next step would draw the same tokens"


@pytest.mark.slow
def test_only_training_is_sampled(images: Tensor) -> None:
    model = wake(uora.inject(small_vit(), rank=8, token_sampling=4))
    plain = wake(uora.inject(small_vit(), rank=8))
    assert all(torch.equal(g, model_gradients(plain, images)[n]) for n, g in model_gradients(model, images).items())
    model.train(), plain.train()
    torch.testing.assert_close(model(images), plain(images))
    want, got = model_gradients(plain, images), model_gradients(model, images)
    assert not torch.equal(got["blocks.0.mlp.fc1.uora.b"], want["blocks.0.mlp.fc1.uora.b"])
    assert torch.equal(got["head.weight"], want["head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_the_backward_takes_the_tokens_that_the_forward_drew(images: Tensor, backend: str) -> None:
    """A compiler may compute random numbers anew in the backward; then the mean would be another."""
    torch.compiler.reset()
    model = wake(uora.inject(small_vit(depth=1), rank=8, token_sampling=4)).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(model_gradients(compiled, images), model_gradients(compiled, images))

    def draw(run: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        run(images).square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if name.endswith(("uora.b", "uora.d"))}
        return {side: torch.cat([g.flatten() for n, g in grads.items() if n.endswith(side)]) for side in ("b", "d")}

    draws = [draw(compiled) for _ in range(200)]
    assert_mean(draws, draw(model.eval()))


def test_under_a_compiler_d_depends_on_the_draw_and_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    d, rows = torch.randn(2, 3), torch.tensor([0, 1, 5])
    assert depending(d, rows) is d
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert depending(d, None) is d
    assert torch.equal(depending(d, rows), d) and torch.equal(depending(d, rows[:1]), d)
    assert depending(d, rows - 1).isnan().all()


def test_saved_and_loaded(tmp_path: Any) -> None:
    uora.save(uora.inject(small_vit(), rank=8, token_sampling=4), tmp_path)
    model = uora.load(small_vit(), tmp_path)
    assert {a.token_sampling for a in uora.adapters(model).values()} == {4}


@pytest.mark.parametrize(
    "options", [{"token_sampling": 0}, {"token_sampling": 1.5}, {"token_sampling": 2, "dropout": 0.1}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(uora.ConfigError, match="token_sampling"):
        uora.UoraConfig(**options)
