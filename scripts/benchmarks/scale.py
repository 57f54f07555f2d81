"""How the cost of a UORA step grows with depth, width, tokens, rank and registered adapters: predicted and measured.

    python scripts/benchmarks/scale.py
    python scripts/benchmarks/scale.py --ranks 8,32,128 --widths 128,256 --rounds 3
    python scripts/benchmarks/scale.py --device cuda --depth 12 --width 768 --batch 64 --rank 256

One of the five is varied at a time, the others stay at their middle values; the point that all variables have in common
is measured once. The subject is a vision transformer with random weights in float32, patches of 16 pixels and heads
of 64 columns (one head, where 64 does not divide the width). Steps of the frozen floor and of UORA, as in
`step.py`, alternate in rounds over all points, so that a busy moment does not fall on one point alone. The
table gives medians over the rounds and, in brackets, the smallest and the largest ratio within a round.

The prediction is a ratio of operations, those of the matrix products, without any constant fitted to a machine. With t
tokens per image, N = t batch tokens in all, and w the width:

- floor, each projection (out, in): 2 N out in forward, and as much for the gradient of its input.
- floor, attention of each block: products of 2 N t w. Two are forward (scores, values), five backward: the scores once
  more, and the gradients of the weights, the values, the queries and the keys.
- floor, patch embedding: forward alone. The head: three times its forward, since its weight trains.
- UORA, each projection: `uora_vision.cost.Shape.step` beyond that. q, k and v in one weight share one A.

What is done element by element is left out on both sides: norms, GELU and softmax in the floor; L = diag(b) B diag(d),
the sum W + L A and the sums of the vectors' gradients in UORA. Registered adapters wait as vectors outside the model,
so the prediction does not depend on their number. A switch is `activate`, once both adapters have been active before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from measure.choices import PATCH, numbers


def main(
    depth: Annotated[int, typer.Option(min=1, help="blocks, where something else is varied")] = 4,
    width: Annotated[int, typer.Option(min=1, help="of the stream")] = 384,
    batch: Annotated[int, typer.Option(min=1, help="images per step")] = 8,
    rank: Annotated[int, typer.Option(min=1)] = 128,
    depths: Annotated[str, typer.Option(help="numbers, separated by commas; so are the others")] = "2,4,8",
    widths: Annotated[str, typer.Option()] = "192,384,768",
    batches: Annotated[str, typer.Option()] = "1,2,4,8,16",
    ranks: Annotated[str, typer.Option()] = "16,64,128,256,512",
    registered: Annotated[str, typer.Option(help="numbers of adapters in the model")] = "1,10,100,1000",
    img_size: Annotated[int, typer.Option(min=PATCH, help="pixels; 224 are 197 tokens")] = 224,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="on the CPU")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="how often every point is timed")] = 5,
    output: Annotated[Path | None, typer.Option(help="folder; by default a new one in runs/")] = None,
) -> None:
    given = {"depth": depths, "width": widths, "batch": batches, "rank": ranks, "registered": registered}
    lists = {name: numbers(text) for name, text in given.items()}

    from measure.scale import Point, run
    from measure.step import new_folder

    middle, folder = Point(depth, width, batch, rank), output or new_folder("benchmark_scale")
    run(middle, lists, img_size, device, threads, rounds, folder)


if __name__ == "__main__":
    typer.run(main)
