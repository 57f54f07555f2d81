"""Tiny images that show what is told of them, and a table of it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LEVELS = ("low", "mid", "high")


def draw(folder: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Images of 16 x 16 in `folder`/img, and a row for each: how bright it is, as a class, a rank and two numbers; and
    whether its left half is red and its top green."""
    (folder / "img").mkdir(parents=True)
    chance, rows = np.random.default_rng(seed), []
    for number in range(count):
        level, red, green = number % 3, int(chance.random() < 0.4), int(chance.random() < 0.5)
        image = np.full((16, 16, 3), 40 + 80 * level)
        image[:, : 8 * red] = (255, 0, 0)
        image[: 5 * green] = (0, 255, 0)
        noisy = np.clip(image + chance.integers(-8, 8, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "img" / f"{number}.png")
        rows.append({
            "path": f"img/{number}.png", "label": LEVELS[level], "stars": level + 1,
            "tags": ";".join(n for n, there in (("red", red), ("green", green)) if there) or "plain",
            "red": red, "green": green, "light": 1000 + 250.5 * level, "gram": 0.01 * level + red,
            "split": ("train", "train", "test")[number // 3 % 3],
        })  # fmt: skip
    return rows


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """As csv."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
