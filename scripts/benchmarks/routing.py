"""What a mixed batch costs: every sample with its own adapter, of as many as are registered.

    python scripts/benchmarks/routing.py --threads 1
    python scripts/benchmarks/routing.py --device cuda --dtype bf16 --registered 1,10,100,1000,10000

Of a timm model without training: the base; one UORA adapter for the whole batch, in the form that the library chooses
and in the factored form; batches in which all samples have different adapters, by how many are registered; and PEFT's
LoRA with `adapter_names`. Forwards are interleaved, in rounds; times are processor time on a CPU and events on a GPU.
Registering is timed too, and memory per adapter is the growth of the process beside the bytes of an adapter's vectors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from measure.choices import numbers


def main(
    model: Annotated[str, typer.Option(help="of timm")] = "vit_base_patch16_224",
    batch: Annotated[int, typer.Option(min=2, help="images, each with its own adapter")] = 16,
    rank: Annotated[int, typer.Option(min=1, help="of UORA")] = 256,
    lora_rank: Annotated[int, typer.Option(min=1, help="of LoRA")] = 16,
    registered: Annotated[str, typer.Option(help="numbers of adapters, ascending")] = "1,10,100,1000,10000",
    device: Annotated[str, typer.Option(help="cpu or cuda; by default the GPU if there is one")] = "",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="of weights and images")] = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, help="on the CPU")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[Path | None, typer.Option(help="folder; by default a new one in runs/")] = None,
) -> None:
    counts = numbers(registered)

    from measure.routing import run
    from measure.step import new_folder

    folder = output or new_folder("benchmark_routing")
    run(model, batch, rank, lora_rank, counts, device, dtype, threads, rounds, folder)


if __name__ == "__main__":
    typer.run(main)
