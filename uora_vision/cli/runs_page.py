"""The page of `uora runs`: a table of the runs, and their curves one over another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .page import LOWER, label, templates, write_page
from .run_data import Run, columns, differing, measures

COLOURED = 10
"""Runs with a colour of their own; the others are grey."""


def write_runs(found: Sequence[Run], by: str, path: Path, title: str, unfinished: Sequence[str] = ()) -> None:
    """Write the page; what stood there before stays until the new one is complete.

    Args:
        found: the best first.
        by: what they are sorted by.
        title: of the page.
        unfinished: names of runs that have not come to their end.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise ConfigError("--html needs matplotlib: pip install matplotlib") from error
    write_page(render(found, by, title, unfinished), path)


def render(found: Sequence[Run], by: str, title: str, unfinished: Sequence[str] = ()) -> str:
    """The page as a string."""
    return templates().get_template("runs.html.j2").render(
        title=f"Runs in {title}", runs=found, by=by, order="lowest" if by in LOWER else "highest",
        falling=by in measures(found), columns=columns(found, by), options=differing(found),
        curves=_curves(found), unfinished=unfinished, coloured=COLOURED,
    )  # fmt: skip


def _curves(found: Sequence[Run]) -> list[dict[str, Any]]:
    """A picture for each quantity that a run has over its epochs."""
    from .drawing import overlay

    pictures = []
    for key in [*(f"test_{name}" for name in measures(found)), "train_loss", "train_accuracy"]:
        lines = [
            (run.name, [(row["epoch"], float(row[key])) for row in run.history if _is_point(row, key)]) for run in found
        ]
        told = [name for name, points in lines if points]
        if not told:
            continue
        split, _, quantity = key.partition("_")
        name = label(quantity) + (", training" if split == "train" else "")
        pictures.append({
            "title": name,
            "uri": overlay(lines, label(quantity), percent="accuracy" in key, most=COLOURED),
            "caption": "Lower is better." if quantity in LOWER else "",
            "alt": f"{name} over the epochs of {len(told)} runs: {', '.join(told[:COLOURED])}.",
            "large": False,
        })  # fmt: skip
    return pictures


def _is_point(row: dict[str, Any], key: str) -> bool:
    return all(isinstance(row.get(name), int | float) for name in ("epoch", key))
