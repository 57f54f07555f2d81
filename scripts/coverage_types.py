"""Counts for how many model types of transformers, torchvision and diffusers (where it is installed) a plan is
complete, at their default widths on the meta device.

    python scripts/coverage_types.py                       # all, in a few minutes; run again to go on
    python scripts/coverage_types.py --only "qwen*"        # some
    python scripts/coverage_types.py --page docs/coverage_types.md
    python scripts/coverage_types.py --aside types.csv     # and apart, those that a CSV with a column `type` lacks

A type counts as complete if every weight of two or more dimensions is adapted or left for a reason of the closed list
in `proof/complete.py`, which looks at modules, shapes and places and not at the rules.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer


def main(
    only: Annotated[str, typer.Option(help="pattern over the type")] = "*",
    rows: Annotated[Path, typer.Option(help="file of finished rows, by which an interrupted run goes on")] = Path(
        "coverage_types.jsonl"
    ),
    fresh: Annotated[bool, typer.Option(help="begin again instead of going on")] = False,
    aside: Annotated[Path | None, typer.Option(help="CSV of types; those that it lacks are counted apart")] = None,
    page: Annotated[
        Path | None, typer.Option(help="where to write a row per type, such as docs/coverage_types.md")
    ] = None,
) -> None:
    from proof.types import names

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    if fresh:
        rows.unlink(missing_ok=True)
    done = {
        row["type"]: row for line in (rows.read_text().splitlines() if rows.exists() else ()) if (row := _row(line))
    }
    with rows.open("a") as file:
        for name in names():
            if fnmatch(name, only) and name not in done:
                done[name] = measure(name)
                file.write(json.dumps(done[name]) + "\n")
                file.flush()
    chosen = [row for name, row in done.items() if fnmatch(name, only)]
    for row in chosen:
        if row.get("missed") or row["state"] == "refused":
            print(f"{row['type']}: {row['state']}: {row.get('error') or ', '.join(row['missed'][:8])}")
    print(f"all: {counted(chosen)}")
    if page is not None:
        page.write_text(written(chosen))
    if aside is not None:
        with aside.open() as known:
            listed = {row["type"] for row in csv.DictReader(known)}
        print(f"listed: {counted([row for row in chosen if row['type'] in listed])}")
        print(f"not listed: {counted([row for row in chosen if row['type'] not in listed])}")


def measure(name: str) -> dict[str, Any]:
    """The row of a type: `complete`, `incomplete`, `convolutional`, `refused` or `not built`."""
    from proof.complete import judge
    from proof.types import build

    import uora_vision as uora

    try:
        model = build(name)
    except Exception as error:  # what cannot be built is a row, too
        return {"type": name, "state": "not built", "error": f"{type(error).__name__}: {str(error)[:200]}"}
    row: dict[str, Any] = {"type": name, "class": type(model).__name__}
    try:
        plan = uora.plan(model, rank=4, train=())
    except uora.TargetError as error:
        if "targets='conv'" not in str(error):
            return {**row, "state": "refused", "error": str(error)[:200]}
        try:
            whole = uora.plan(model, rank=4, train=(), targets="conv+other")
        except uora.StateError as asked:  # of weights that are computed, as by weight_norm
            return {**row, "state": "convolutional", "error": str(asked)[:200], "missed": []}
        left = {s.path: s.reason for s in whole.skipped} | {p.path: "on request" for p in whole.projections}
        missed = judge(model, None, left)["missed"]
        return {**row, "state": "incomplete" if missed else "convolutional", "missed": missed}
    except uora.UoraError as error:
        return {**row, "state": "refused", "error": str(error)[:200]}
    found = judge(model, plan, {s.path: s.reason for s in plan.skipped})
    left = {reason: len(paths) for reason, paths in found.items() if reason != "missed"}
    state = "incomplete" if found["missed"] else "complete"
    return {**row, "state": state, "adapted": len(plan.projections), "left": left, "missed": found["missed"]}


def _row(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:  # cut off by a kill while it was written
        return None


def counted(rows: list[dict[str, Any]]) -> str:
    """Totals in a line."""
    states = [row["state"] for row in rows]
    built = len(states) - states.count("not built")
    good = states.count("complete") + states.count("convolutional")
    return (
        f"{good} of {built} complete ({states.count('convolutional')} of them convolutional), "
        f"{states.count('incomplete')} incomplete, {states.count('refused')} refused, "
        f"{states.count('not built')} not built"
    )


def written(rows: list[dict[str, Any]]) -> str:
    """The page of all types that could be built."""
    from importlib.metadata import PackageNotFoundError, version

    used = []
    for package in ("transformers", "torchvision", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):
            used.append(f"{package} {version(package).split('+')[0]}")
    lines = [
        "# Model types of transformers, torchvision and diffusers",
        "",
        f"Written by `scripts/coverage_types.py` with {', '.join(used)}, at",
        "default widths on the meta device. *Complete*: every weight of two or more dimensions is adapted by default,",
        "or left for a reason of a closed list, as modules, shapes and names bear out; what a forward does with them",
        "is not looked at here. *Convolutional*: neither attention nor an MLP; `targets='conv'` adapts it.",
        "",
        f"{counted(rows)}.",
        "What was not built has no model class of its own, or defaults that do not work.",
        "",
        "| type | state | weights adapted | left: how many, why |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row["state"] != "not built":
            left = ", ".join(f"{n} {reason}" for reason, n in row.get("left", {}).items())
            missed = ", ".join(f"`{path}`" for path in row.get("missed", ())[:2])
            state = f"{row['state']}: {missed}" if missed else row["state"]
            lines.append(f"| {row['type']} | {state} | {row.get('adapted', 0)} | {left} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
