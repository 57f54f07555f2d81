"""`uora runs`: what the runs of the recipes in a folder have measured, side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, DataError, printable
from ..tables import render, shortened

if TYPE_CHECKING:
    from .run_data import Run

NAMES = {"trained_parameters_without_head": "trained", "seconds": "time"}
"""Columns of the terminal whose names would be long."""


def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are, at any depth.")] = Path("runs"),
    sort: Annotated[str | None, typer.Option(help="The best of this first: accuracy, loss, seconds, lr, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of text.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the table, and all curves in one.")] = None,
) -> None:
    """Compare the runs of recipes in a folder. A table, or a page:
    `uora runs runs/ --sort accuracy --html runs.html`."""
    from .run_data import METRICS, find_runs, main_measure, ranked

    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; give the one that holds the runs")
    found, odd, unfinished = find_runs(folder)
    for line in odd:
        print(f"note: {printable(line)}", file=sys.stderr)
    if not found:
        going = f" {len(unfinished)} are not finished, such as {unfinished[0]}." if unfinished else ""
        raise DataError(f"{folder} has no finished run: none of its folders has a {METRICS}.{going}")
    by = sort or main_measure(found)
    ordered = ranked(found, by)
    if html is not None:
        from .runs_page import write_runs  # it draws

        write_runs(ordered, by, html, str(folder), unfinished)
        print(f"wrote {html}", file=sys.stderr)
    if as_json:
        whole = [{"run": run.name, **run.metrics, "config": run.config, "history": run.history} for run in ordered]
        print(json.dumps(whole, indent=1))
        return
    print(printable(table(ordered, by), sys.maxsize))
    if unfinished:
        print(f"{len(unfinished)} not finished: {printable(shortened(unfinished))}")


def table(found: Sequence[Run], by: str) -> str:
    """As text."""
    from .page import show
    from .run_data import columns

    shown, rows = columns(found, by), []
    for run in found:
        numbers = [show(key, run.metrics.get(key, run.config.get(key))) for key in shown]
        rows.append([run.name, str(run.config.get("method", "")), *numbers])
    title = f"{len(found):,} run{'s' * (len(found) != 1)}, by {by}"
    return render(title, ["run", "method", *(NAMES.get(key, key) for key in shown)], rows)
