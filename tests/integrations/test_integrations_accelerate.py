"""Accelerate: resuming to the bit, skipped steps, accumulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import banks
from torch import Tensor, nn
from training_tools import REDRAW, SALIENT, Overflow, base_bytes, pictures, same, size, vit

import uora_vision as uora
from uora_vision.integrations.state import changing_state, frozen_names

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from uora_vision.integrations.accelerate import prepare_reinitializer  # noqa: E402


class Wrapped(nn.Module):
    """A model around the injected one, with a trained part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = vit(), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.net(x))


class Loop:
    """A training loop on Accelerate."""

    def __init__(
        self,
        make: Callable[[], nn.Module] = vit,
        accumulate: int = 2,
        scaler: Any = None,
        redraw: Any = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        # What an earlier loop of the process left there: all accelerators share it.
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        self.accelerator.scaler = scaler
        model = make()
        optimizer = torch.optim.SGD(
            (p for p in model.parameters() if p.requires_grad), lr=0.05, momentum=0.9, **options
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.reinit = prepare_reinitializer(self.accelerator, self.model, self.optimizer, **(redraw or REDRAW))
        self.fired: list[int] = []

    def run(self, batches: Any, loss: Callable[[Tensor], Tensor] = lambda x: x) -> Loop:
        for x, y in batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(loss(nn.functional.cross_entropy(self.model(x), y)))
                self.optimizer.step()
                self.fired.append(self.reinit.step())
                self.optimizer.zero_grad()
        return self


@pytest.mark.parametrize("make", [vit, Wrapped])
@pytest.mark.slow
def test_accelerate_resumes_to_the_bit_from_an_adapter(make: Any, tmp_path: Path) -> None:
    batches = list(pictures())
    whole = Loop(make).run(batches)
    assert whole.reinit.steps == 6 and whole.reinit.firings > 20
    assert sum(whole.fired) == whole.reinit.firings and not any(whole.fired[::2])
    first = Loop(make).run(batches[:6])
    first.accelerator.save_state(str(tmp_path))
    resumed = Loop(make)
    resumed.run(batches[9:11])  # what it did before must not matter
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(batches[6:])
    assert (resumed.reinit.history() == whole.reinit.history()).all()
    injected = [next(m for m in run.model.modules() if hasattr(m, "head")) for run in (resumed, whole)]
    same(*injected)
    assert all(torch.equal(t, whole.model.state_dict()[n]) for n, t in resumed.model.state_dict().items())

    assert size(tmp_path) < base_bytes(first.model)
    saved = torch.load(tmp_path / "uora_model.pt", weights_only=True)
    assert saved.keys() == changing_state(first.model).keys() and not frozen_names(first.model) & saved.keys()
    assert not list(tmp_path.glob("*.safetensors"))
    (tmp_path / "uora_model.pt").unlink()
    with pytest.raises(uora.FormatError, match=r"uora_model\.pt"):
        resumed.accelerator.load_state(str(tmp_path))


@pytest.mark.slow
def test_accelerate_goes_on_with_informed_rows(tmp_path: Path) -> None:
    def informed() -> nn.Module:
        model = uora.remove(vit())
        nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        model = uora.inject(model, rank=8)
        uora.inform(model, pictures(), max_batches=2)
        return model

    first = Loop(informed).run(list(pictures()))
    first.accelerator.save_state(str(tmp_path))
    resumed = Loop(vit)
    resumed.accelerator.load_state(str(tmp_path))
    same(resumed.model, first.model)
    assert uora.adapters(resumed.model)["blocks.0.attn.qkv"].bank.widths.informed


@pytest.mark.slow
def test_accelerate_resumes_redraws_by_saliency_with_informed_rows(tmp_path: Path) -> None:
    batches = list(pictures())
    redraw = SALIENT | {"batches": batches[:2]}
    whole = Loop(redraw=redraw).run(batches)
    first = Loop(redraw=redraw).run(batches[:6])
    first.accelerator.save_state(str(tmp_path))
    resumed = Loop(redraw=redraw)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(batches[6:])
    assert (resumed.reinit.history() == whole.reinit.history()).all() and whole.reinit.firings > 20
    assert any(e.rows is not None for e in whole.reinit.bank.log)
    same(resumed.model, whole.model)


@pytest.mark.slow
def test_accumulation_is_one_large_batch() -> None:
    parts, large = Loop(accumulate=2).run(pictures(4)), Loop(accumulate=1).run(pictures(8))
    assert (parts.reinit.history() == large.reinit.history()).all() and parts.reinit.firings > 20
    for name, t in (changing_state(parts.model) | banks(parts.model)).items():
        torch.testing.assert_close(t, (changing_state(large.model) | banks(large.model))[name], rtol=0, atol=1e-6)


def test_accelerate_does_not_redraw_after_a_skipped_step() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    loop = Loop(accumulate=1, scaler=scaler).run(list(pictures())[:4], Overflow())
    assert loop.reinit.steps == 3 and loop.fired[1] == 0


def test_accelerate_wants_a_prepared_model() -> None:
    model = vit()
    with pytest.raises(uora.StateError, match="prepare"):
        prepare_reinitializer(accelerate.Accelerator(cpu=True), model, torch.optim.SGD(model.parameters()))
