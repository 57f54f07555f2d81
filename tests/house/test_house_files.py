"""What the house promises of its files: their size, their names, and that docs/design.md tells all of them."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import uora_vision as uora

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "uora_vision"
PYTHON = sorted(p for name in ("uora_vision", "recipes", "scripts", "tests") for p in (ROOT / name).rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ENDS = [f"/{p.relative_to(ROOT)}" for p in (*PYTHON, *PACKAGE.rglob("*.pyi"), *PAGES)]
DESIGN = (ROOT / "docs" / "design.md").read_text()
OF_OTHERS = {"train.py", "inference.py", "onnx_export.py", "recipes/NAME.py", "eva.py"}
"""A script of the reader's own, any recipe, and files of timm."""


def test_no_python_file_is_above_400_lines() -> None:
    assert len(PYTHON) > 200
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in PYTHON}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_no_module_bears_the_name_of_a_public_function() -> None:
    """`import uora_vision.plan` would give the function or the module, by what was imported before."""
    public = {name for name in uora.__all__ if inspect.isfunction(getattr(uora, name))}
    assert {"plan", "inject", "merge"} <= public
    modules = {p.stem for p in PACKAGE.rglob("*.py")} | {p.name for p in PACKAGE.rglob("*") if p.is_dir()}
    assert public & modules == set()


def test_tests_lie_as_the_wings_do() -> None:
    wings = {p.parent.name for p in PACKAGE.rglob("__init__.py")} - {"uora_vision"}
    folders = {p.parent.relative_to(ROOT / "tests").as_posix() for p in (ROOT / "tests").rglob("test_*.py")}
    assert folders == wings | {"attacks", "house", "recipes", "scripts"}


def test_no_test_file_imports_another() -> None:
    importing = re.compile(r"^(?:from|import) test_", re.MULTILINE)
    assert [p.name for p in (ROOT / "tests").rglob("*.py") if importing.search(p.read_text())] == []


def test_the_design_names_every_file_once() -> None:
    files = [p for pattern in ("*.py", "*.pyi") for p in PACKAGE.rglob(pattern)]
    wanted = [str(p.relative_to(PACKAGE)) for p in files if p.parent == PACKAGE or p.name != "__init__.py"]
    assert sorted(re.findall(r"`([\w/]+\.pyi?)`", DESIGN)) == sorted(wanted)


def imports() -> Iterator[tuple[str, str]]:
    """Which wing imports which."""
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = here[: len(here) - node.level]
                for name in [node.module] if node.module else [alias.name for alias in node.names]:
                    yield here[0], (*above, *name.split("."))[0]


@pytest.mark.slow
def test_the_table_of_the_wings_is_that_of_the_imports() -> None:
    """Each wing in it imports what its row says, and all that is imported is found by going from row to row."""
    rows = re.findall(r"^\| `?([\w ]+)`? \| ([^|]*) \| ([^|]*) ?\|$", DESIGN, re.MULTILINE)
    arrows = [(wing, one) for wing, _, below in rows for one in re.findall(r"`(\w+)`|the (ground)", below)]
    arrows = [(wing, "".join(one)) for wing, one in arrows]
    ((_, ground, _),) = [row for row in rows if row[0] == "the ground"]
    found = {tuple("ground" if f"`{w}`" in ground else w for w in pair) for pair in imports()}
    found = {(one, two) for one, two in found if one != two and not {one, two} & {"__init__", "__main__"}}
    assert len(arrows) > 8 and set(arrows) <= found

    below: dict[str, set[str]] = {}
    for one, two in reversed(arrows):  # drawn from above to below
        below.setdefault(one, set()).update({two}, below.get(two, set()))
    assert {(one, two) for one, two in found if two not in below.get(one, set())} == set()


def mentions(text: str) -> set[str]:
    """Python files that a page names as code, and pages that it names in any way."""
    code = " ".join(re.findall(r"`[^`\n]+`", text))
    return set(re.findall(r"[\w./-]*\w\.pyi?\b", code)) | set(re.findall(r"\bdocs/\w+\.md\b", text))


def unknown(text: str) -> list[str]:
    names = {name.removeprefix("./") for name in mentions(text)} - OF_OTHERS
    return sorted(name for name in names if not any(end.endswith(f"/{name}") for end in ENDS))


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_exists(path: Path) -> None:
    assert unknown(path.read_text()) == []
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_no_page_installs_what_no_index_has() -> None:
    """Until a version is published: docs/releasing.md says so, and how one is."""
    pages = {p.name: re.findall(r"pip install [^`\n]*\buora_vision\b", p.read_text()) for p in PAGES}
    assert [name for name, found in pages.items() if found] == ["releasing.md"]


def test_what_code_names_exists() -> None:
    code = [p for p in PYTHON if ROOT / "tests" not in p.parents]
    assert {p.name: missing for p in code if (missing := unknown(p.read_text()))} == {}
