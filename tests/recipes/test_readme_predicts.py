"""The commands of the README, from a clone to predictions on one's own photos."""

from __future__ import annotations

import csv
import re
import shlex
import tomllib
from pathlib import Path

import imagenet_subset
import numpy as np
import pytest
from PIL import Image
from recipe_runs import run

from uora_vision.__main__ import main

ROOT = Path(__file__).parents[2]
SMALL = ("--model", f"local-dir:{ROOT / 'recipes' / 'weights' / 'vit_cifar60'}", "--epochs", 2, "--batch", 8, "--quiet")
"""For a machine without a network, and a test that does not take long."""


@pytest.mark.slow
def test_three_commands_from_a_clone_to_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"## From a folder of photos.*?```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    install, train, predict = (shlex.split(line, comments=True) for line in block.splitlines())
    assert install == ["pip", "install", "-e", ".[recipes]"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(need.startswith("typer") for need in extras["recipes"])  # what the command `uora` needs

    monkeypatch.chdir(tmp_path)
    chance = np.random.default_rng(0)
    for place, count in (("photos/train/{}", 6), ("photos/test/{}", 2), ("new_photos", 3)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = Path(place.format(name))
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = chance.integers(0, 150, (*chance.integers(70, 90, 2), 3), dtype=np.uint8)
                pixels[..., channel] = 255
                Image.fromarray(pixels).save(folder / f"{name}-{number}.jpg")

    assert train[:2] == ["python", "recipes/imagenet_subset.py"]
    assert run(imagenet_subset, (*train[2:], *SMALL), monkeypatch) == 0
    assert predict[0] == "uora" and main(predict[1:]) == 0
    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert all(Path(row["path"]).name.startswith(row["class"]) for row in rows)
