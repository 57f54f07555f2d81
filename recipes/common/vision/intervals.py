"""How far a score would move with other test images: percentiles of the bootstrap (Efron, 1979)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from uora_vision.cli.page import label, show

from ..report.page import Sheet
from .evaluation import Measured

MOST, LEAST, WORK = 500, 100, 5e7
"""Test sets drawn: fewer where there are very many numbers to look at."""
LEVEL = 0.95
SHOWN = 40
"""Rows of a table in a report."""


@dataclass(frozen=True)
class Intervals:
    """The middle 95% of numbers over test sets drawn, with replacement, from the test images.

    Args:
        scores: of each score [low, high]; without those that no draw had, such as kappa where there is one rank.
        parts: of each number of every class, label or target (parts, 2); not a number where no draw had it.
        draws: test sets that were drawn.
    """

    scores: dict[str, list[float]]
    parts: dict[str, np.ndarray]
    draws: int


def intervals(evaluation: Measured, seed: int = 0) -> Intervals:
    """Of what was measured."""
    count, generator = len(evaluation.labels), np.random.default_rng(seed)
    draws = int(np.clip(WORK / evaluation.labels.size, LEAST, MOST))
    drawn = [evaluation.take(generator.integers(0, count, count)) for _ in range(draws)]
    scores = {name: _ends(np.array(values)) for name, values in _columns([one.scores for one in drawn]).items()}
    parts = {name: _ends(np.stack(values)) for name, values in _columns([one.parts for one in drawn]).items()}
    return Intervals({n: ends.tolist() for n, ends in scores.items() if np.isfinite(ends).all()}, parts, draws)


def per_part(evaluation: Measured, names: tuple[str, ...], found: Intervals) -> dict[str, dict[str, Any]]:
    """Every number of each class, label or target that has test images, with its interval, by name."""
    told: dict[str, dict[str, Any]] = {name: {"test_images": count} for name, count in evaluation.images(names).items()}
    for key, values in evaluation.parts.items():
        for name, value, (low, high) in zip(names, values, found.parts[key], strict=False):
            if np.isfinite(value):
                told[name] |= {key: float(value), f"{key}_interval": [float(low), float(high)]}
    return told


def sheets(evaluation: Measured, per: dict[str, dict[str, Any]], found: Intervals, kind: str) -> list[Sheet]:
    """As tables of a report.

    Args:
        per: see `per_part`.
        kind: what it is of, such as a class.
    """
    sure = f"In brackets: 95 % of {found.draws} test sets drawn from the test images, with replacement."
    whole = [[label(name), _shown(name, value, found.scores.get(name))] for name, value in evaluation.scores.items()]
    keys, by = list(evaluation.parts), evaluation.worst
    names = [name for name in per if per[name]["test_images"]]
    ordered = names if by is None else sorted(names, key=lambda name: per[name][by])
    rows = [
        [name, per[name]["test_images"], *(_shown(k, per[name].get(k), per[name].get(f"{k}_interval")) for k in keys)]
        for name in ordered[:SHOWN]
    ]
    which = "" if by is None else "the worst first" if len(names) <= SHOWN else f"the worst {SHOWN} of {len(names):,}"
    many = f"{which[:1].upper()}{which[1:]}. " if which else ""
    parts = Sheet(f"Every {kind}", [kind, "test_images", *keys], rows, f"{many}{evaluation.caption}{sure}")
    return [Sheet("How sure the scores are", ["measure", "score"], whole, sure), *([parts] if len(per) > 1 else [])]


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _ends(values: np.ndarray) -> np.ndarray:
    """[low, high] of numbers (draws,), or (parts, 2) of numbers (draws, parts), without those that are none."""
    if values.ndim > 1:
        return np.stack([_ends(column) for column in values.T])
    finite = values[np.isfinite(values)]
    return np.quantile(finite, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) if len(finite) else np.full(2, np.nan)


def _shown(name: str, value: float | None, ends: list[float] | None) -> str:
    between = "" if ends is None else f" ({show(name, ends[0])} to {show(name, ends[1])})"
    return show(name, value) + between
