"""Every public name has an example that runs."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import uora_vision as uora
from uora_vision import export

MODULES = ("export", "integrations")

PUBLIC: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: getattr(uora, name) for name in uora.__all__ if name not in (*MODULES, "__version__")},
    **{f"export.{name}": lambda name=name: getattr(export, name) for name in export.__all__},
    "UoraConfig.replace": lambda: uora.UoraConfig.replace,
}

INTEGRATIONS = (
    ("accelerate", "AcceleratedReinitializer"), ("accelerate", "prepare_reinitializer"), ("lightning", "UoraCallback"),
    ("transformers", "UoraCallback"), ("transformers", "adapter_only"),
)  # fmt: skip


def run_example(thing: Any) -> None:
    (test,) = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs={})
    assert test.examples, f"{thing.__name__} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    failed, _ = runner.run(test, out=said.append)
    assert not failed, "".join(said)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_example(PUBLIC[name]())
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


@pytest.mark.parametrize(("module", "name"), INTEGRATIONS)
def test_an_integration_has_an_example_that_runs(module: str, name: str) -> None:
    pytest.importorskip("pytorch_lightning" if module == "lightning" else module, reason=f"{module} is not installed")
    run_example(getattr(importlib.import_module(f"uora_vision.integrations.{module}"), name))
