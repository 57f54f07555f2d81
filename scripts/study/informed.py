"""Rows of A from the gradient of the frozen weights, beside random ones, VeRA, LoRA, the head alone and full training.

    python scripts/study/informed.py digits        # or signs, sst2; goes on where it was interrupted

docs/results.md has the protocol. sst2 needs the folder of MiniLM-L6 in the variable MINILM.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bed import ROOT, Bed, Results, cifar60_tail, fit, score, signs_tail, sst2_tail
from torch import Tensor, nn

import uora_vision as uora

Groups = list[dict[str, Any]]
HEAD_LR = 4e-3


def drawn(model: nn.Module, data: Any, lr: float, rank: int, seed: int, **options: Any) -> Groups:
    uora.inject(model, rank=rank, seed=seed, **options)
    return uora.param_groups(model, lr=lr, head_lr=HEAD_LR)


def informed(
    model: nn.Module, data: tuple[Tensor, Tensor], lr: float, rank: int, seed: int, share: Any = "input"
) -> Groups:
    """Rows of A from the first 256 examples, before training."""
    uora.inject(model, rank=rank, seed=seed)
    uora.inform(model, list(zip(data[0][:256].split(64), data[1][:256].split(64), strict=True)), share=share)
    return uora.param_groups(model, lr=lr, head_lr=HEAD_LR)


def by_width(model: nn.Module, data: tuple[Tensor, Tensor], lr: float, rank: int, seed: int) -> Groups:
    return informed(model, data, lr, rank, seed, share="width")


def vera(model: nn.Module, data: Any, lr: float, rank: int, seed: int) -> Groups:
    return drawn(model, data, lr, rank, seed, init="kaiming", layout="slice")


def svd(model: nn.Module, data: Any, lr: float, rank: int, seed: int) -> Groups:
    """A and B the leading singular vectors of the frozen weights."""
    return drawn(model, data, lr, rank, seed, init="svd")


def lora(model: nn.Module, data: Any, lr: float, rank: int, seed: int) -> Groups:
    import peft  # takes seconds

    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.startswith("head")]
    for p in model.parameters():
        p.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names), model)
    model.head.requires_grad_(True)
    adapter = [p for name, p in model.named_parameters() if "lora_" in name]
    return [{"params": adapter, "lr": lr}, {"params": list(model.head.parameters()), "lr": HEAD_LR}]


def whole(model: nn.Module, data: Any, lr: float, rank: int, seed: int) -> Groups:
    rest = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    return [{"params": rest, "lr": lr}, {"params": list(model.head.parameters()), "lr": HEAD_LR}]


def head(model: nn.Module, data: Any, lr: float, rank: int, seed: int) -> Groups:
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return [{"params": list(model.head.parameters()), "lr": lr}]


METHODS: dict[str, tuple[Callable[..., Groups], int, float]] = {
    "informed r64": (informed, 64, 0.1),
    "VeRA r64": (vera, 64, 0.1),
    "informed r16": (informed, 16, 0.1),
    "random r64": (drawn, 64, 0.1),
    "LoRA r8": (lora, 8, 0.004),
    "head": (head, 0, 0.032),
    "full": (whole, 0, 0.001),
    "random r256": (drawn, 256, 0.1),
    "informed r16, by width": (by_width, 16, 0.1),
    "informed r64, by width": (by_width, 64, 0.1),
    "paper's UORA r64": (drawn, 64, 0.1),
    "svd r64": (svd, 64, 0.1),
    "informed redraws r64": (informed, 64, 0.1),
}
"""How each adapts the model, its rank, and the middle of its grid of rates."""
TUNED_AS = {"paper's UORA r64": "random r64", "informed redraws r64": "informed r64"}
REDRAWS: dict[str, dict[str, Any]] = {
    "paper's UORA r64": {},
    "informed redraws r64": {
        "criterion": "saliency", "relative": True, "threshold": lambda step: 0.1 if step % 20 == 0 else 0.0,
        "scope": "layer", "source": "informed",
    },
}  # fmt: skip
"""Options of the Reinitializer of those methods that have one."""
PAIRS = (
    ("informed r64", "VeRA r64"), ("informed r64", "random r64"), ("informed r64", "LoRA r8"),
    ("informed r16", "random r64"), ("informed r16", "random r256"), ("informed r16", "VeRA r64"),
    ("informed r64, by width", "VeRA r64"), ("random r64", "VeRA r64"), ("svd r64", "VeRA r64"),
    ("svd r64", "random r64"), ("svd r64", "LoRA r8"),
)  # fmt: skip
"""What is compared; the first is the primary comparison: as many trained parameters on both sides."""
BEDS: dict[str, tuple[Callable[[], Bed], int]] = {
    "digits": (cifar60_tail, 5), "signs": (signs_tail, 5), "sst2": (sst2_tail, 3),
}  # fmt: skip
"""And for how many epochs each is trained."""
SEEDS = 5


def one(bed: str, method: str, lr: float, seed: int, split: str) -> dict[str, Any]:
    """A run measured on the examples held out for tuning, or, trained on all, on the test examples."""
    there, epochs = BEDS[bed][0](), BEDS[bed][1]
    adapt, rank, _ = METHODS[method]
    train, held = (there.train, there.tune) if split == "tune" else (there.all_train, there.test)
    torch.manual_seed(seed)
    model, started = there.make(), time.process_time()
    torch.manual_seed(1000 + seed)
    groups = adapt(model, train, lr, rank, seed)
    trained = sum(p.numel() for group in groups for p in group["params"]) - sum(
        p.numel() for p in model.head.parameters()
    )
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    options = dict(REDRAWS.get(method, {}))
    if options.get("source") == "informed":
        options["batches"] = list(zip(train[0][:256].split(64), train[1][:256].split(64), strict=True))
    reinit = uora.Reinitializer(model, **options, optimizer=optimizer) if method in REDRAWS else None
    for _ in fit(model, optimizer, *train, epochs=epochs, seed=seed):
        if reinit is not None:
            reinit.step()
    more = {} if reinit is None else {"firings": reinit.firings}
    return {**score(model, held), **more, "trained": trained, "seconds": round(time.process_time() - started, 1)}


def tuned(results: Results, bed: str, method: str) -> float:
    """The rate of the lowest loss on a grid of factors of 2, widened until it is inside."""
    grid = [METHODS[method][2] * f for f in (0.5, 1.0, 2.0)]
    while True:
        losses = [results.get(one, bed=bed, method=method, lr=lr, seed=0, split="tune")["loss"] for lr in grid]
        best = int(np.argmin(losses))
        if 0 < best < len(grid) - 1:
            return grid[best]
        grid = [grid[0] / 2, *grid] if best == 0 else [*grid, grid[-1] * 2]


def interval(one: np.ndarray, two: np.ndarray) -> tuple[float, float, float]:
    """Difference of two (seeds, examples) of 0 and 1 in points, and its 95 % interval by a bootstrap over both."""
    draws, rng = [], np.random.default_rng(0)
    for _ in range(4000):
        seeds, images = rng.integers(len(one), size=len(one)), rng.integers(one.shape[1], size=one.shape[1])
        draws.append(100 * (one[seeds][:, images] - two[seeds][:, images]).mean())
    return 100 * float((one - two).mean()), *map(float, np.percentile(draws, [2.5, 97.5]))


def main() -> None:
    torch.set_num_threads(1)
    results, bed = Results(ROOT / "docs/results/informed.json"), sys.argv[1]
    right, lines = {}, []
    for method in sys.argv[2:] or METHODS:
        lr = tuned(results, bed, TUNED_AS.get(method, method))
        runs = [results.get(one, bed=bed, method=method, lr=lr, seed=seed, split="test") for seed in range(SEEDS)]
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
