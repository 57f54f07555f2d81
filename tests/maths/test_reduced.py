"""q, k and v, or gate and up, of one input share u = x A^T: computed and kept once, and never taken for another."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from conftest import wake
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.lifecycle.adapter import REDUCED
from uora_vision.maths.shared_product import Reduced

RANK, TOKENS = 8, 12


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    )  # fmt: skip
    return wake(uora.inject(transformers.LlamaForCausalLM(config).double().eval(), rank=RANK, train=()))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 50, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    loss = model(input_ids=tokens, labels=tokens).loss
    return list(torch.autograd.grad(loss, [p for a in uora.adapters(model).values() for p in (a.b, a.d)]))


def saved_u(model: nn.Module, tokens: Tensor) -> int:
    """How many tensors (N, r) the forward keeps."""
    held = {}

    def pack(t: Tensor) -> Tensor:
        if t.shape == (tokens.numel(), RANK):
            held[t.data_ptr()] = t  # alive, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(input_ids=tokens)
    return len(held)


def test_sharing_changes_no_gradient_and_keeps_less(tokens: Tensor) -> None:
    model = llama()
    shared, kept = gradients(model, tokens), saved_u(model, tokens)
    del model.uora.__dict__[REDUCED]
    for got, want in zip(shared, gradients(model, tokens), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    # Seven projections per layer have four inputs; that of the first q, k and v comes from a frozen embedding.
    assert saved_u(model, tokens) == 14 and kept == 10 - 2 + 2


def test_it_is_of_this_input_this_matrix_and_this_type() -> None:
    reduced, a = Reduced(), torch.randn(4, 6)
    x = torch.randn(3, 6, requires_grad=True) * 1
    u = reduced(x, x, [a])
    assert u is not None and not u.requires_grad and reduced(x, x, [a]) is u
    torch.testing.assert_close(u, (x @ a.t()).detach())
    for other in (x * 2, x.clone()):
        torch.testing.assert_close(reduced(other, other, [a]), (other @ a.t()).detach())
    reduced(x, x, [a])
    assert reduced(x, x.bfloat16(), [a]).dtype == torch.bfloat16
    reduced(x, x, [a])
    a[1] = 7.0  # as a redraw does
    torch.testing.assert_close(reduced(x, x, [a]), (x @ a.t()).detach())
    x.mul_(2)
    torch.testing.assert_close(reduced(x, x, [a]), (x @ a.t()).detach())


def test_what_the_caller_holds_and_roles_with_rows_of_their_own_are_not_shared() -> None:
    x, a = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6)
    assert Reduced()(x, x, [a]) is None and Reduced()(x * 1, x * 1, [a, a]) is None


def test_copies_and_pickles_start_empty(tokens: Tensor) -> None:
    model = llama()
    want = gradients(model, tokens)
    assert model.uora.__dict__[REDUCED]._last is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.uora.__dict__[REDUCED] is not model.uora.__dict__[REDUCED]
        assert twin.uora.__dict__[REDUCED]._last is None
        assert all(map(torch.equal, gradients(twin, tokens), want))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(tokens: Tensor, reentrant: bool) -> None:
    model = llama()
    want = gradients(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    vectors = [p for a in uora.adapters(model).values() for p in (a.b, a.d)]
    for p, value in zip(vectors, want, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, value, rtol=1e-6, atol=1e-9)
