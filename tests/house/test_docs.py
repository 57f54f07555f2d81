"""What the pages show works: their Python runs, their commands have these options, their tables are complete."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.version import Version
from pages import GIVEN, PAGES, ROOT, blocks
from recipe_options import options_of

import uora_vision as uora
from uora_vision.cli.app import app
from uora_vision.options import PEFT

ELSEWHERE = {
    "docs/integrations.md": "tests/integrations trains with each tool",
    "docs/distributed.md": "tests/lifecycle/test_distributed.py starts processes",
    "docs/quantised.md": "downloads a model; tests/weights/test_quantised_out.py loads one from a folder",
}
"""Pages whose Python is looked at and not run, and why."""


@pytest.mark.slow
def test_the_code_of_the_pages_runs(tmp_path: Path) -> None:
    """In a process of its own, since that of extending.md changes the library."""
    with_code = {page for page in PAGES if blocks(page)}
    assert with_code == GIVEN.keys() | ELSEWHERE.keys()
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "pages.py"), *GIVEN], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line in GIVEN] == list(GIVEN)


def called(node: ast.Call, names: dict[str, Any]) -> Any:
    """The function of this library that is called, if it is one."""
    match node.func:
        case ast.Attribute(ast.Name("uora"), attribute):
            return getattr(uora, attribute, None)
        case ast.Name(name):
            return names.get(name)
    return None


def unknown_names(code: str) -> Iterator[str]:
    """Names of this library that are not public, and options that a function does not have."""
    names: dict[str, Any] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uora_vision"):
            module = importlib.import_module(node.module or "")
            found = {alias.name: getattr(module, alias.name, None) for alias in node.names}
            names |= found
            yield from (name for name, thing in found.items() if thing is None)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "uora":
            yield from {node.attr} - set(uora.__all__)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and callable(function := called(node, names)):
            wanted = inspect.signature(function).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in wanted.values()):
                yield from ({keyword.arg for keyword in node.keywords} - {None} - wanted.keys())  # type: ignore[misc]


def test_unknown_names_are_seen() -> None:
    code = "from uora_vision.export import to_peft\nuora.injekt(m)\nuora.inject(m, r=3)\nuora.Reinitializer(m, tau=1)"
    assert sorted(unknown_names(code)) == ["injekt", "r", "tau", "to_peft"]


@pytest.mark.slow
@pytest.mark.parametrize("page", ELSEWHERE)
def test_code_that_is_not_run_names_what_there_is(page: str) -> None:
    pytest.importorskip("lightning")
    assert [name for block in blocks(page) for name in unknown_names(block)] == []


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&& ", line):
                    if words := shlex.split(part, comments=True):
                        yield page, words


def known_options(words: list[str], monkeypatch: pytest.MonkeyPatch) -> set[str] | None:
    """The options of a command of this project; None for another's.

    Raises:
        KeyError, FileNotFoundError: the project has no such command.
    """
    match words:
        case ["uora", "train", recipe, *_]:
            return known_options(["python", f"recipes/{recipe}.py"], monkeypatch)
        case ["uora", name, *_]:
            return {option for p in COMMANDS[name].params for option in (*p.opts, *p.secondary_opts)}
        case ["python" | "python3" | "accelerate", *rest] if recipes := [w for w in rest if w.startswith("recipes/")]:
            if recipes == ["recipes/NAME.py"]:
                return None
            fields = dataclasses.fields(options_of(ROOT / recipes[0], monkeypatch))
            return {"--" + field.name.replace("_", "-") for field in fields} | {"--resume", "--config"}
        case ["python" | "python3", script, *_] if script.startswith("scripts/"):
            assert (ROOT / script).exists(), script
    return None


def test_commands_on_the_pages_have_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wrong, checked = [], 0
    for page, words in commands():
        asked = {re.sub("=.*", "", word) for word in words if re.match("--[a-z]", word)}
        if words[0] == "accelerate":  # what stands before the recipe is accelerate's own
            asked -= set(words[: next(i for i, word in enumerate(words) if word.startswith("recipes/"))])
        known = known_options(words, monkeypatch)
        checked += known is not None
        wrong += [(page, option) for option in asked - (known or asked) - {"--help"}]
        if words[:2] == ["pip", "install"] and "-e" in words:
            (named,) = [word for word in words if word.startswith(".")]
            wrong += [(page, extra) for extra in re.findall(r"\w+", named) if extra not in extras]
    assert wrong == [] and checked > 60


def test_the_page_of_the_command_has_every_command() -> None:
    shown = {words[1] for block in blocks("docs/command.md", "sh") for words in map(shlex.split, block.splitlines())}
    listed = set(re.findall(r"`(\w+)`", PAGES["docs/command.md"].read_text().partition("| command |")[2]))
    assert shown == listed == set(COMMANDS)


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    below = f"\n{PAGES[page].read_text()}".partition(f"\n{heading}\n")[2]
    text = f"\n{below}".partition("\n|")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:]]


@pytest.mark.slow
def test_every_option_of_peft_has_its_row() -> None:
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(uora.UoraConfig)}
    for config in ("LoraConfig", "VeraConfig"):
        table = rows("docs/from_peft.md", f"## Options of {config}")
        listed = [name for row in table for name in re.findall(r"`(\w+)`", row[0])]
        wanted = {field.name for field in dataclasses.fields(getattr(peft, config))}
        if config == "VeraConfig":  # what all configurations have stands with LoraConfig's
            wanted -= {field.name for field in dataclasses.fields(peft.PeftConfig)}
        assert len(set(listed)) == len(listed) > 10
        assert set(listed) >= wanted or Version(peft.__version__) >= Version("0.22")  # another version may have others
        for names, here in (row for row in table if row[1] != "as above"):
            for name in set(re.findall(r"`(\w+)`", names)) & PEFT.keys():
                told = re.match(r"none: the scale.*`(\w+)`|`(\w+)", here)
                assert told and PEFT[name] in told.groups() and PEFT[name] in fields, name


def test_flags_of_the_recipes_beside_those_of_train_py_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = dataclasses.fields(options_of(ROOT / "recipes" / "imagenet_subset.py", monkeypatch))
    known = {"--" + field.name.replace("_", "-") for field in fields} | {"--resume", "--config"}
    here = [
        flag for row in rows("docs/from_timm.md", "## Flags of train.py") for flag in re.findall(r"--[\w-]+", row[1])
    ]
    assert len(here) > 25 and set(here) <= known
    predict = {option for p in COMMANDS["predict"].params for option in p.opts}
    there = [flag for row in rows("docs/from_timm.md", "## inference.py") for flag in re.findall(r"--[\w-]+", row[1])]
    assert len(there) > 5 and set(there) <= predict


def test_every_row_beside_other_tools_is_yes_or_has_a_reason() -> None:
    table = rows("docs/comparison.md", "# Beside other tools")
    assert len(table) > 25 and {len(row) for row in table} == {7}
    for row in table:
        yes = re.match(r"\[yes\]\(([\w/]+\.md)(?:#[\w.-]+)?\)", row[1])
        assert (yes and (ROOT / "docs" / yes[1]).exists()) or re.match(r"no(?: recipe)?: .{15,}", row[1]), row


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pages of the site, built strictly: links and anchors that lead nowhere are errors."""
    pytest.importorskip("zensical", reason="zensical is not installed")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "zensical.toml", folder)  # a link would be followed, and the site made here
    for name in ("uora_vision", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "griffe" not in done.stdout + done.stderr, "a docstring was not understood"
    return {page.relative_to(folder / "site").as_posix(): page.read_text() for page in folder.rglob("site/**/*.html")}


@pytest.mark.slow
def test_the_site_has_every_page_and_every_public_name(site: dict[str, str]) -> None:
    nav = re.findall(r'"([\w/]+)\.md"', (ROOT / "zensical.toml").read_text())
    assert sorted(nav) == sorted(p.removeprefix("docs/").removesuffix(".md") for p in PAGES if p.startswith("docs/"))
    assert {f"{page}.html" for page in nav} <= site.keys()
    reference = "".join(text for name, text in site.items() if name.startswith("reference/"))
    names = set(re.findall(r'<h2 id="uora_vision\.([\w.]+)"', reference))
    public = set(uora.__all__) - {"export", "integrations", "__version__"}
    assert {name for name in names if "." not in name} == public
    assert {name for name in names if name.startswith("export.")} == {f"export.{name}" for name in uora.export.__all__}
    assert reference.count("Examples:</span>") > 40, "what a docstring shows is code"
    anchors = re.findall(r"\(docs/([\w/]+)\.md#([\w.-]+)\)", PAGES["README.md"].read_text())
    assert len(anchors) > 3 and [(page, a) for page, a in anchors if f'id="{a}"' not in site[f"{page}.html"]] == []


@pytest.mark.slow
def test_the_site_fetches_nothing_from_elsewhere(site: dict[str, str]) -> None:
    elsewhere = re.compile(r'<(?:script|img|link|iframe)[^>]+(?:src|href)="?https?:[^" >]+|class="mermaid"')
    assert {name: elsewhere.findall(text) for name, text in site.items() if elsewhere.search(text)} == {}
