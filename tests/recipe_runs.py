"""Recipes in this process, called as from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from common.command import cli
from common.errors import RecipeError
from common.report import figures
from safetensors.torch import load_file

import uora_vision as uora

Call = Callable[..., tuple[int, str]]


def run(recipe: ModuleType, words: Iterable[object], patch: pytest.MonkeyPatch, pictures: bool = False) -> int:
    """Run a recipe; gives the exit code. The pictures of its report would take longer than a small run itself."""
    patch.setattr(sys, "argv", [f"{recipe.__name__}.py", *map(str, words)])
    if not pictures:
        without_pictures(patch)
    try:
        return cli.main(recipe.run, cli.parse(recipe.Options, recipe.__doc__))
    except SystemExit as end:
        return int(end.code or 0)


def without_pictures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(figures.Figure, "savefig", lambda *_, **__: None)


def caller(recipe: ModuleType, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **given: object) -> Call:
    """A function that runs a recipe with the options `given`, where it gets no others, and gives the exit code and the
    last line on stderr: libraries may write there before."""

    def call(*words: object, **changed: object) -> tuple[int, str]:
        named = [word for key, value in (given | changed).items() for word in (f"--{key}", value)]
        capsys.readouterr()
        code = run(recipe, [*named, *words], patch)
        lines = capsys.readouterr().err.strip().splitlines()
        return code, lines[-1] if lines else ""

    return call


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """What the run in a folder has trained, by name."""
    (file,) = (folder / "adapter").glob("*.safetensors")
    return load_file(file)


CHOSEN = ("--rank", 3, "--targets", "attention", "--seed", 5, "--init", "svd", "--token-sampling", 2,
          "--reinit", "layer", "--threshold", 0.25, "--relative", "--alpha", 0.125, "--every", 7,
          "--opt", "sgd", "--lr", 0.5)  # fmt: skip


def assert_the_options_reach_uora(call: Call, patch: pytest.MonkeyPatch, *words: object) -> None:
    """A recipe gives `uora.inject` and `uora.Reinitializer` what its options say, and an optimizer."""
    given: dict[str, Any] = {}
    inject = uora.inject

    def injected(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        given["inject"] = options
        return inject(model, **options)

    def reinitialised(model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        given["reinit"], given["optimizer"] = options, optimizer
        raise RecipeError("that is all")

    patch.setattr(uora, "inject", injected)
    patch.setattr(uora, "Reinitializer", reinitialised)
    code, said = call(*words, *CHOSEN)
    assert code == 2 and "error: that is all" in said, said
    assert given["inject"] == {"rank": 3, "targets": "attention", "seed": 5, "init": "svd", "token_sampling": 2}
    assert given["reinit"] == {"scope": "layer", "threshold": 0.25, "relative": True, "alpha": 0.125, "every": 7}
    assert isinstance(given["optimizer"], torch.optim.SGD)
    assert 0.5 in [group["lr"] for group in given["optimizer"].param_groups]


def assert_it_redraws_by_uora_alone(call: Call, patch: pytest.MonkeyPatch, *words: object) -> None:
    """With --reinit never, and by another method, a recipe makes no `uora.Reinitializer`; with --reinit informed it
    informs the adapter before it trains."""
    inform = uora.inform

    def informed(*args: Any, **options: Any) -> None:
        assert min(inform(*args, **options).values()) > 0
        raise RecipeError("it was informed")

    def forbidden(*_: Any, **__: Any) -> None:
        raise RecipeError("it was made")

    patch.setattr(uora, "Reinitializer", forbidden)
    assert "it was made" in call(*words, "--max-steps", 1)[1]
    for others in (("--reinit", "never"), ("--method", "vera")):
        assert "it was made" not in call(*words, *others, "--max-steps", 1)[1]
    patch.setattr(uora, "inform", informed)
    assert "error: it was informed" in call(*words, "--reinit", "informed", "--rank", 2)[1]
