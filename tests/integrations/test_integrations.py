"""What the integrations with training tools share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

import uora_vision as uora
from uora_vision.integrations.state import after_step, changing_state


def test_a_step_that_calls_its_parents_step_counts_once() -> None:
    class Derived(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    weight = nn.Parameter(torch.ones(1))
    torch.optim.SGD([weight])  # torch hooks a class's step when the first of its objects is made
    optimizer, calls = Derived([weight]), []
    stop = after_step(optimizer, lambda: calls.append(1))
    optimizer.step()
    assert calls == [1]
    stop()
    optimizer.step()
    assert calls == [1]


def test_a_tied_frozen_weight_does_not_count_as_changing() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    model["a"].requires_grad_(False)
    assert changing_state(model).keys() == {"b.bias", "c.weight", "c.bias"}


def test_the_library_imports_no_training_tool() -> None:
    package = Path(uora.__file__).parent
    tool = re.compile(
        r"^(?:try:\n    )?(?:from|import) (?:transformers|trl|lightning|pytorch_lightning|accelerate)", re.M
    )
    files = [p for p in package.rglob("*.py") if p.relative_to(package).parts[0] != "recipes"]  # the wheel has those
    found = {p.name for p in files if tool.search(p.read_text())}
    assert found == {"accelerate.py", "lightning.py", "transformers.py"}
