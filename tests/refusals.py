"""Checks that a model is refused with nothing of it changed, or adapted rightly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import merged, wake
from torch import Tensor, nn

import uora_vision as uora

QKV = "blocks.1.attn.qkv"
Change = Callable[[nn.Module], Any]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refusal must leave alone."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": {
            n: (type(m), m.training, sorted(vars(m)), [k for k, _ in m.named_children()])
            for n, m in model.named_modules()
        },
        "hooks": {n: {k: len(v) for k, v in vars(m).items() if "hooks" in k} for n, m in model.named_modules()},
        "tensors": {n: (id(t), type(t), t.requires_grad) for n, t in tensors.items()},
        "values": {n: t.detach().clone() for n, t in tensors.items() if has_values(t)},
        "keys": list(model.state_dict()) if not any(map(nn.parameter.is_lazy, tensors.values())) else None,
    }


def has_values(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_meta


@contextmanager
def refusal(model: nn.Module, error: type[Exception], *words: str) -> Iterator[None]:
    """Check that this error is raised, that it says all of the words, and that nothing happens to the model."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), str(caught.value)
    after = snapshot(model)
    for part in ("modules", "hooks", "tensors", "keys"):
        assert before[part] == after[part], part
    assert all(torch.equal(t, after["values"][n]) for n, t in before["values"].items())


def refused(model: nn.Module, error: type[Exception], *words: str, **options: Any) -> None:
    """Check that planning and injecting are refused."""
    for call in (uora.plan, uora.inject):
        with refusal(model, error, *words):
            call(model, **options)


def adapted(model: nn.Module, images: Tensor | None, **options: Any) -> list[str]:
    """Inject, and check that the adapters act and merge right; paths of what was adapted."""
    before = None if images is None else model(images)
    uora.inject(model, rank=4, **options)
    paths = list(uora.adapters(model))
    if images is not None:
        assert torch.equal(model(images), before)
        awake = wake(model)(images)
        assert (awake - before).abs().max() > 1e-3
        torch.testing.assert_close(merged(model)(images), awake, rtol=1e-4, atol=1e-5)
    return paths
