"""Structures of vit-pytorch, x-transformers, diffusers and torchvision, written small or built from torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

import uora_vision as uora


def labels(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    return {p.path: [role.label for role in p.roles] for p in uora.plan(model, rank=4, **options).projections}


QKV = ["attn.q", "attn.k", "attn.v"]


class Chunked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = map(lambda t: t.unflatten(-1, (2, 8)).transpose(1, 2), qkv)  # noqa: C417
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Function(Chunked):
    def forward(self, x: Tensor) -> Tensor:
        y = self.to_qkv(x)
        q, k, v = torch.chunk(y, 3, dim=-1)
        return self.to_out(scaled_dot_product_attention(q, k, v))


class Backwards(nn.Module):
    """Another order than the name says: it is not to be taken for the usual one."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x).chunk(3, dim=-1)
        v, k, q = qkv
        return self.to_out(scaled_dot_product_attention(q, k, v))


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.to_out = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        qkv = (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        q, k, v = map(lambda t: t.unflatten(-1, (2, 8)).transpose(1, 2), qkv)  # noqa: C417
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("owner", "weight", "roles"),
    [
        (Chunked, "to_qkv", QKV),
        (Function, "to_qkv", QKV),
        (Backwards, "to_qkv", ["attn.qkv"]),
        (Beside, "to_kv", QKV[1:]),
    ],
)
def test_rows_are_divided_as_the_code_takes_them_apart(owner: Any, weight: str, roles: list[str]) -> None:
    model = nn.ModuleList([owner() for _ in range(2)])
    assert labels(model)[f"0.{weight}"] == roles


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "maxvit_t", "swin3d_t"])
def test_packed_weights_of_torchvision_are_divided(name: str) -> None:
    import torchvision

    maker = getattr(torchvision.models, name, None) or getattr(torchvision.models.video, name)
    with torch.device("meta"):
        found = labels(maker(), train=())
    packed = [roles for path, roles in found.items() if "qkv" in path]
    assert packed and all(roles == QKV for roles in packed)


class FeedForward(nn.Module):
    def __init__(self, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.ff = nn.Sequential(nn.Sequential(nn.Linear(width, hidden), nn.GELU()), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class Alternating(nn.Module):
    """As x-transformers: a list of attention, MLP, attention, MLP; the last of them is no head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.LayerNorm(16), part()]) for part in (Chunked, FeedForward) * 2])
        self.to_logits = nn.Linear(16, 50)

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in self.layers:
            x = x + part(norm(x))
        return self.to_logits(x)


def test_the_last_of_alternating_blocks_is_no_head() -> None:
    with pytest.warns(uora.UoraWarning, match="to_logits") as caught:
        model = uora.inject(Alternating(), rank=4)
    assert "layers" not in str(caught[0].message)
    assert {path for path in uora.adapters(model) if ".ff." in path} == {
        f"layers.{i}.1.ff.{part}" for i in (1, 3) for part in ("0.0", "1")
    }
    uora.verify(model, torch.randn(2, 5, 16))


def test_a_head_of_the_form_of_an_mlp_stays_one() -> None:
    model = nn.Sequential(
        *(Chunked() for _ in range(2)), nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    )
    assert not [path for path in labels(model) if path.startswith("2.")]


class SingleStream(nn.Module):
    """As a block of Flux: what attention and the MLP's hidden features give is led back by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj_mlp = nn.LayerNorm(16), nn.Linear(16, 64)
        self.attn, self.proj_out = Chunked(), nn.Linear(16 + 64, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.proj_out(torch.cat([self.attn(y), gelu(self.proj_mlp(y))], dim=-1))


class Narrow(nn.Module):
    """An expert of a mixture that all tokens take: narrower than the model."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.shared_expert = Chunked(), GatedFeedForward(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.shared_expert(x)


class GatedFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(width, 2 * hidden), nn.Dropout(), nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.net[0](x).chunk(2, dim=-1)
        return self.net[2](self.net[1](value * gelu(gate)))


def test_a_single_stream_has_its_mlp() -> None:
    model = nn.Sequential(*(SingleStream() for _ in range(2)))
    found = labels(model)
    assert found["1.proj_mlp"] == ["mlp.proj_mlp"] and found["1.proj_out"] == ["mlp.proj_out"]
    assert set(found) == {f"{i}.{n}" for i in (0, 1) for n in ("proj_mlp", "proj_out", "attn.to_qkv", "attn.to_out")}
    uora.verify(uora.inject(model, rank=4), torch.randn(2, 5, 16))


def test_an_expert_narrower_than_the_model_is_an_mlp() -> None:
    model = nn.Sequential(*(Narrow() for _ in range(2)))
    assert labels(model)["1.shared_expert.net.2"] == ["mlp.fc2"]
