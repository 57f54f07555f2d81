"""What the plan of the house promises of its files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATHS = sorted((ROOT / "uora_vision" / "maths").glob("*.py"))


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> int:
    """How many a function has, `self`, *args and **kwargs among them."""
    a = node.args
    return len([*a.posonlyargs, *a.args, *a.kwonlyargs]) + (a.vararg is not None) + (a.kwarg is not None)


def test_no_function_of_the_maths_has_more_than_six_parameters() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    found = [(p.name, n) for p in MATHS for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, kinds)]
    assert len(found) > 50
    assert [(name, n.lineno, parameters(n)) for name, n in found if parameters(n) > 6] == []


@pytest.mark.parametrize("path", [p for p in MATHS if p.name != "__init__.py"], ids=lambda p: p.name)
def test_a_file_of_the_maths_starts_with_a_legend_of_shapes(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert re.search(r"^Shapes: .*|\. Shapes: ", text, re.MULTILINE)
