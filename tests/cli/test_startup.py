"""Help and mistakes are answered before anything is imported that takes seconds: what is imported is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import uora_vision as uora

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "timm", "transformers", "open_clip", "accelerate", "datasets", "trl", "peft", "albumentations", "cv2",
         "matplotlib", "pandas", "sklearn", "torchmetrics"]  # fmt: skip
COMMANDS = [
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").glob("*.py")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts" / "benchmarks").glob("*.py")),
    "scripts/compare_methods.py",
    "scripts/coverage.py",
    "scripts/coverage_types.py",
    "scripts/fuzz.py",
    "scripts/weights/pretrain_vit.py",
]
WRONG = {  # values that only the command itself can tell to be wrong
    ("recipes/glue.py", "--rank", "0"): "'--rank': Input should be greater than or equal to 1",
    ("recipes/vit_cifar100.py", "--checkpoint-every", "soon"): "takes steps such as 500 or minutes such as 10m",
    ("recipes/llm_instruct.py", "--precision", "fp64"): "'fp64' is not one of 'no', 'bf16', 'fp16'",
    ("recipes/clip_finetune.py", "--config", "none.yaml"): "none.yaml cannot be read",
    ("scripts/benchmarks/step.py", "--methods", "dora-8"): "no method 'dora-8'",
    ("scripts/benchmarks/scale.py", "--ranks", "8,x"): "whole numbers above 0",
    ("scripts/benchmarks/inject.py", "--models", "Llama 70B"): "no model 'Llama 70B'",
}
# Calls one command after the other, and tells of each what it wrote, how it ended, and what it was first to import.
CALLS = """
import contextlib, io, json, runpy, sys

def file(path, *words):
    sys.argv[:] = [path, *words]
    sys.path[0] = path.rpartition("/")[0]
    runpy.run_path(path, run_name="__main__")

def uora(*words):
    from uora_vision.__main__ import main

    sys.exit(main(list(words)))

heavy, calls = map(json.loads, sys.argv[1:])
for call in calls:
    there, said, code = set(sys.modules), io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            (uora if call[0] == "uora" else file)(*call[call[0] == "uora":])
        except SystemExit as end:
            code = end.code or 0
    new = {name for name in heavy if name in set(sys.modules) - there}
    print(json.dumps([code, " ".join(said.getvalue().replace("│", " ").split()), sorted(new)]))
"""


def answers(calls: list[tuple[str, ...]]) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(HEAVY), json.dumps(calls)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_command_is_forgotten() -> None:
    files = [path for folder in ("recipes", "scripts") for path in (ROOT / folder).rglob("*.py")]
    parse = [path for path in files if any(f"{name}(" in path.read_text() for name in ("typer.run", " = cli.parse"))]
    assert sorted(path.relative_to(ROOT).as_posix() for path in parse) == sorted(COMMANDS)


@pytest.mark.parametrize(("word", "wanted", "message"), [("--help", 0, "Usage:"), ("--no-such", 2, "o such option")])
@pytest.mark.slow
def test_help_and_a_wrong_option_import_nothing_heavy(word: str, wanted: int, message: str) -> None:
    for path, (code, said, imported) in zip(COMMANDS, answers([(path, word) for path in COMMANDS]), strict=True):
        assert (path, code, imported) == (path, wanted, []) and message in said, said


@pytest.mark.slow
def test_a_wrong_value_is_told_before_anything_heavy() -> None:
    for (call, message), (code, said, imported) in zip(WRONG.items(), answers(list(WRONG)), strict=True):
        assert (call, code, imported) == (call, 2, []) and message in said, said


@pytest.mark.slow
def test_the_command_uora_imports_nothing_heavy() -> None:
    words = [
        "--help", "plan --help", "export --help", "plan --ranc", "plan", "plan timm/vit_base_patch16_22", "plan bertt",
        "predict --help", "predict a --adapter b --output a.xls", "train", "train glue --help", "train glue --ranc",
        "train glu", "upgrade no-such-folder", "--version",
    ]  # fmt: skip
    calls = [("uora", *line.split()) for line in words]
    for line, (code, said, imported) in zip(words, answers(calls), strict=True):
        good = line.startswith("--") or "--help" in line or line == "train"
        assert (line, code, imported) == (line, 0 if good else 2, []), said
    assert "no-such-folder is no folder" in answers([calls[-2]])[0][1] and f"uora_vision {uora.__version__}" in said
