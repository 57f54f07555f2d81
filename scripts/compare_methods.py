"""Every method on one task: learning rates tuned on a validation split, then several seeds on the test set.

    python scripts/compare_methods.py --output runs/digits --seeds 3 --rank 64 -- \
        --model local-dir:recipes/weights/vit_cifar60 --data digits --epochs 5 --batch 32

What stands behind `--` goes to recipes/vit_cifar100.py unchanged, in every run. Finished runs are kept, so the command
can be interrupted and given again. It ends with a table in markdown, in the output folder and on the screen.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
FACTORS = (1 / 3, 1.0, 3.0)
"""The grid: every method's learning rate is tuned around its default by these factors."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: of the row.
        options: of the recipe that make it.
        tuned: the method whose learning rate it uses; rows that differ in their reinitialisation alone share one.
        default: learning rate in the middle of the grid; of the head for `linear`, which has no other.
    """

    name: str
    options: tuple[str, ...]
    tuned: str
    default: float


UORA = ("--method", "uora")
ROWS = (
    Row("linear head", ("--method", "linear"), "linear", 4e-3),
    Row("BitFit", ("--method", "bitfit"), "bitfit", 2e-3),
    Row("LoRA r8 (PEFT)", ("--method", "lora", "--rank", "8"), "lora", 2e-3),
    Row("VeRA", ("--method", "vera"), "vera", 0.1),
    Row("UORA, never redrawn", (*UORA, "--reinit", "never"), "uora", 0.1),
    Row("UORA, tau 1e-5, shared", (*UORA, "--reinit", "shared", "--threshold", "1e-5"), "uora", 0.1),
    Row("UORA, 0.1 median, layer", (*UORA, "--reinit", "layer", "--threshold", "0.1", "--relative"), "uora", 0.1),
    Row("full fine-tuning", ("--method", "full"), "full", 3e-4),
)


def rates(row: Row, factor: float) -> list[str]:
    return ["--head-lr" if row.tuned == "linear" else "--lr", f"{row.default * factor:.3g}"]


def one_run(job: tuple[list[str], Path, int]) -> None:
    """Run the recipe in this process, unless its result is already there."""
    arguments, folder, threads = job
    if (folder / "metrics.json").exists():
        return
    import torch

    torch.set_num_threads(threads)
    sys.path.insert(0, str(RECIPES))
    import vit_cifar100
    from common.command import cli

    shutil.rmtree(folder, ignore_errors=True)
    vit_cifar100.run(cli.read(vit_cifar100.Options, [*arguments, "--output", str(folder), "--quiet"]))


def run_all(jobs: list[tuple[list[str], Path, int]], workers: int, what: str) -> None:
    started = time.time()
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done, _ in enumerate(pool.imap_unordered(one_run, jobs), 1):
            print(f"{what}: {done} of {len(jobs)} runs, {time.time() - started:.0f} s", flush=True)


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def main(
    recipe: Annotated[list[str], typer.Argument(help="options of recipes/vit_cifar100.py, behind --")],
    output: Annotated[Path, typer.Option(help="folder for all runs and the table")],
    seeds: int = 3,
    validation: Annotated[float, typer.Option(help="share of the training set that tuning is measured on")] = 0.2,
    workers: Annotated[int, typer.Option(help="runs side by side")] = 2,
    threads: Annotated[int, typer.Option(help="threads of each run")] = 1,
    rank: Annotated[int, typer.Option(help="of UORA and VeRA")] = 256,
    only: Annotated[str | None, typer.Option(help="rows whose names hold this")] = None,
) -> None:
    rows = [row for row in ROWS if only is None or only in row.name]
    recipe = [*recipe, "--rank", str(rank)]
    tuned = {row.tuned: row for row in reversed(rows)}
    tuning = {(name, f): output / "tuning" / f"{name}-{f:.2g}" for name in tuned for f in FACTORS}
    run_all(
        [
            ([*recipe, *tuned[n].options, *rates(tuned[n], f), "--validation", str(validation)], folder, threads)
            for (n, f), folder in tuning.items()
        ],
        workers,
        "tuning",
    )
    best = {name: max(FACTORS, key=lambda f: metrics(tuning[name, f])["accuracy"]) for name in tuned}
    final = {(row, s): output / "final" / f"{ROWS.index(row)}-seed{s}" for row in rows for s in range(seeds)}
    run_all(
        [
            ([*recipe, *row.options, *rates(row, best[row.tuned]), "--seed", str(seed)], folder, threads)
            for (row, seed), folder in final.items()
        ],
        workers,
        "final",
    )
    lines = [
        "| method | accuracy, mean | spread (min to max) | trained without head | adapter bytes | seconds per step "
        "| firings | learning rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        got = [metrics(final[row, s]) for s in range(seeds)]
        accuracy = [100 * m["accuracy"] for m in got]
        firings = ", ".join(str(m["firings"]) for m in got) if "UORA" in row.name else "-"
        lines.append(
            f"| {row.name} | {statistics.mean(accuracy):.2f} | {min(accuracy):.2f} to {max(accuracy):.2f} "
            f"| {got[0]['trained_parameters_without_head']:,} | {got[0]['adapter_bytes'] or 0:,} "
            f"| {statistics.median(m['seconds_per_step'] for m in got):.3f} | {firings} "
            f"| {row.default * best[row.tuned]:.2g} |"
        )
    (output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
