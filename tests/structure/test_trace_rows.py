"""Rows of a packed weight, followed through what a model does with its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from traced import Packed, Rows, by_heads, in_turn, packed, traced

from uora_vision.structure.trace import trace


@settings(deadline=None, max_examples=25)
@given(heads=st.integers(1, 4), sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), first=st.booleans())
@pytest.mark.slow
def test_any_split_is_found(heads: int, sizes: list[int], first: bool) -> None:
    def use(y: Tensor) -> list[Tensor]:
        y = y.view(*y.shape[:-1], heads, sum(sizes))
        y = y.permute(2, 0, 3, 1) if first else y
        return [part.sum() for part in y.split(sizes, dim=2 if first else 3)]

    found = packed(heads * sum(sizes), use)
    assert found.rows["packed.weight"] == tuple(by_heads(heads, *sizes))


def test_partition_is_the_finest_that_the_uses_make() -> None:
    """Overlapping uses part the rows where they differ; rows that no use took are a part too."""
    found = packed(10, lambda y: (y[..., 1:6].sum(), y[..., 4:8].sum()))
    assert found.rows["packed.weight"] == ((0, 8, 9), (1, 2, 3), (4, 5), (6, 7))


@pytest.mark.slow
def test_a_thousand_parts_are_no_trouble() -> None:
    found = trace(Packed(1024, lambda y: [part.sum() for part in y.unbind(-1)]), torch.randn(1, 1, 6))
    assert found.rows["packed.weight"] == tuple((k,) for k in range(1024))


def rotated(y: Tensor) -> Tensor:
    """Rotary embedding, with the halves of the last axis taken apart and put together."""
    first, second = y.chunk(2, -1)
    return y * 0.6 + torch.cat([-second, first], -1) * 0.8


def rotated_halves(y: Tensor) -> Tensor:
    first, second = y.chunk(2, -1)
    return torch.cat([first * 0.6 - second * 0.8, second * 0.6 + first * 0.8], -1)


@pytest.mark.parametrize(
    ("change", "axis"),
    [
        (lambda y: F.gelu(y * 2 + 1), -1),
        (lambda y: F.layer_norm(y, (8,)).softmax(-1), -1),
        (lambda y: y.double().to(torch.half).clone(), -1),
        (lambda y: rotated(y.unflatten(-1, (2, 4))).flatten(-2), -1),
        (lambda y: rotated_halves(y.unflatten(-1, (2, 4))).flatten(-2), -1),
        (lambda y: torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (4, 2))) * 1j).flatten(-2), -1),
        (lambda y: F.pad(y, (0, 0, 1, 1), value=1.0).roll(1, 1).flip(0), -1),
        (
            lambda y: y.unflatten(-1, (2, 4)).transpose(1, 2).contiguous().view(4, 5, 4)  # heads in the batch
            .view(2, 2, 5, 4).transpose(1, 2).flatten(-2),
            -1,
        ),
        (lambda y: torch.stack([y[..., :4], y[..., 4:]]).permute(1, 2, 0, 3).reshape(2, 5, 8), -1),
        (lambda y: F.unfold(y.mT.unsqueeze(-1), (3, 1), padding=(1, 0)).view(2, 8, 3, 5), 1),
        (lambda y: F.max_pool1d(y.mT, 2), 1),
        (lambda y: y.amax(1, keepdim=True), -1),
        (lambda y: y.mT.mean(-1), 1),
        (lambda y: y[:, torch.arange(5, device=y.device) % 2], -1),
        (lambda y: y.new_empty(2, 5, 8).copy_(y), -1),
    ],
    ids=[
        "elementwise", "norm", "casts", "rotary", "rotary by halves", "complex rotary", "pad and roll", "memory",
        "stack", "unfold", "pool", "maximum", "mean", "index", "copy",
    ],
)  # fmt: skip
def test_rows_are_followed_without_being_parted(change: Callable[[Tensor], Tensor], axis: int) -> None:
    """They stay one group, and when they are parted afterwards, each is still known."""
    assert packed(8, lambda y: change(y).sum()).rows == {}
    taken = trace(Packed(8, lambda y: [part.sum() for part in change(y).split([4, 4], axis)]), torch.randn(2, 5, 6))
    assert taken.rows["packed.weight"] == tuple(in_turn(4, 4))


def test_rows_written_into_a_part_of_a_tensor_are_there() -> None:
    def use(y: Tensor) -> tuple[Tensor, Tensor]:
        whole = y.new_zeros(2, 5, 10)
        whole[..., :4].copy_(y[..., 4:])
        whole[..., 4:8] = y[..., :4]
        return whole[..., 2:6].sum(), whole[..., 8:].sum()

    assert packed(8, use).rows["packed.weight"] == ((0, 1, 6, 7), (2, 3, 4, 5))


def test_a_residual_stream_is_no_projection_s_output() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first, second = (x + self.inner(x)).chunk(2, -1)
            return first.sum(), second.sum()

    assert traced(Residual, (2, 8)).rows == {}


def test_gate_and_what_it_gates_are_two() -> None:
    assert packed(8, lambda y: F.silu(y[..., :3]) * y[..., 3:6]).rows["packed.weight"] == tuple(in_turn(3, 3, 2))
    assert packed(8, lambda y: F.glu(y)).rows["packed.weight"] == tuple(in_turn(4, 4))


@pytest.mark.parametrize(
    ("attend", "order"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), "qkv"),
        (lambda q, k, v: ((q * 0.5) @ k.mT).masked_fill(q.new_zeros((), dtype=torch.bool), 0).softmax(-1) @ v, "qkv"),
        (lambda q, k, v: (v.mT @ (k @ q.mT).softmax(dim=-2)).mT, "qkv"),
        (lambda q, k, v: torch.bmm(F.softmax(torch.baddbmm(q.new_zeros(1, 5, 5), k, q.mT), dim=2), v), "kqv"),
        (
            lambda q, k, v: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(2), v),
            "qkv",
        ),
        (
            lambda q, k, v: torch.einsum("...ij,...jd->...id", torch.einsum("...jd,...id->...ij", k, q).softmax(2), v),
            "qkv",
        ),
    ],
    ids=["fused", "explicit", "transposed", "bmm", "einsum", "einsum with keys first"],
)
def test_attention_in_many_spellings(attend: Callable[..., Tensor], order: str) -> None:
    found = packed(12, lambda y: attend(*y.chunk(3, -1)))
    parts = in_turn(4, 4, 4)
    assert found.flows["packed.weight"] == {
        role: parts["qkv".index(name)] for role, name in zip("qkv", order, strict=True)
    }
    assert found.rows["packed.weight"] == tuple(parts)


@pytest.mark.parametrize(
    ("use", "sure"),
    [
        (lambda y: y[..., :4] @ y[..., 4:8].mT @ y[..., 8:], {}),
        (lambda y: (y[..., :4] @ y[..., 4:8].mT).softmax(0) @ y[..., 8:], {}),
        (lambda y: torch.ones(2, 5, 5, device=y.device).softmax(-1) @ y, {}),
        (lambda y: y[..., :5].softmax(-1) @ y[..., 5:], {"v": tuple(range(5, 12))}),
    ],
    ids=["no softmax", "softmax over the batch", "pooling", "outlook"],
)
def test_no_flow_is_claimed_where_it_is_not_certain(use: Callable[[Tensor], Any], sure: dict[str, Rows]) -> None:
    assert packed(12, use).flows.get("packed.weight", {}) == sure
