"""`uora train`: the recipes, as programs."""

from __future__ import annotations

import ast
import difflib
import json
import runpy
import sys
import textwrap
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError

INTERRUPTED = 130
PACKAGE = Path(__file__).parents[1]

_started: list[str] = []


def train(
    recipe: Annotated[str | None, typer.Argument(help="Its name; none to list them.")] = None,
    options: Annotated[list[str] | None, typer.Argument(help="Those of the recipe: --help tells them.")] = None,
    where: Annotated[bool, typer.Option("--where", help="Print where its file is, or the folder of all.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="List the recipes as JSON.")] = False,
) -> None:
    """Train by one of the recipes. Without a name, list them: `uora train vit_cifar100 --data photos/`.

    On several GPUs: `torchrun --nproc-per-node 2 $(uora train --where vit_cifar100) --data photos/`.
    """
    there = recipes()
    if recipe is not None and recipe not in there:
        near = difflib.get_close_matches(recipe, there, 1, 0.4)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"there is no recipe {recipe!r}{meant} There are {', '.join(there)}")
    if recipe is None and where:
        print(next(iter(there.values())).parent)
    elif recipe is None:
        told = {name: about(path) for name, path in there.items()}
        lines = (
            textwrap.fill(text, 80, initial_indent=f"{name:16}", subsequent_indent=" " * 16)
            for name, text in told.items()
        )
        print(json.dumps(told, indent=2) if as_json else "\n".join(lines))
    elif where:
        print(there[recipe])
    else:
        raise typer.Exit(run(there[recipe], options or []))


def recipes() -> dict[str, Path]:
    """The files by name: in an installed package beside its code, in a clone beside the package.

    Raises:
        ConfigError: there are none.
    """
    for folder in (PACKAGE / "recipes", PACKAGE.parent / "recipes"):
        if (folder / "common").is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.py"))}
    raise ConfigError(f"{PACKAGE} has no recipes: install uora_vision from its wheel, or run it from a clone")


def about(path: Path) -> str:
    """The first line of what a recipe says of itself."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def run(path: Path, words: list[str]) -> int:
    """Run a recipe in this process, as `python PATH WORDS` would; gives its exit code."""
    sys.argv[:] = [str(path), *words]
    sys.path.insert(0, str(path.parent))
    _started[:] = ["uora", "train", path.stem]
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or find_spec(package) is not None:
            traceback.print_exc()
            return 1
        install = "'uora_vision[recipes]'" if path.parents[1] == PACKAGE else "-e '.[recipes]' (in the clone)"
        print(f"error: recipes need packages that are missing, {package} first: pip install {install}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def command() -> list[str]:
    """The words that started this program, up to its options: of a recipe, for what it tells to do next."""
    return list(_started) or ["python", sys.argv[0]]
