"""What a training step costs: time, saved activations, peak memory and parameters of UORA beside other methods.

    python scripts/benchmarks/step.py
    python scripts/benchmarks/step.py --model vit_small_patch16_224 --methods uora-64,uora-256/4,vera-256 --threads 1
    python scripts/benchmarks/step.py --batch 64 --device cuda --dtype bf16 --rounds 20

Adapters sit on the attention and MLP projections (qkv, proj, fc1, fc2) and train the head besides. Everything is
measured against the frozen floor: the same model with the same loss, in which the head trains, every other weight is
frozen, and the gradient reaches the input of every projection. This is the least that an adapter on all of them can
cost. So that all rows rest on the same floor, the adapters compute the input gradient of the first projection too,
which a run without anything to train before it would leave out (1% of a ViT-B/16).

- forward: one evaluation of a batch, without gradients.
- step: forward, cross-entropy, backward and AdamW on one batch; with UORA also its reinitialisation.
- saved: bytes that the forward keeps for the backward, each storage once, without parameters and buffers. Copies of
  weights that autocast makes and keeps are counted, since they take memory.
- peak memory: of a process that runs this one method: the largest resident set on a CPU, with Python and its libraries
  in it (some 0.9 GB), or the most that torch allocated on a GPU.

Every method runs once per round, in an order that moves on by one each round, and is compared with the floor of the
same round. The table gives the median of these ratios and, in brackets, the smallest and the largest. Time is that of
CUDA events on a GPU, the time on the clock on a CPU, and with --threads 1 the processor time, which other jobs on the
machine disturb less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from measure.choices import DEFAULT_METHODS, Dtype, parse_methods


def main(
    model: Annotated[str, typer.Option(help="a timm vision transformer")] = "vit_base_patch16_224",
    batch: Annotated[int, typer.Option(min=1, help="images per step")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default the GPU if there is one")] = "",
    dtype: Annotated[Dtype, typer.Option(help="bf16 also stores the weights so")] = Dtype.fp32,
    threads: Annotated[int | None, typer.Option(min=1, help="on the CPU; by default torch's choice")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often every method is timed")] = 5,
    minutes: Annotated[float, typer.Option(min=0, help="no further round if it would end later")] = 9.0,
    methods: Annotated[str, typer.Option(help="names, separated by commas; any rank will do")] = DEFAULT_METHODS,
    img_size: Annotated[int | None, typer.Option(min=1, help="pixels; by default the model's own")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="with torch.compile")] = False,
    output: Annotated[Path | None, typer.Option(help="folder; by default a new one in runs/")] = None,
) -> None:
    chosen = parse_methods(methods)

    import timm
    from measure.step import default_device, new_folder, run
    from measure.subject import Settings

    import uora_vision as uora

    if ":" not in model and not timm.is_model(model):
        raise typer.BadParameter(f"timm has no model {model!r}; timm.list_models() gives all names")
    settings = Settings(model, batch, device or default_device(), dtype, img_size, threads, compile)
    parts = [model + (f" at {img_size}" if img_size else ""), f"batch {batch}"]
    try:
        run(settings, chosen, rounds, minutes, parts, output or new_folder("benchmark_step"))
    except uora.UoraError as error:
        raise typer.BadParameter(f"{model}: {error}") from error


if __name__ == "__main__":
    typer.run(main)
