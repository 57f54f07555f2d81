"""What a CPU cannot show: waits for the device, captured graphs, and the numbers of its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from conftest import kill
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import injected

import uora_vision as uora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def sync_mode() -> Iterator[Callable[[str], None]]:
    torch.cuda.init()
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sampling", [1, 4])
def test_a_step_never_waits_and_reinitialisation_waits_once(
    sync_mode: Callable[[str], None], sampling: int, autocast: bool
) -> None:
    model = injected(token_sampling=sampling).train().to("cuda")
    x = torch.randn(2, 3, 32, 32, device="cuda")
    reinit = uora.Reinitializer(model)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = model(x).sum()
        loss.backward()

    step(), reinit.step()  # libraries make their handles
    sync_mode("error")
    step()
    sync_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert reinit.step() == 0
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest distance of a gradient from its reference, to the size of the reference."""
    assert one.keys() == two.keys() and len(one) > 10
    return max(((two[n].cpu().double() - g).norm() / g.norm()).item() for n, g in one.items())


@pytest.mark.parametrize("images", [1, 4], ids=["factored and folded", "folded"])
@pytest.mark.parametrize(("case", "error"), [("float32", 1e-4), ("autocast", 0.05), ("bfloat16", 0.05)])
def test_gradients_are_those_of_float64_on_the_host(case: str, error: float, images: int) -> None:
    x = torch.randn(images, 3, 32, 32)
    model = injected().train()
    if case == "bfloat16":  # the reference has the same weights, rounded
        model.to(torch.bfloat16)
    want = gradients(model.double(), x.double())
    model.to("cuda", torch.bfloat16 if case == "bfloat16" else torch.float32)
    with torch.autocast("cuda", torch.bfloat16) if case == "autocast" else nullcontext():
        got = gradients(model, x.to("cuda", next(model.parameters()).dtype))
    assert difference(want, got) < error


def train(model: nn.Module, run: Callable[[Tensor], Tensor]) -> tuple[list[float], int]:
    """Losses and firings of some steps, in which directions die."""
    optimizer = torch.optim.AdamW(uora.param_groups(model, lr=1e-2, head_lr=1e-2))
    reinit, losses = uora.Reinitializer(model, optimizer=optimizer), []
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to("cuda")
    for step in range(8):
        optimizer.zero_grad()
        loss = cross_entropy(run(x), torch.arange(4, device="cuda"))
        loss.backward()
        optimizer.step()
        if step % 2:
            kill(model, {"blocks.0.attn.qkv.q": [step]})
        reinit.step()
        losses.append(loss.item())
    return losses, reinit.firings


def test_captured_graphs_train_as_the_plain_model_does() -> None:
    plain, captured = (injected().train().to("cuda") for _ in range(2))
    want, firings = train(plain, plain)
    got, same = train(captured, torch.compile(captured, fullgraph=True, mode="reduce-overhead"))
    assert firings == same > 0
    assert want[-1] < want[0]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-3, atol=1e-3)
