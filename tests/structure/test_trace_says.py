"""A plan says how far a trace followed the model, and lists all that it changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import uora_vision as uora

X = torch.randn(2, 6, 32)


class Attention(nn.Module):
    """Packed as q, k and v; `leave` takes the output out of torch's sight."""

    def __init__(self, leave: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads, self.leave = nn.Linear(32, 96), nn.Linear(32, 32), 4, leave

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads)
        if self.leave:
            y = torch.from_numpy(y.detach().numpy().copy())
        q, k, v = y.permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mixing(nn.Module):
    """Queries, keys and values of two heads under a name that says nothing, divided by numbers that are no code."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.proj, self.sizes = nn.Linear(32, 64), nn.Linear(32, 32), (16, 16, 32)

    def forward(self, x: Tensor) -> Tensor:
        parts = [t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.mix(x).split(self.sizes, -1)]
        return self.proj(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def test_a_trace_that_followed_all_confirms() -> None:
    what = uora.plan(Net(Attention(), Attention()), rank=4, example_input=X)
    assert "The trace confirms it: it followed 4 of 4 weights." in str(what) and what.unfollowed == ()


@pytest.mark.parametrize("other", [True, False])
def test_a_trace_that_lost_a_weight_confirms_nothing(other: bool) -> None:
    what = uora.plan(Net(Attention(leave=True), Attention(leave=other)), rank=4, example_input=X)
    lost = ("blocks.0.qkv", "blocks.1.qkv")[: 1 + other]
    assert what.unfollowed == lost and what.to_dict()["unfollowed"] == list(lost)
    text = str(what)
    assert "confirms" not in text and f"followed {4 - len(lost)} of 4 weights" in text and ", ".join(lost) in text


def test_what_the_trace_found_out_of_an_unknown_weight_is_listed() -> None:
    what = uora.plan(Net(Mixing()), rank=4, targets="all", example_input=X)
    mix = next(p for p in what.projections if p.path == "blocks.0.mix")
    assert [r.name for r in mix.roles] == ["q", "k", "v"]
    assert [(d.path, d.kind) for d in what.differences or ()] == [("blocks.0.mix", "rows")]
    assert "called mix (64 rows)" in str(what)
