"""Laws of rows and shapes, against plain indexing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functionalize

from uora_vision.weights.matrix import (
    FORMS,
    Form,
    Span,
    add_,
    disjoint,
    from_matrix,
    in_order,
    matrix_shape,
    place,
    take,
    to_matrix,
)

quick = settings(max_examples=50, deadline=None)


@st.composite
def span(draw: st.DrawFn, start: int = 5) -> Span:
    """One run, or up to four runs that do not overlap."""
    first = draw(st.integers(0, start))
    if draw(st.booleans()):
        return Span(first, draw(st.integers(1, 8)))
    block, runs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return Span(first, block * runs, block, draw(st.integers(block, block + 4)))


@st.composite
def rows_of(draw: st.DrawFn) -> tuple[Tensor, Span]:
    """A matrix of numbers that are all different, and a span of its rows; the matrix may be a transposed view."""
    given_span, width = draw(span()), draw(st.integers(1, 3))
    out = given_span.end + draw(st.integers(0, 3))
    t = torch.arange(1.0, out * width + 1)
    return (t.view(out, width) if draw(st.booleans()) else t.view(width, out).t()), given_span


class TestSpan:
    @pytest.mark.parametrize(
        ("given_span", "rows"),
        [
            (Span(0, 3), [0, 1, 2]),
            (Span(4, 2), [4, 5]),
            (Span(1, 4, 2, 3), [1, 2, 4, 5]),
            (Span(0, 3, 1, 2), [0, 2, 4]),
            (Span(2, 4, 4, 9), [2, 3, 4, 5]),
        ],
    )
    def test_its_rows(self, given_span: Span, rows: list[int]) -> None:
        assert given_span.indices() == rows

    @quick
    @given(span())
    def test_it_has_as_many_rows_as_it_says_and_ends_after_the_last(self, s: Span) -> None:
        rows = s.indices()
        assert len(rows) == s.rows and rows == sorted(set(rows))
        assert rows[0] == s.start and rows[-1] + 1 == s.end

    @quick
    @given(rows_of())
    def test_take_is_indexing(self, case: tuple[Tensor, Span]) -> None:
        t, s = case
        taken = take(t, s)
        assert torch.equal(taken, t[s.indices()])
        if not s.block:
            assert taken.data_ptr() == t[s.start].data_ptr() and taken.stride() == t.stride(), "a view"

    @quick
    @given(rows_of())
    def test_add_changes_those_rows_and_no_other(self, case: tuple[Tensor, Span]) -> None:
        t, s = case
        value = torch.arange(100.0, 100 + s.rows * t.shape[1]).view(s.rows, -1)
        want = t.clone()
        want[s.indices()] += value
        compiled = functionalize(lambda t, v: (add_(t, s, v), t)[1])(t.clone(), value)  # what torch.compile makes of it
        add_(t, s, value)
        assert torch.equal(t, want) and torch.equal(compiled, want)

    @quick
    @given(st.lists(span(20), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 3))
    def test_place_puts_every_row_where_it_lies(self, spans: list[Span], tail: int, width: int) -> None:
        out = max(s.end for s in spans) + tail
        rows = [row for s in spans for row in s.indices()]
        value = torch.arange(1.0, len(rows) * width + 1).view(-1, width)
        want = torch.zeros(out, width)
        for row, v in zip(rows, value, strict=True):  # spans that overlap add up
            want[row] += v
        assert torch.equal(place(value, tuple(spans), out), want)

    @quick
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2))
    def test_spans_one_after_the_other_are_placed_without_a_copy(self, sizes: list[int], tail: int) -> None:
        spans = tuple(Span(sum(sizes[:k]), n) for k, n in enumerate(sizes))
        value = torch.ones(sum(sizes), 2)
        assert in_order(spans, sum(sizes)) and place(value, spans, sum(sizes)) is value
        assert in_order(spans, sum(sizes) + tail) == (tail == 0)
        assert in_order(spans[::-1], sum(sizes)) == (len(spans) == 1)

    @quick
    @given(st.lists(span(8), min_size=1, max_size=4), st.integers(1, 40))
    def test_in_order_is_said_only_of_the_whole_matrix(self, spans: list[Span], out: int) -> None:
        rows = [row for s in spans for row in s.indices()]
        whole = rows == list(range(out)) and not any(s.block for s in spans)
        assert in_order(tuple(spans), out) == whole

    @quick
    @given(st.lists(span(12), max_size=4))
    def test_disjoint_means_no_row_twice(self, spans: list[Span]) -> None:
        pairs = [(s, t) for i, s in enumerate(spans) for t in spans[:i]]
        assert disjoint(spans) == all(not set(s.indices()) & set(t.indices()) for s, t in pairs)


@st.composite
def shaped(draw: st.DrawFn) -> tuple[Form, tuple[int, ...]]:
    form = draw(st.sampled_from(FORMS))
    dims = {"kernel": draw(st.integers(2, 5)), "stack": 3, "stack_transposed": 3}.get(form, 2)
    return form, tuple(draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims)))


def entry(form: Form, shape: tuple[int, ...], row: int, column: int) -> tuple[int, ...]:
    """Where an entry of the matrix lies in the tensor."""
    if form == "matrix":
        return row, column
    if form == "transposed":
        return column, row
    if form == "stack":
        return *divmod(row, shape[1]), column
    if form == "stack_transposed":
        expert, within = divmod(row, shape[2])
        return expert, column, within
    at = []
    for size in reversed(shape[1:]):
        column, rest = divmod(column, size)
        at.append(rest)
    return row, *reversed(at)


class TestForms:
    @quick
    @given(shaped())
    def test_every_entry_is_where_the_form_says(self, case: tuple[Form, tuple[int, ...]]) -> None:
        form, shape = case
        t = torch.arange(float(math.prod(shape))).view(shape)
        matrix = to_matrix(t, form)
        assert tuple(matrix.shape) == matrix_shape(shape, form)
        for row in range(matrix.shape[0]):
            for column in range(matrix.shape[1]):
                assert matrix[row, column] == t[entry(form, shape, row, column)]

    @quick
    @given(shaped())
    def test_from_matrix_is_its_inverse_and_a_view(self, case: tuple[Form, tuple[int, ...]]) -> None:
        form, shape = case
        t = torch.arange(float(math.prod(shape))).view(shape)
        matrix = to_matrix(t, form)
        back = from_matrix(matrix, form, shape)
        assert torch.equal(back, t) and back.data_ptr() == matrix.data_ptr()
        change = torch.arange(100.0, 100 + t.numel()).view(matrix.shape)
        assert torch.equal(to_matrix(from_matrix(change, form, shape), form), change)

    @quick
    @given(shaped())
    def test_a_matrix_is_a_view_where_one_exists(self, case: tuple[Form, tuple[int, ...]]) -> None:
        form, shape = case
        assume(form != "stack_transposed")
        t = torch.zeros(shape)
        to_matrix(t, form)[0, 0] = 1
        assert t.sum() == 1
