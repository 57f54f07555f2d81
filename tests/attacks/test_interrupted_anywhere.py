"""Ctrl-C, or memory that runs out, at any line of an operation on the adapters of a model."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import CodeType
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
    "strength": lambda m: uora.strength(m, 0.5, "b"),
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


Line = tuple[CodeType, int]


@contextmanager
def on_every_line(see: Callable[[Line], None], where: Callable[[CodeType], bool]) -> Iterator[None]:
    """In the block, `see` is called before each line that is run of code for which `where` holds."""

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            see((frame.f_code, frame.f_lineno))
        return trace if event != "call" or where(frame.f_code) else None

    old = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(old)


def moments(act: Callable[[nn.Module], Any], model: nn.Module) -> list[tuple[Line, int]]:
    """Every fourth of the library's lines that the operation runs, with the first time or the last that it is run."""
    seen = Counter[Line]()
    with on_every_line(lambda line: seen.update([line]), lambda code: "uora_vision" in code.co_filename):
        act(model)
    return [(line, seen[line] if number % 2 else 1) for number, line in enumerate(list(seen)[::4])]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.slow
def test_all_or_nothing(name: str) -> None:
    act, start = OPERATIONS[name], make()
    before = state(start)
    model = copy.deepcopy(start)
    act(model)
    after = state(model)
    stopped = 0
    for line, times in moments(act, copy.deepcopy(start)):
        model, left = copy.deepcopy(start), times

        def stop(found: Line, line: Line = line) -> None:
            nonlocal left
            left -= found == line
            if not left:
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt), on_every_line(stop, lambda code, line=line: code is line[0]):
            act(model)
        stopped += not left
        found = state(model)
        assert any(found[0] == s[0] and torch.allclose(found[1], s[1], atol=1e-5) for s in (before, after)), (
            line,
            found[0],
        )
    assert stopped > 4
