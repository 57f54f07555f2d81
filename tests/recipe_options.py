"""The options of a recipe, without what it imports to run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def options_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its dataclass of options."""
    recipe = ModuleType(path.stem)
    monkeypatch.setitem(sys.modules, path.stem, recipe)
    options = path.read_text().partition("if __name__ ==")[0]  # what is imported below takes long
    exec(compile(options, path.name, "exec"), vars(recipe))
    return recipe.Options
