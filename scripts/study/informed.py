"""Rows of A from the gradient of the frozen weights: what they give beside random ones, at equal and at smaller rank.

    python scripts/study/informed.py        # tunes, then measures; goes on where it was interrupted

Rows per projection are put into the adapters by hand here; docs/method.md has the formula, docs/results.md
the protocol.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bed import ROOT, Results, cifar60_tail, fit, score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import uora_vision as uora


def gradient_sketches(model: nn.Module, x: Tensor, y: Tensor, size: int, batch: int = 64) -> dict[str, Tensor]:
    """S G of every adapted weight, (size, in) float64, G the gradient of the mean loss over x; S is Gaussian."""
    found = uora.adapters(model)
    generator = torch.Generator().manual_seed(0)
    s, sums, handles, inputs = {}, {}, [], {}
    for path, adapter in found.items():
        module = model.get_submodule(path)
        rows = sum(role.rows for role in adapter.roles)
        s[path] = torch.randn(rows, size, generator=generator)
        sums[path] = torch.zeros(size, adapter.width, dtype=torch.float64)

        def forward(module: nn.Module, args: Any, out: Tensor, path: str = path) -> None:
            inputs[path] = args[0].detach().flatten(0, -2)
            out.register_hook(lambda g: backward(path, g))

        def backward(path: str, g: Tensor) -> None:
            sums[path] += (s[path].t() @ g.flatten(0, -2).t() @ inputs.pop(path)).double()

        handles.append(module.register_forward_hook(forward))
    model.eval()
    for xs, ys in zip(x.split(batch), y.split(batch), strict=True):
        cross_entropy(model(xs), ys, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {path: t / len(y) for path, t in sums.items()}


def give_rows(model: nn.Module, rows: dict[str, Tensor]) -> None:
    """Every adapter its own A, (r, in), in place of the bank's."""
    for path, adapter in uora.adapters(model).items():
        a, shared = rows[path].float(), adapter.matrices()[1]
        adapter.matrices = lambda a=a, shared=shared: ([a], shared)  # type: ignore[method-assign]


def leading(sketch: Tensor, rank: int) -> Tensor:
    """Its leading right singular vectors, (rank, in)."""
    return torch.linalg.svd(sketch, full_matrices=False).Vh[:rank]


def informed(model: nn.Module, data: tuple[Tensor, Tensor], lr: float, rank: int, seed: int) -> list[dict[str, Any]]:
    """Rows of A from the first 256 images, before training."""
    uora.inject(model, rank=rank, seed=seed)
    sketches = gradient_sketches(model, data[0][:256], data[1][:256], rank + 8)
    give_rows(model, {path: leading(t, rank) for path, t in sketches.items()})
    return uora.param_groups(model, lr=lr)


def drawn(model: nn.Module, data: Any, lr: float, rank: int, seed: int, **options: Any) -> list[dict[str, Any]]:
    uora.inject(model, rank=rank, seed=seed, **options)
    return uora.param_groups(model, lr=lr)


def vera(model: nn.Module, data: Any, lr: float, rank: int, seed: int) -> list[dict[str, Any]]:
    return drawn(model, data, lr, rank, seed, init="kaiming", layout="slice")


def lora(model: nn.Module, data: Any, lr: float, rank: int, seed: int) -> list[dict[str, Any]]:
    import peft  # takes seconds

    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv", "proj", "fc1", "fc2"])
    for p in model.parameters():
        p.requires_grad_(False)
    peft.inject_adapter_in_model(config, model)
    model.head.requires_grad_(True)
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    return [{"params": adapter, "lr": lr}, {"params": list(model.head.parameters()), "lr": 4e-3}]


def whole(model: nn.Module, data: Any, lr: float, rank: int, seed: int) -> list[dict[str, Any]]:
    rest = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    return [{"params": rest, "lr": lr}, {"params": list(model.head.parameters()), "lr": 4e-3}]


def head(model: nn.Module, data: Any, lr: float, rank: int, seed: int) -> list[dict[str, Any]]:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return [{"params": list(model.head.parameters()), "lr": lr}]


METHODS: dict[str, tuple[Callable[..., list[dict[str, Any]]], int, float]] = {
    "informed r16": (informed, 16, 0.1),
    "random r64": (drawn, 64, 0.1),
    "VeRA r64": (vera, 64, 0.1),
    "random r16": (drawn, 16, 0.1),
    "informed r64": (informed, 64, 0.1),
    "paper's UORA r64": (drawn, 64, 0.1),
    "LoRA r8": (lora, 8, 0.004),
    "head": (head, 0, 0.032),
    "full": (whole, 0, 0.001),
}
"""How each adapts the model, its rank, and the middle of its grid of rates."""
TUNED_AS = {"paper's UORA r64": "random r64"}
PAIRS = (
    ("informed r16", "random r64"), ("informed r64", "random r64"), ("VeRA r64", "random r64"),
    ("informed r64", "LoRA r8"), ("informed r64", "VeRA r64"), ("informed r16", "random r16"),
)  # fmt: skip
"""What is compared; the first is the primary comparison."""
SEEDS, EPOCHS = 3, 5


def one(method: str, lr: float, seed: int, split: str) -> dict[str, Any]:
    """A run measured on the images held out for tuning, or, trained on all training images, on the test images."""
    bed, (adapt, rank, _) = cifar60_tail(), METHODS[method]
    train, held = (bed.train, bed.tune) if split == "tune" else (bed.all_train, bed.test)
    torch.manual_seed(seed)
    model, started = bed.make(), time.process_time()
    torch.manual_seed(1000 + seed)
    groups = adapt(model, train, lr, rank, seed)
    trained = sum(p.numel() for group in groups for p in group["params"]) - 1930
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    reinit = uora.Reinitializer(model) if method.startswith("paper") else None
    for _ in fit(model, optimizer, *train, epochs=EPOCHS, seed=seed):
        if reinit is not None:
            reinit.step()
    more = {} if reinit is None else {"firings": reinit.firings}
    return {**score(model, held), **more, "trained": trained, "seconds": round(time.process_time() - started, 1)}


def tuned(results: Results, method: str) -> float:
    """The rate of the lowest loss on a grid of factors of 2, widened until it is inside."""
    grid = [METHODS[method][2] * f for f in (0.5, 1.0, 2.0)]
    while True:
        losses = [results.get(one, method=method, lr=lr, seed=0, split="tune")["loss"] for lr in grid]
        best = int(np.argmin(losses))
        if 0 < best < len(grid) - 1:
            return grid[best]
        grid = [grid[0] / 2, *grid] if best == 0 else [*grid, grid[-1] * 2]


def interval(one: np.ndarray, two: np.ndarray) -> tuple[float, float, float]:
    """Difference of two (seeds, images) of 0 and 1 in points, and its 95 % interval by a bootstrap over both."""
    draws, rng = [], np.random.default_rng(0)
    for _ in range(4000):
        seeds, images = rng.integers(len(one), size=len(one)), rng.integers(one.shape[1], size=one.shape[1])
        draws.append(100 * (one[seeds][:, images] - two[seeds][:, images]).mean())
    return 100 * float((one - two).mean()), *map(float, np.percentile(draws, [2.5, 97.5]))


def main() -> None:
    torch.set_num_threads(1)
    results, right, lines = Results(ROOT / "docs/results/informed.json"), {}, []
    for method in sys.argv[1:] or METHODS:
        lr = tuned(results, TUNED_AS.get(method, method))
        runs = [results.get(one, method=method, lr=lr, seed=seed, split="test") for seed in range(SEEDS)]
        right[method] = np.array([[int(c) for c in run["right"]] for run in runs])
        got = [run["accuracy"] for run in runs]
        loss = sum(run["loss"] for run in runs) / len(runs)
        fired = ", ".join(str(run["firings"]) for run in runs if "firings" in run) or "-"
        lines.append(
            f"| {method} | {lr:.3g} | {np.mean(got):.2f} ({min(got):.2f} to {max(got):.2f}) | {loss:.3f} "
            f"| {runs[0]['trained']:,} | {fired} |"
        )
    print(
        "\n".join(
            ["| | rate | accuracy | loss | trained without head | firings |", "|---|---|---|---|---|---|", *lines]
        )
    )
    for a, b in PAIRS:
        if a in right and b in right:
            print(f"{a} - {b}: {json.dumps([round(v, 2) for v in interval(right[a], right[b])])}")


if __name__ == "__main__":
    main()
