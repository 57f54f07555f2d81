"""Processor time per adapted projection of this tree, as a ratio to that of another one.

    git worktree add ../before main
    python scripts/benchmarks/host_time.py ../before

One process for each tree runs forward and backward of a 32 x 32 nn.Linear of one role, of a packed qkv and of a 3 x 3
convolution, in float32 on one thread, so small that what is measured is Python and the calls of torch. The processes
take turns; the ratio of each round is that of two neighbouring blocks, and the table gives their median and quartiles.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

CASES = ("one role", "qkv", "conv")


def main(
    before: Annotated[Path, typer.Argument(help="root of the tree to compare with")],
    rounds: Annotated[int, typer.Option(min=1, help="blocks of each tree and case")] = 200,
    steps: Annotated[int, typer.Option(min=1, help="forwards and backwards in a block")] = 100,
) -> None:
    if not (before / "uora_vision").is_dir():
        raise typer.BadParameter(f"{before} holds no uora_vision/: give the root of another checkout")
    now, then = (_start(root, steps) for root in (Path(__file__).parents[2], before))
    print(f"{'case':10} {'before us':>10} {'now us':>10} {'ratio':>7} {'quartiles':>14}")
    for case in CASES:
        pairs = [tuple(_block(p, case) for p in order(now, then, i)) for i in range(rounds)]
        times = [pair if i % 2 == 0 else pair[::-1] for i, pair in enumerate(pairs)]
        ratios = [mine / other for mine, other in times]
        low, middle, high = statistics.quantiles(ratios, n=4)
        us = [statistics.median(t) * 1e6 / steps for t in zip(*times, strict=True)]
        print(f"{case:10} {us[1]:10.1f} {us[0]:10.1f} {middle:7.3f} {low:6.3f}-{high:.3f}")
    for process in (now, then):
        process.communicate()


def order(now: subprocess.Popen[str], before: subprocess.Popen[str], i: int) -> Iterator[subprocess.Popen[str]]:
    """Each goes first in every other round."""
    yield from (now, before) if i % 2 == 0 else (before, now)


def _start(root: Path, steps: int) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(root.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "worker", str(steps)]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _block(process: subprocess.Popen[str], case: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{case}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def worker(steps: int) -> None:
    """Answers each case read with the processor seconds of a block."""
    runs = _runs()
    for line in sys.stdin:
        run = runs[line.strip()]
        run(3)
        start = time.process_time()
        run(steps)
        print(time.process_time() - start, flush=True)


def _runs() -> dict[str, Callable[[int], None]]:
    import torch
    from torch import nn

    import uora_vision as uora

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    uora.register_rule(Attention, {"qkv": uora.Packed("qkv"), "proj": "proj"})
    attention = uora.inject(nn.ModuleDict({"attn": Attention()}), uora.UoraConfig(rank=8))
    kernels = uora.inject(
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), uora.UoraConfig(rank=8, targets="conv")
    )
    layers = {"one role": attention["attn"].proj, "qkv": attention["attn"].qkv, "conv": kernels[1]}
    assert {len(layers[c].uora.roles) for c in ("one role", "conv")} == {1} and len(layers["qkv"].uora.roles) == 3

    def steps_of(layer: nn.Module, x: torch.Tensor) -> Callable[[int], None]:
        g = torch.ones_like(layer(x))

        def run(steps: int) -> None:
            for _ in range(steps):
                layer(x).backward(g)

        return run

    linear, image = (torch.randn(*shape, requires_grad=True) for shape in ((1, 8, 32), (1, 4, 6, 6)))
    return {name: steps_of(layer, image if name == "conv" else linear) for name, layer in layers.items()}


if __name__ == "__main__":
    worker(int(sys.argv[2])) if sys.argv[1:2] == ["worker"] else typer.run(main)
