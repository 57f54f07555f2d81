"""A recipe's options: on the command line, from YAML, and as a run records them."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
import yaml
from common.command import cli
from common.command.choices import Method, Scope
from common.command.options import MethodChoice, RunChoice, TrainChoice
from common.errors import RecipeError
from common.training.folder import CONFIG, prepare_folder, record_config
from common.training.methods import DEFAULTS
from recipe_options import options_of
from typer import Option

RECIPES = Path(__file__).parents[2] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice, TrainChoice, MethodChoice):
    name: Annotated[str, Option(help="of something")] = "nobody"
    epochs: Annotated[int, Option(min=1)] = 3


class Recipe:
    """Calls the command line; keeps the options that the recipe got."""

    def __init__(self, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.patch, self.capsys, self.got = patch, capsys, list[Options]()

    def __call__(self, *words: object) -> tuple[int, str]:
        self.patch.setattr(sys, "argv", ["recipe.py", *map(str, words)])
        try:
            code = cli.main(self.got.append, cli.parse(Options, "A recipe."))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, self.capsys.readouterr().err


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Recipe:
    return Recipe(monkeypatch, capsys)


def test_every_field_is_an_option_with_its_default(recipe: Recipe) -> None:
    assert recipe() == (0, "")
    assert recipe("--method", "lora", "--head-lr", "0.5", "--relative", "--reinit", "layer", "--output", "a")[0] == 0
    assert recipe.got[0] == Options()
    assert recipe.got[1] == Options(
        method=Method.lora, head_lr=0.5, relative=True, reinit=Scope.layer, output=Path("a")
    )


def test_yaml_gives_options_and_the_line_wins(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(
        "method: vera\nhead-lr: 1e-3\nlr: 0.25\nrank: null\nrelative: true\nname: Zoë\nepochs: 7\n", "utf-8"
    )
    assert recipe("--epochs", 2, "--config", path, "--absolute") == (0, "")
    assert recipe.got == [Options(method=Method.vera, head_lr=1e-3, lr=0.25, name="Zoë", epochs=2, relative=False)]


WRONG = {
    "unknown option": ("rank: 8\nranc: 4\nmodle: x\n", "has options that this recipe does not know: modle, ranc"),
    "no mapping": ("- rank\n- 8\n", "must hold lines such as `rank: 8`, it holds a list"),
    "no YAML": ("rank: [8\n", "cannot be read"),
    "no number": ("rank: many\n", "'--rank': Input should be a valid integer"),
    "out of range": ("epochs: 0\n", "'--epochs': Input should be greater than or equal to 1"),
    "no such choice": ("method: best\n", "'best' is not one of 'uora'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_yaml_that_cannot_be_used_gives_one_line_and_code_2(name: str, recipe: Recipe, tmp_path: Path) -> None:
    path, (text, expected) = tmp_path / "options.yaml", WRONG[name]
    path.write_text(text)
    code, said = recipe("--config", path)
    assert (code, expected in said, said.startswith("error: "), len(said.splitlines())) == (2, True, True, 1), said
    assert recipe.got == []


def test_a_missing_file_of_options_is_named(recipe: Recipe, tmp_path: Path) -> None:
    code, said = recipe("--config", tmp_path / "none.yaml")
    assert (code, "none.yaml cannot be read" in said, len(said.splitlines())) == (2, True, 1)


@pytest.mark.parametrize("method", list(Method))
def test_recorded_options_give_the_same_run_again(method: Method, recipe: Recipe, tmp_path: Path) -> None:
    assert recipe("--method", method.value, "--output", tmp_path, "--checkpoint-every", 5, "--max-seconds", 1.5)[0] == 0
    chosen = recipe.got[0].method_options(DEFAULTS)
    config = cli.plain(recipe.got[0]) | {"rank": chosen.rank, "lr": chosen.lr, "head_lr": chosen.head_lr}
    record_config(tmp_path, config, {})
    assert yaml.safe_load((tmp_path / CONFIG).read_text()) == config
    assert recipe("--config", tmp_path / CONFIG) == (0, "")
    resolved: Any = {"rank": chosen.rank, "lr": chosen.lr, "head_lr": chosen.head_lr}
    assert recipe.got[1] == dataclasses.replace(recipe.got[0], **resolved)
    assert recipe.got[1].method_options(DEFAULTS) == chosen


def test_a_run_is_continued_with_the_options_that_it_recorded(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    config = cli.plain(Options(output=tmp_path))
    with pytest.raises(RecipeError, match=r"config\.yaml, which is missing or damaged"):
        prepare_folder(tmp_path, True, "name", config)
    record_config(tmp_path, config, {})
    assert prepare_folder(tmp_path, True, "name", config | {"resume": True, "workers": 3, "quiet": True}) == tmp_path
    with pytest.raises(RecipeError, match="--name was nobody, is now me; --seed was 0, is now 1"):
        prepare_folder(tmp_path, True, "name", config | {"seed": 1, "name": "me"})


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_the_docs_have_every_option_as_the_help_says_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(path, monkeypatch)
    page = (RECIPES.parent / "docs" / "recipes.md").read_text()
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        (option,) = hints[field.name].__metadata__
        name, told = f"--{field.name.replace('_', '-')}", option.help.replace("|", "\\|")
        assert re.search(rf"^\| `{name}` \|[^|]*\| {re.escape(told)} \|$", page, re.M), f"{name}: {told}"
