"""What a training step costs on a Llama-shaped language model: `step.py` with tokens in place of images.

    python scripts/benchmarks/llm.py --threads 1
    python scripts/benchmarks/llm.py --device cuda --dtype bf16 --batch 4 --hidden 2048 --intermediate 5632 \
        --layers 22 --heads 32 --kv-heads 4 --rounds 20

The second is a model of 1.1B parameters. Weights are random. Adapters sit on q, k, v, o, gate, up and down of every
layer. The frozen floor and every method train the last norm besides, so that there is something to train; the embedding
and the output layer are frozen. What is measured, and how, is said at the head of `step.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from measure.choices import Dtype, parse_methods


def main(
    batch: Annotated[int, typer.Option(min=1, help="sequences per step")] = 1,
    sequence: Annotated[int, typer.Option(min=2, help="tokens per sequence")] = 512,
    hidden: Annotated[int, typer.Option(min=1, help="width of the model")] = 768,
    intermediate: Annotated[int, typer.Option(min=1, help="width of the MLP")] = 2048,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    heads: Annotated[int, typer.Option(min=1, help="of attention")] = 12,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="for keys and values; by default as many")] = None,
    vocabulary: Annotated[int, typer.Option(min=2, help="number of tokens")] = 32_000,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default the GPU if there is one")] = "",
    dtype: Annotated[Dtype, typer.Option(help="bf16 also stores the weights so")] = Dtype.fp32,
    threads: Annotated[int | None, typer.Option(min=1, help="on the CPU; by default torch's choice")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often every method is timed")] = 3,
    minutes: Annotated[float, typer.Option(min=0, help="no further round if it would end later")] = 15.0,
    methods: Annotated[str, typer.Option(help="names, separated by commas")] = "floor,uora-256,vera-256,lora-16",
    compile: Annotated[bool, typer.Option("--compile", help="with torch.compile")] = False,
    output: Annotated[Path | None, typer.Option(help="folder; by default a new one in runs/")] = None,
) -> None:
    chosen = parse_methods(methods)

    import torch
    from measure.llm import LlamaSettings
    from measure.step import default_device, new_folder, run

    settings = LlamaSettings(
        "llama", batch, device or default_device(), dtype, None, threads, compile, sequence, hidden, intermediate,
        layers, heads, kv_heads or heads, vocabulary,
    )  # fmt: skip
    with torch.device("meta"):
        size = sum(p.numel() for p in settings.make().parameters())
    parts = [f"Llama shape of {size / 1e6:,.0f}M", f"batch {batch} x {sequence}"]
    run(settings, chosen, rounds, minutes, parts, output or new_folder("benchmark_llm"))


if __name__ == "__main__":
    typer.run(main)
