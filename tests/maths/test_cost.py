"""The counts that choose between forms, against the operations that torch counts while the projection is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from projections import case
from torch.utils.flop_counter import FlopCounterMode

from uora_vision.maths.cost import Shape, folds, joins, keeps_input
from uora_vision.maths.linear import project


def counted(tokens: int, rank: int, spans: Any, per_role: bool, sampling: int, out: int, width: int) -> tuple[int, int]:
    """Operations of the products of a forward alone, and of a step."""
    c = case(spans, out=out, width=width, rank=rank, per_role=per_role)
    c.b.requires_grad_(), c.d.requires_grad_()
    x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    totals = []
    for grad in (False, True):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            y = project(x, c.weight, c.bias, c.update, None, sampling)
            if grad:
                y.backward(torch.ones_like(y))
        totals.append(counter.get_total_flops())
    return totals[0], totals[1]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.one_of(st.integers(1, 12), st.integers(1, 400)),  # few: the factored form
    rank=st.integers(1, 60),
    rows=st.integers(1, 24),
    roles=st.integers(1, 3),
    width=st.integers(2, 60),
    per_role=st.booleans(),
    sampling=st.sampled_from([1, 4]),
)
@example(tokens=9, rank=1, rows=18, roles=1, width=18, per_role=False, sampling=1)  # both forms cost the same
def test_predicted_operations_are_those_that_are_done(
    tokens: int, rank: int, rows: int, roles: int, width: int, per_role: bool, sampling: int
) -> None:
    out, matrices = rows * roles, roles if per_role else 1
    spans = tuple((k * rows, rows) for k in range(roles))
    shape = Shape(tokens, out, width, rank, matrices=matrices, sampling=sampling)
    forward, step = counted(tokens, rank, spans, per_role, sampling, out, width)
    assert forward == shape.base + shape.forward
    # P times d and b times P are left out; torch counts them where they are products of matrices.
    assert 0 <= step - 2 * shape.base - shape.step <= 4 * out * rank


def test_the_choices_take_what_costs_less() -> None:
    for tokens in range(1, 200, 7):
        for out, width in ((30, 70), (70, 30), (50, 50)):
            shape = Shape(tokens, out, width, 8)
            assert folds(tokens, out, width) == (shape.fold < shape.reduce + shape.expand)
            assert shape.forward == min(shape.fold, shape.reduce + shape.expand)
            for rank in (1, 20, 25, 30, 60):
                by_u, by_x = tokens * rank * (width + out), tokens * width * out
                assert keeps_input(out, width, rank, 1) == (by_x < by_u)
            assert joins(tokens, out, width) == (2 * out * width + 2 * tokens * width < 4 * tokens * out)


@pytest.mark.parametrize("sampling", [1, 4])
@pytest.mark.parametrize("rank", [4, 40])
def test_kept_numbers(rank: int, sampling: int) -> None:
    c = case(rank=rank)
    c.b.requires_grad_()
    held: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (c.weight, c.b, c.d, *c.a, *c.bm)}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in own:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 8
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = torch.randn(203, 20, dtype=torch.float64, requires_grad=True)
        project(x, c.weight, c.bias, c.update, None, sampling)
    assert sum(held.values()) == Shape(203, 48, 20, rank, sampling=sampling).kept
