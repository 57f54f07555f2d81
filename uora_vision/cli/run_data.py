"""Runs of the recipes, as their folders tell of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError

METRICS, HISTORY = "metrics.json", "history.json"
UNFINISHED = ("checkpoint.pt", "checkpoints")
"""What a run has that has not come to its end."""
LEFT = {"output", "resume", "quiet", "demo", "track", "workers", "checkpoint_every", "max_steps", "max_seconds"}
"""Options that change nothing of what is measured."""
SPENT = ("trained_parameters_without_head", "seconds")
MOST_MEASURES = 3


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        name: of its folder, within the folder that was asked for.
        metrics: every number of it.
        config: its options.
        history: a row per epoch.
    """

    name: str
    metrics: dict[str, Any]
    config: dict[str, Any]
    history: list[dict[str, Any]]

    def number(self, key: str) -> float | None:
        """A metric or an option; None where it has none that is a number."""
        found = self.metrics.get(key, self.config.get(key))
        number = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
        return float(found) if number and found is not None else None


def find_runs(folder: Path) -> tuple[list[Run], list[str], list[str]]:
    """The finished runs in a folder, why others cannot be read, and the names of those that are not finished."""
    found, odd = [], []
    for path in sorted(folder.rglob(METRICS)):
        try:
            found.append(_read(path, folder))
        except (OSError, ValueError, TypeError, DataError) as error:
            odd.append(f"{path} is left out: {(str(error).splitlines() or [type(error).__name__])[0]}")
    going = {p.parent for name in UNFINISHED for p in folder.rglob(name) if not (p.parent / METRICS).exists()}
    return found, odd, [_name(path, folder) for path in sorted(going)]


def _read(path: Path, folder: Path) -> Run:
    metrics = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(metrics, dict) or not isinstance(config := metrics.pop("config", None), dict):
        raise DataError("it is not of a recipe")
    log = path.with_name(HISTORY)
    history = json.loads(log.read_text(encoding="utf-8")) if log.is_file() else []
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise DataError(f"its {HISTORY} is no list of epochs")
    return Run(_name(path.parent, folder), metrics, config, history)


def _name(path: Path, folder: Path) -> str:
    return folder.resolve().name if path == folder else path.relative_to(folder).as_posix()


def measures(found: Sequence[Run]) -> list[str]:
    """What the runs measured at their ends, the loss last."""
    names = dict.fromkeys(
        key.removeprefix("test_") for run in found for row in run.history for key in row if key.startswith("test_")
    )
    return sorted((n for n in names if any(run.number(n) is not None for run in found)), key=lambda n: n == "loss")


def main_measure(found: Sequence[Run]) -> str:
    return next(iter(measures(found)), "seconds")


def ranked(found: Sequence[Run], by: str) -> list[Run]:
    """The best first; those without that number last, by name.

    Raises:
        ConfigError: no run has it.
    """
    from .page import LOWER

    if all(run.number(by) is None for run in found):
        known = sorted({key for run in found for key in {**run.metrics, **run.config} if run.number(key) is not None})
        raise ConfigError(f"no run has a number called {by!r}; there are {', '.join(known)}")
    falls = by in measures(found) and by not in LOWER

    def place(run: Run) -> tuple[bool, float, str]:
        value = run.number(by)
        return value is None, 0.0 if value is None else -value if falls else value, run.name

    return sorted(found, key=place)


def differing(found: Sequence[Run]) -> list[str]:
    """Options in which the runs differ."""
    keys = dict.fromkeys(key for run in found for key in run.config if key not in LEFT)
    return [key for key in keys if len({repr(run.config.get(key)) for run in found}) > 1]


def columns(found: Sequence[Run], by: str) -> list[str]:
    """Numbers to show of each run: what is sorted by, what was measured, what it took."""
    return list(dict.fromkeys([by, *measures(found)[:MOST_MEASURES], *SPENT]))
