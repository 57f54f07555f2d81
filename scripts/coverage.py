"""Proves for every model of timm, open_clip and the families of transformers that the injector covers it.

    python scripts/coverage.py                      # all, about an hour on two cores; run again to go on
    python scripts/coverage.py --only "timm/levit*"  # some, without writing the table

Writes `docs/coverage.json`, a row per model, and `docs/coverage.md`, a row per family and the totals.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

DOCS = Path(__file__).parents[1] / "docs"
LIBRARIES = ("timm", "open_clip", "transformers")


def main(
    only: Annotated[str, typer.Option(help="pattern over library/name; the table is written for all only")] = "*",
    rows: Annotated[Path, typer.Option(help="file of finished rows, by which an interrupted run goes on")] = Path(
        "coverage.jsonl"
    ),
    workers: Annotated[int, typer.Option(min=1, help="processes")] = os.cpu_count() or 1,
    fresh: Annotated[bool, typer.Option(help="begin again instead of going on")] = False,
) -> None:
    from zoo import entries

    if fresh:
        rows.unlink(missing_ok=True)
    done = _finished(rows)
    wanted = entries(only)
    if not wanted:
        raise typer.BadParameter(f"no model matches {only!r}; patterns are such as 'timm/vit_*'", param_hint="--only")
    todo = [entry for entry in wanted if f"{entry.library}/{entry.name}" not in done]
    print(f"{len(wanted)} models, {len(wanted) - len(todo)} of them in {rows}")
    failed = sum(bool(row["failures"]) for row in done.values())
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    context = get_context("spawn")
    with (
        rows.open("a") as file,
        Progress(TextColumn("{task.description}"), *columns, disable=not sys.stderr.isatty()) as progress,
        context.Manager() as manager,
        ProcessPoolExecutor(workers, context, _one_thread) as pool,
    ):
        known = manager.dict()
        bar = progress.add_task("", total=len(todo))
        queue, running = iter(todo), {}
        try:
            while True:
                # Only what runs is handed over, so that an interrupt has nothing to wait for but that.
                while len(running) < workers and (entry := next(queue, None)) is not None:
                    running[pool.submit(_prove, entry, known)] = f"{entry.library}/{entry.name}"
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name = running.pop(future)
                    row = future.result()
                    done[name] = row
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    failed += bool(row["failures"])
                    for failure in row["failures"]:
                        progress.console.print(f"{name}: {failure}", markup=False, highlight=False)
                    progress.update(bar, advance=1, description=f"{failed} failed, last {name}")
        except KeyboardInterrupt:
            print(f"stopped; run again to go on from {rows}")
            raise typer.Exit(130) from None
    finished = [done[f"{e.library}/{e.name}"] for e in wanted]
    _print_totals(finished)
    if only == "*":
        (DOCS / "coverage.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in finished) + "\n]\n")
        (DOCS / "coverage.md").write_text(page(finished))
        print(f"wrote {DOCS / 'coverage.md'} and coverage.json")
    if any(row["failures"] for row in finished):
        raise typer.Exit(1)


def page(rows: list[dict[str, Any]]) -> str:
    """docs/coverage.md of all rows."""
    import open_clip
    import timm
    import torch
    import transformers

    covered = [row for row in rows if row.get("projections")]
    versions = ", ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in (torch, timm, open_clip, transformers))
    lines = [
        "# Coverage",
        "",
        f"Written by `scripts/coverage.py` with {versions}; one row per model in [coverage.json](coverage.json).",
        "",
        "Every model is injected at full size on the meta device, where the number of trained parameters is compared",
        "with the formula from the shapes, and with random weights on the CPU, as small as its options allow (`reduced`",
        "in the JSON). There it is checked that a trace confirms the plan; that with b = 0 the outputs are the base's;",
        "that with random b the outputs change and every b and d of every projection gets a gradient; that outputs with",
        "and without gradients agree; and that merged and unmerged outputs agree in eval mode, in training mode and",
        "under bfloat16 autocast, after which keys and classes are the base's. Models without attention and MLP (pure",
        "convolutional networks) must say so, and pass the same checks, but for autocast, with `targets='conv'`.",
        "",
        "| library | models | with projections | proven | pure convolutional | proven with `conv` | dead adapters |",
        "|---|---|---|---|---|---|---|",
    ]
    for library in LIBRARIES:
        mine = [row for row in rows if row["library"] == library]
        with_, without = ([r for r in mine if bool(r.get("projections")) is flag] for flag in (True, False))
        lines.append(
            f"| {library} | {len(mine)} | {len(with_)} | {_proven(with_)} | {len(without)} | {_proven(without)} | "
            f"{sum(r.get('dead', 0) for r in mine)} |"
        )
    worst = {key: max(row.get(key, 0) for row in rows) for key in ("inject_s", "merged_eval", "merged_autocast")}
    lines += [
        "",
        f"{sum(row['weights'] for row in covered):,} weights in models with projections,",
        f"{sum(row['read'] for row in covered):,} of them read by the model rather than called. Longest injection at full",
        f"size: {worst['inject_s']:.2f} s. Largest difference of merged from unmerged outputs, relative to their norm:",
        f"{worst['merged_eval']:.1g} in float32, {worst['merged_autocast']:.1g} under autocast.",
        "",
        "| library | family | models | proven | weights per model | of them read | roles |",
        "|---|---|---|---|---|---|---|",
    ]
    for library in LIBRARIES:
        families = sorted({row["family"] for row in rows if row["library"] == library})
        for family in families:
            mine = [row for row in rows if (row["library"], row["family"]) == (library, family)]
            for flag in (True, False):
                if part := [row for row in mine if bool(row.get("projections")) is flag]:
                    lines.append(_family_line(library, family, part))
    failed = [row for row in rows if row["failures"]]
    lines += ["", "## What fails", ""]
    lines += [f"- `{r['library']}/{r['name']}`: {'; '.join(r['failures'])}" for r in failed] or ["Nothing."]
    return "\n".join(lines) + "\n"


def _family_line(library: str, family: str, rows: list[dict[str, Any]]) -> str:
    roles = sorted({label for row in rows for label in row.get("roles", {})})
    shown = ", ".join(f"`{label}`" for label in roles) or "with `targets='conv'`"
    weights = [row.get("weights", 0) for row in rows]
    span = f"{min(weights)}" if len(set(weights)) == 1 else f"{min(weights)}-{max(weights)}"
    reads = max(row.get("read", 0) for row in rows)
    return f"| {library} | {family} | {len(rows)} | {_proven(rows)} | {span} | {reads} | {shown} |"


def _proven(rows: list[dict[str, Any]]) -> int:
    return sum(not row["failures"] for row in rows)


def _print_totals(rows: list[dict[str, Any]]) -> None:
    kinds = Counter((row["library"], bool(row.get("projections")), bool(row["failures"])) for row in rows)
    for (library, projections, failed), n in sorted(kinds.items()):
        what = "with projections" if projections else "pure convolutional"
        print(f"{library}: {n} {what} {'FAILED' if failed else 'proven'}")


def _finished(rows: Path) -> dict[str, dict[str, Any]]:
    done = {}
    for line in rows.read_text().splitlines() if rows.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill while it was written
            continue
        done[f"{row['library']}/{row['name']}"] = row
    return done


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _prove(entry: Any, known: Any) -> dict[str, Any]:
    import warnings

    from coverage_proof import prove

    warnings.filterwarnings("ignore")
    return prove(entry, known)


if __name__ == "__main__":
    typer.run(main)
