"""What injecting a model costs, in time by its size and in memory, and what a step of reinitialisation costs.

    python scripts/benchmarks/inject.py
    python scripts/benchmarks/inject.py --rank 64 --dtype fp32 --output runs/inject

- inject: models without values (on the `meta` device), so that it is the walk, the plan and the surgery that are timed;
  the median of some rounds, each over a new model.
- memory: a Llama of 1.1B parameters with values, in a process of its own: the resident set before, the largest while
  `inject` runs, and by how much of the model's bytes that is more. A, B and their copies on the CPU are in it.
- reinitialisation: `Reinitializer.step()` of a ViT without a firing, with one and with 16 directions that fire in the
  same step, layer after layer, beside a training step (see `step.py`).

Times are processor time on one thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from measure.choices import LLAMAS, VITS


def main(
    models: Annotated[str, typer.Option(help="names, separated by commas")] = ",".join((*LLAMAS, *VITS)),
    rank: Annotated[int, typer.Option(min=1)] = 256,
    resident_model: Annotated[str, typer.Option(help="whose memory is measured; empty for none")] = "Llama 1.1B",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="in which it is stored")] = "bf16",
    vit: Annotated[str, typer.Option(help="of timm, for reinitialisation")] = "vit_base_patch16_224",
    batch: Annotated[int, typer.Option(min=1, help="images of its training step")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="how often each time is taken")] = 3,
    output: Annotated[Path | None, typer.Option(help="folder; by default a new one in runs/")] = None,
) -> None:
    if unknown := [name for name in models.split(",") if name not in (*LLAMAS, *VITS)]:
        raise typer.BadParameter(f"no model {unknown[0]!r}; there are {', '.join((*LLAMAS, *VITS))}")

    from measure.inject import run
    from measure.step import new_folder

    run(models.split(","), rank, resident_model, dtype, vit, batch, rounds, output or new_folder("benchmark_inject"))


if __name__ == "__main__":
    typer.run(main)
