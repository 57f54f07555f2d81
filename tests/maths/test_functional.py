"""The adapted projection, against the formula written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from projections import FEW, MANY, Case, assert_agree, case, measured, reference, reference_weight
from torch import Tensor
from torch.nn.functional import linear

from uora_vision.maths.convolution import Geometry, convolve
from uora_vision.maths.forms import fold_form, reuses
from uora_vision.maths.formula import vector_gradients
from uora_vision.maths.linear import add_update, delta, delta_weight, fold, project
from uora_vision.weights.matrix import FORMS, Form, to_matrix

SPANS = {
    "one": (((0, 48),), 48),
    "equal": (((0, 16), (16, 16), (32, 16)), 48),
    "unequal": (((0, 8), (8, 8), (16, 32)), 48),
    "partial": (((16, 16),), 48),
    "with gaps": (((4, 10), (30, 6)), 48),
    "only the first": (((0, 16),), 48),
    "interleaved": (((0, 16, 4, 12), (4, 16, 4, 12), (8, 16, 4, 12)), 48),
    "interleaved, unequal": (((0, 12, 4, 16), (4, 36, 12, 16)), 48),
    "interleaved, one of three": (((4, 16, 4, 12),), 48),
    "every other row": (((0, 24, 1, 2), (1, 24, 1, 2)), 48),
    "runs that end before the weight": (((2, 6, 2, 5), (20, 4)), 48),
}


@pytest.mark.parametrize("shape", [(20,), (1, 20), (2, 3, 20), (4, 50, 20), (2, 7, 7, 20), (0, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions_are_kept(shape: tuple[int, ...], bias: bool) -> None:
    c = case(bias=bias)
    x, g = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 48, dtype=torch.float64)
    got = measured(c, x, g)
    assert got["y"].shape == (*shape[:-1], 48) and got["x"].shape == shape
    if x.numel():
        assert_agree(got, reference(c, x, g), 1e-12)


@pytest.mark.parametrize("tokens", [2, 60])
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_and_gradients_may_be_views_in_another_order(tokens: int, bias: bool) -> None:
    c = case(bias=bias)
    x = torch.randn(20, tokens, 2, dtype=torch.float64).permute(2, 1, 0)
    g = torch.randn(48, 2, tokens, dtype=torch.float64).permute(1, 2, 0)
    assert not x.is_contiguous() and not g.is_contiguous()
    assert_agree(measured(c, x, g), reference(c, x, g), 1e-12)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Spans and the rows of their weight: roles one after the other, or by turns; with rows of none; in any order."""
    spans: list[tuple[int, ...]] = []
    at = 0
    if draw(st.booleans()):
        for gap, rows in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=4)):
            spans.append((at + gap, rows))
            at += gap + rows
    else:
        blocks, runs = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)), draw(st.integers(2, 4))
        stride = sum(blocks) + draw(st.integers(0, 2))
        for block in blocks:
            spans.append((at, runs * block, block, stride))
            at += block
        at = runs * stride
    if draw(st.booleans()):
        spans = draw(st.permutations(spans))
    return tuple(spans), at + draw(st.integers(0, 3))


@settings(max_examples=150, deadline=None)
@given(
    layout=st.one_of(layouts(), st.sampled_from(list(SPANS.values()))),
    width=st.integers(1, 24),
    rank=st.integers(1, 60),
    tokens=st.integers(1, 60),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 10**6),
)
@example((((0, 16), (16, 16), (32, 16)), 48), 2, 2, 1, (True, True, False, False), 0)  # an A each, one B, one token
@example(SPANS["one"], 20, 8, 3, (False, True, True, True), 0)  # fewer tokens than the rank: no L
@example(SPANS["equal"], 20, 8, 3, (False, True, True, True), 0)
def test_output_and_gradients_follow_the_formula(
    layout: tuple[tuple[tuple[int, ...], ...], int],
    width: int,
    rank: int,
    tokens: int,
    flags: tuple[bool, ...],
    seed: int,
) -> None:
    (spans, out), (per_role, shared_b, bias, train_base) = layout, flags
    c = case(spans, out, width, rank, per_role, bias, shared_b, seed=seed)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    gradient = torch.randn(tokens, out, generator=g, dtype=torch.float64)
    assert_agree(measured(c, x, gradient, train_base), reference(c, x, gradient), 1e-10)


@pytest.mark.parametrize("tokens", [FEW, 30])
@pytest.mark.parametrize("rank", [2, 30])
@pytest.mark.slow
def test_gradcheck(tokens: int, rank: int) -> None:
    c = case(((0, 4), (6, 5)), 12, 5, rank)
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    leaves = (x, c.weight, c.bias, c.b, c.d)
    run = lambda x, w, bias, b, d: project(x, w, bias, c.update._replace(b=b, d=d))  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in leaves if t is not None))


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize(("base", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_base_types(base: torch.dtype, tolerance: float, tokens: int) -> None:
    c = case(base=base, vectors=torch.float32)
    x, g = torch.randn(tokens, 20).to(base), torch.randn(tokens, 48).to(base)
    got = measured(c, x, g)
    assert got["y"].dtype == base and got["x"].dtype == base and got["b"].dtype == torch.float32
    assert_agree(got, reference(c, x, g), tolerance)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_type_and_leaves_gradients_in_theirs(base: torch.dtype, tokens: int) -> None:
    c = case(base=base, vectors=torch.float32)
    x, g = torch.randn(tokens, 20), torch.randn(tokens, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = measured(c, x, g)
    assert got["y"].dtype == torch.bfloat16
    assert got["x"].dtype == torch.float32 and got["weight"].dtype == base and got["d"].dtype == torch.float32
    assert_agree(got, reference(c, x, g), 2e-2)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_autocast_of_another_half_type_than_the_base(tokens: int) -> None:
    c = case(base=torch.float16, vectors=torch.float32)
    x, g = torch.randn(tokens, 20), torch.randn(tokens, 48).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = measured(c, x, g, train_base=False)
    assert_agree(got, reference(c, x, g), 2e-2)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_without_gradients_the_same_numbers(tokens: int) -> None:
    c = case(base=torch.float32, vectors=torch.float32)
    x = torch.randn(tokens, 20)
    with torch.no_grad():
        silent = c.call(x)
    c.b.requires_grad_()
    torch.testing.assert_close(silent, c.call(x).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("base", [torch.float32, torch.float64])
def test_with_b_zero_the_output_is_that_of_the_base_to_the_bit(base: torch.dtype, tokens: int) -> None:
    c = case(base=base, vectors=torch.float32)
    c.b.zero_()
    x = torch.randn(tokens, 20, dtype=base)
    assert torch.equal(c.call(x), linear(x, c.weight, c.bias))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_nothing_of_size_tokens_by_out_is_kept_for_backward(base: torch.dtype, autocast: bool) -> None:
    tokens, width, out, rank = 500, 24, 72, 4
    c = case(((0, 24), (24, 24), (48, 24)), out, width, rank, base=base, vectors=torch.float32)
    c.b.requires_grad_(), c.d.requires_grad_()
    banks = {t.data_ptr() for t in (c.weight, c.bias, c.b, c.d, *c.a, *c.bm) if t is not None}
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in banks:
            kept.append(t)
        return t

    x = torch.randn(tokens, width, dtype=torch.float32 if autocast else base, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=autocast):
        c.call(x)
    # Of a weight that autocast rounds, the frozen layer keeps the rounded copy for its backward, and so does this one.
    # Of a weight in a half type, L is kept where the tokens are more than its rows.
    made = out * rank if base == torch.bfloat16 else width * out if autocast else 0
    assert sum(t.numel() for t in kept) == tokens * rank + made


def test_of_one_input_one_reduced_copy_is_kept_per_distinct_a() -> None:
    kept: list[Any] = []
    for per_role in (False, True):
        c = case(rank=2, per_role=per_role, base=torch.float32, vectors=torch.float32)
        c.b.requires_grad_()
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(tuple(t.shape)) or t, lambda t: t):
            c.call(torch.randn(MANY, 20))
        kept.append(shapes.count((MANY, 2)))
    assert kept == [1, 3]


def test_at_a_large_rank_the_input_is_kept_rather_than_a_wider_product() -> None:
    c = case(rank=64, base=torch.float32, vectors=torch.float32)
    c.b.requires_grad_()
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        c.call(torch.randn(MANY, 20))
    assert (MANY, 20) in shapes and (MANY, 64) not in shapes


def young(width: int, base: torch.dtype, bias: bool = False) -> tuple[Case, Tensor]:
    """A case whose dW, 2^-12, is an eighth of what moves a bfloat16 number between 1 and 2; and that dW."""
    c = case(((0, width),), width, width, 4, bias=bias, base=base, vectors=torch.float32)
    c.weight.copy_(1 + torch.rand(width, width))
    c.a[0].fill_(1 / 8), c.bm[0].fill_(0.5), c.b.fill_(2.0**-9), c.d.fill_(0.5)
    return c, delta_weight(c.update, torch.float32)[0]


def mean_change(c: Case, x: Tensor) -> Tensor:
    """Mean over all outputs of what dW adds."""
    with torch.no_grad():
        y = c.call(x).double()
        c.b.zero_()
        return (y - c.call(x).double()).mean()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(64, 512), (4096, 64)], ids=["few", "many"])
def test_young_updates_act_on_a_base_stored_in_bfloat16(tokens: int, width: int, bias: bool) -> None:
    c, change = young(width, torch.bfloat16, bias)
    assert torch.equal((c.weight.float() + change).bfloat16(), c.weight), "the update must be one that folding loses"
    x = (torch.rand(tokens, width) - 0.4).bfloat16()
    want = (x.double() @ change.double().t()).mean()
    torch.testing.assert_close(mean_change(c, x), want, rtol=0.2, atol=0.0)


def test_young_updates_act_on_a_float32_base_under_autocast() -> None:
    """W's low bits dither the rounding of W + dW to bfloat16, so on average the update survives."""
    c, change = young(256, torch.float32)
    x = (torch.rand(600, 256) - 0.4).bfloat16()
    want = (x.double() @ change.double().t()).mean()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mean_change(c, x.float()), want, rtol=0.2, atol=0.0)


@pytest.mark.parametrize("spans", ["equal", "unequal", "with gaps", "interleaved"])
@pytest.mark.parametrize("per_role", [False, True])
@pytest.mark.parametrize("tokens", [MANY, FEW])
def test_every_form_of_a_float32_base_under_autocast(spans: str, per_role: bool, tokens: int) -> None:
    c = case(*SPANS[spans], per_role=per_role, base=torch.float32, vectors=torch.float32)
    x, g = torch.randn(tokens, 20), torch.randn(tokens, 48)
    with torch.autocast("cpu", torch.bfloat16):
        got = measured(c, x, g, train_base=False)
    want = reference(c, x, g)
    assert got["y"].dtype == torch.bfloat16
    assert_agree(got, want, 0.05)


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("per_role", [False, True])
def test_the_branch_alone_and_the_change_of_weight_agree(spans: str, per_role: bool) -> None:
    c = case(*SPANS[spans], per_role=per_role)
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    dense = reference_weight(c, torch.zeros_like(c.weight), c.b, c.d)
    torch.testing.assert_close(delta(x, c.update, 48), x @ dense.t())
    rows = dense[[row for span in c.spans for row in span.indices()]]
    torch.testing.assert_close(torch.cat(delta_weight(c.update, torch.float64)), rows)


@pytest.mark.parametrize("form", FORMS)
def test_folded_weights_of_every_form_lie_in_memory_as_the_weight_does(form: Form) -> None:
    c = case(((0, 24), (24, 24)))
    dense = reference_weight(c, torch.zeros_like(c.weight), c.b, c.d)
    shape = {"matrix": (48, 20), "transposed": (20, 48), "kernel": (48, 5, 2, 2), "stack": (2, 24, 20)}
    weight = torch.randn(shape.get(form, (2, 20, 24)), dtype=torch.float64)
    whole = fold_form(weight, form, c.update)
    torch.testing.assert_close(to_matrix(whole - weight, form), dense)
    assert form == "transposed" or whole.stride() == weight.stride()


def test_the_backward_reuses_a_rounded_sum_and_a_left_factor_smaller_than_the_output() -> None:
    wide, half, rows = torch.zeros(48, 20), torch.zeros(48, 20).bfloat16(), torch.zeros(MANY, 20)
    assert reuses(rows.bfloat16(), wide) and not reuses(rows, wide)
    assert reuses(rows[:48].bfloat16(), half) and not reuses(rows[:47].bfloat16(), half)


@pytest.mark.parametrize("spans", ["one", "equal", "unequal"])
def test_gradients_of_the_vectors_are_of_their_type(spans: str) -> None:
    c = case(*SPANS[spans], base=torch.float64, vectors=torch.float32, shared_b=spans != "unequal")
    p = torch.randn(48, 4, dtype=torch.float64)
    assert {grad.dtype for grad in vector_gradients(p, c.update)} == {torch.float32}


def test_second_derivatives_are_refused() -> None:
    c = case(((0, 48),))
    c.b.requires_grad_()
    x, y = torch.randn(FEW, 20, dtype=torch.float64), torch.randn(FEW, 48, dtype=torch.float64)
    kernel, plane = c.weight.view(48, 5, 2, 2), Geometry((1, 1), (0, 0), (1, 1), 1)
    images = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    for out in (c.call(x), add_update(x, y, c.update), fold(c.weight, "matrix", c.update),
                convolve(images, kernel, None, plane, c.update)):  # fmt: skip
        (grad,) = torch.autograd.grad(out.square().sum(), c.b, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_frozen_inputs_get_no_gradient() -> None:
    c = case(base=torch.float32, vectors=torch.float32)
    c.b.requires_grad_()
    y = c.call(torch.randn(FEW, 20))
    y.sum().backward()
    assert c.b.grad is not None and c.d.grad is None and c.weight.grad is None
