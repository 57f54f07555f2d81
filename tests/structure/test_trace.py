"""What a trace shows of a model's parameters, and that it leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.levit import Levit
from torch import Tensor, nn
from torch.nn import functional as F
from traced import LEVIT, PLAIN, in_turn, only_use, packed, traced

from uora_vision.structure.trace import trace


class Shared(nn.Module):
    """A tied head, a weight made of three, one that is only looked at, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.spare = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.zeros(4, 4))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        assert self.spare.weight.dtype == x.dtype and self.spare.weight.shape == (8, 8)
        torch.zeros_like(self.spare.weight)
        q, k, v = F.linear(x, torch.cat([self.q.weight, self.k.weight, self.v.weight])).chunk(3, -1)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.head(self.normed(x)), self.table.T[:2]


def test_sharing_looking_and_leaving() -> None:
    found = traced(Shared, (2, 5), vocabulary=50)
    assert found.unused == ("spare.weight",)
    assert (only_use(found, "embed.weight").op, only_use(found, "head.weight").op) == ("embedding", "linear")
    assert only_use(found, "embed.weight").called and only_use(found, "head.weight").called
    for role, layer in (("q", "q"), ("k", "k"), ("v", "v")):
        assert found.flows[f"{layer}.weight"] == {role: in_turn(8)[0]}
        use = only_use(found, f"{layer}.weight")
        assert (use.op, use.reader, use.called) == ("linear", "", False)
    assert {use.op for use in found.uses["table"]} == {"T", "getitem"}, "nothing else happens to it"
    assert "linear" in {use.op for use in found.uses["normed.parametrizations.weight.original1"]}


def test_same_module_under_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    found = trace(Twice(), torch.randn(2, 4))
    names = [name for name, p in Twice().named_parameters(remove_duplicate=False) if p.dim() > 1]
    assert list(found.uses) == names == ["a.weight", "b.weight"]
    assert all(use.called and use.reader == "a" for uses in found.uses.values() for use in uses)


# What a trace leaves behind


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_model_and_random_state_are_as_before() -> None:
    vit = timm.create_model("vit_base_patch16_224", **PLAIN, proj_drop_rate=0.5)
    model = nn.Sequential(Noise(), vit).train()
    vit.blocks.eval()
    flags = [m.training for m in model.modules()]
    values = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    trace(model, torch.zeros(1, 3, 32, 32))
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), values, rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_what_a_model_remembers_of_its_parameters_is_neither_missed_nor_left_behind() -> None:
    """LeViT keeps its biases between eval forwards, until a call of train or eval."""
    model = Levit(**LEVIT).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(x)
        assert not trace(model, x).unused
        for name, p in model.named_parameters():
            if name.endswith("attention_biases"):
                p.normal_(std=3.0)
        after = model(x)
        assert torch.equal(after, model.eval()(x))


class Keeping(nn.Module):
    """Keeps what it makes of a parameter until it trains again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.table, self.kept = nn.Linear(4, 4), nn.Parameter(torch.randn(2, 4)), None

    def train(self, mode: bool = True) -> Keeping:
        if mode:
            self.kept = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.table.T @ self.table
        return self.inner(x) @ self.kept


def test_what_a_model_kept_from_an_earlier_forward_is_made_again() -> None:
    model, x = Keeping().eval(), torch.randn(2, 4)
    with torch.no_grad():
        model(x)
        assert not trace(model, x).unused


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError(f"after {self.inner(x).shape}")


def test_an_error_of_the_model_comes_through_and_everything_is_undone() -> None:
    model, seen = nn.Sequential(Failing()), []
    with pytest.raises(ArithmeticError, match="after"):
        trace(model, torch.randn(2, 4))
    assert all(m.training for m in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    seen.append(torch.overrides._get_current_function_mode_stack())
    assert seen == [[]]


def test_an_error_that_the_model_handles_does_not_confuse_who_reads() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.failing, self.own = Failing(), nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.failing(x)
            except ArithmeticError:
                return x @ self.own

    found = trace(Careful(), torch.randn(2, 4))
    assert only_use(found, "own").reader == "" and only_use(found, "own").called


def test_what_cannot_be_followed_is_let_go() -> None:
    """Reading floats as integers has no meaning for labels; the model runs all the same."""

    def use(y: Tensor) -> tuple[Tensor, Tensor]:
        halves = y.view(torch.int32).view(torch.float32).chunk(2, -1)
        return halves[0].sum(), halves[1].sum()

    found = packed(8, use)
    assert found.rows == {}
    assert only_use(found, "packed.weight").op == "linear"
