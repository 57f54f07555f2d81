"""Ctrl-C, or memory that runs out, at any line of an operation on the adapters of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import wake
from torch import Tensor, nn

import uora_vision as uora


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(x).relu()))


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def make() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    for seed, name in enumerate("ab"):
        wake(uora.inject(model, name=name, rank=4, targets="mlp"), seed=seed)
        uora.Reinitializer(model, threshold=0.5).step()
        wake(model, seed=seed)
        nn.init.normal_(model.head.weight, std=1.0 + seed)
    return model


def use(context: Any) -> None:
    with context:
        pass


OPERATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "activate": lambda m: uora.activate(m, "a"),
    "disabled": lambda m: use(uora.disabled(m)),
    "route": lambda m: use(uora.route(m, ["a", "b"])),
    "merge": uora.merge,
    "merge reversibly": lambda m: uora.merge(m, reversible=True),
    "shares": lambda m: uora.merge(m, shares={"a": 0.5, "b": 0.5}),
    "remove": uora.remove,
    "delete": lambda m: uora.delete(m, "a"),
    "inject": lambda m: uora.inject(m, name="c", rank=4, targets="mlp"),
}


def says(model: nn.Module) -> tuple[Any, ...]:
    if "_uora_merged" in vars(model):
        return ("merged",)
    if "_uora_library" not in vars(model):
        return ("plain",)
    return (
        uora.active_adapter(model),
        tuple(uora.adapter_names(model)),
        uora.active_adapter(model) and len(uora.adapters(model)),
    )


def state(model: nn.Module) -> tuple[Any, Tensor]:
    with torch.no_grad():
        return says(model), model(X)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.slow
def test_all_or_nothing(name: str) -> None:
    act = OPERATIONS[name]
    before = state(make())
    model = make()
    act(model)
    after = state(model)
    line = 0
    while True:
        line += 7  # every seventh, and each operation has hundreds
        model, seen = make(), 0

        def trace(frame: Any, event: str, _: Any, line: int = line) -> Any:
            nonlocal seen
            if "uora_vision" not in frame.f_code.co_filename:
                return None
            if event == "line":
                seen += 1
                if seen == line:
                    raise KeyboardInterrupt
            return trace

        old = sys.gettrace()
        sys.settrace(trace)
        try:
            act(model)
        except KeyboardInterrupt:
            sys.settrace(old)
        else:
            break
        finally:
            sys.settrace(old)
        found = state(model)
        assert any(found[0] == s[0] and torch.allclose(found[1], s[1], atol=1e-5) for s in (before, after)), (
            line,
            found[0],
        )
    assert line > 7
