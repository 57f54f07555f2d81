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
    structure_only: Annotated[bool, typer.Option(help="inject at full size on meta, run nothing: minutes")] = False,
) -> None:
    from proof.zoo import entries

    if fresh:
        rows.unlink(missing_ok=True)
    done = _finished(rows)
    wanted = entries(only)
    if not wanted:
        raise typer.BadParameter(f"no model matches {only!r}; patterns are such as 'timm/vit_*'", param_hint="--only")
    enough = {name for name, row in done.items() if structure_only or "dead" in row or row["failures"]}
    todo = [entry for entry in wanted if f"{entry.library}/{entry.name}" not in enough]
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
                    running[pool.submit(_prove, entry, known, structure_only)] = f"{entry.library}/{entry.name}"
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
        "*Injected*: at full size on the meta device, where the number of trained parameters is compared with the",
        "formula from the shapes. *Proven*: with random weights on the CPU, as small as its options allow and with",
        "long runs of equal blocks cut short (`real_parameters` in the JSON; `same_as` names the model of equal",
        "shapes by which it was proven). A trace confirms the plan; with b = 0 the outputs are the base's; with",
        "random b they change, and every b and d of every projection gets a gradient; outputs with and without",
        "gradients agree; merged and unmerged outputs agree in eval mode, in training mode and under bfloat16",
        "autocast; and keys and classes are the base's after merging. Models without attention and MLP",
        "(convolutional networks) must say so, and pass the same checks, but for autocast, with `targets='conv'`.",
        "",
        "| library | models | with projections | injected | proven | convolutional | injected | proven | dead |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for library in LIBRARIES:
        mine = [row for row in rows if row["library"] == library]
        with_, without = ([r for r in mine if bool(r.get("projections")) is flag] for flag in (True, False))
        lines.append(
            f"| {library} | {len(mine)} | {len(with_)} | {_injected(with_)} | {_proven(with_)} | {len(without)} | "
            f"{_injected(without)} | {_proven(without)} | {sum(r.get('dead', 0) for r in mine)} |"
        )
    worst = {key: max(row.get(key, 0) for row in rows) for key in ("inject_s", "merged_eval", "merged_autocast")}
    lines += [
        "",
        f"{sum(row['weights'] for row in covered):,} weights in models with projections,",
        f"{sum(row['read'] for row in covered):,} of them read by the model rather than called. Longest injection at",
        f"full size: {worst['inject_s']:.2f} s. Largest difference of merged from unmerged outputs, relative to their",
        f"norm: {worst['merged_eval']:.1g} in float32, {worst['merged_autocast']:.1g} under autocast.",
        "",
        "| library | family | models | injected | proven | weights per model | of them read | roles |",
        "|---|---|---|---|---|---|---|---|",
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
    counts = f"{len(rows)} | {_injected(rows)} | {_proven(rows)}"
    return f"| {library} | {family} | {counts} | {span} | {reads} | {shown} |"


def _injected(rows: list[dict[str, Any]]) -> int:
    return sum("weights" in row and not row["failures"] for row in rows)


def _proven(rows: list[dict[str, Any]]) -> int:
    return sum("dead" in row and not row["failures"] for row in rows)


def _print_totals(rows: list[dict[str, Any]]) -> None:
    kinds: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        what = "with projections" if row.get("projections") else "pure convolutional"
        kinds[row["library"], what, "FAILED" if row["failures"] else "proven" if "dead" in row else "injected"] += 1
    for (library, what, result), n in sorted(kinds.items()):
        print(f"{library}: {n} {what} {result}")


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


def _prove(entry: Any, known: Any, structure_only: bool) -> dict[str, Any]:
    import warnings

    from proof.prove import prove

    warnings.filterwarnings("ignore")
    return prove(entry, known, structure_only)


if __name__ == "__main__":
    typer.run(main)
