"""`uora train`: the recipes by name, run as the programs that they are."""

from __future__ import annotations

import ast
import json
import shlex
import sys
from pathlib import Path

import pytest

from uora_vision.__main__ import main
from uora_vision.cli import train

ROOT = Path(__file__).parents[2]
FAKES = {
    "say": "import sys\nfrom beside import word\nprint(__name__, word, *sys.argv[1:])\nsys.exit(3)",
    "text": 'import sys\nsys.exit("error: of its own")',
    "stop": "raise KeyboardInterrupt",
    "fail": "raise OSError('a bug')",
    "lack": "import uora_no_such_package.part",
    "lost": "import json.no_such_part",
    "good": '"""Does nothing.\n\nMore."""',
}


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes in an installed package."""
    folder = tmp_path / "uora_vision" / "recipes"
    (folder / "common").mkdir(parents=True)
    for name, code in FAKES.items():
        (folder / f"{name}.py").write_text(code)
    (folder / "beside.py").write_text("word = 'beside'")
    monkeypatch.setattr(train, "PACKAGE", folder.parent)
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(train, "_started", [])
    return folder


def test_a_recipe_runs_as_a_program(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its options, those of help and of the command itself among them, its exit code, and what it says."""
    wanted = {  # of each: options, exit code, and the last line on stdout and on stderr
        "say": (["--help", "--where", "a b"], 3, "__main__ beside --help --where a b", ""),
        "text": ([], 1, "", "error: of its own"),
        "stop": ([], 130, "", "interrupted"),
        "fail": ([], 1, "", "OSError: a bug"),
        "lack": ([], 2, "", "error: recipes need packages that are missing, uora_no_such_package first: "
                            "pip install 'uora_vision[recipes]'"),
        "lost": ([], 1, "", "ModuleNotFoundError: No module named 'json.no_such_part'"),
        "good": ([], 0, "", ""),
    }  # fmt: skip
    for name, (words, code, said, told) in wanted.items():
        assert (name, main(["train", name, *words])) == (name, code)
        out, err = capsys.readouterr()
        assert (name, out.strip(), (err.splitlines() or [""])[-1]) == (name, said, told)
        assert train.command() == ["uora", "train", name]
    (fakes / "common").rename(fakes.parents[1] / "common")
    assert main(["train"]) == 2 and "has no recipes: install uora_vision from its wheel" in capsys.readouterr().err


def test_which_recipes_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    files = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.py"))}
    assert main(["train"]) == 0
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines() if line[0] != " "] == list(files)
    assert max(map(len, told.splitlines())) <= 80
    assert main(["train", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines == {name: ast.get_docstring(ast.parse(p.read_text())).partition("\n")[0] for name, p in files.items()}
    assert " ".join(" ".join(f"{name} {line}" for name, line in lines.items()).split()) == " ".join(told.split())
    assert main(["train", "--where"]) == 0 and main(["train", "--where", "glue"]) == 0
    told = capsys.readouterr().out
    assert [Path(line).resolve() for line in told.splitlines()] == [
        files["glue"].resolve().parent,
        files["glue"].resolve(),
    ]
    for name, meant in {
        "vit-cifar100": "did you mean vit_cifar100? There",
        "e2e": "did you mean e2e_nlg?",
        "zzz": ". T",
    }.items():
        assert main(["train", name]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: there is no recipe {name!r}") and meant in err and ", ".join(files) in err


@pytest.mark.slow
def test_a_run_goes_on_with_the_command_that_it_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [*sys.argv])
    monkeypatch.setattr(train, "_started", [])
    model = f"local-dir:{train.recipes()['vit_cifar100'].parent / 'weights' / 'vit_cifar60'}"
    line = (
        f"train vit_cifar100 --data digits --shots 4 --epochs 2 --batch 20 --model {model} --output {tmp_path / 'run'}"
    )
    assert main([*shlex.split(line), "--max-steps", "2"]) == 0
    ((told),) = [s for s in capsys.readouterr().out.splitlines() if "To go on: " in s]
    assert told.partition("To go on: ")[2] == f"uora {line} --resume"
    assert main([*shlex.split(line), "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 4
