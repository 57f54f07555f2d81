"""Where is the best learning rate of b and of d, at every rank, width and law of the banks?

    python scripts/study/scale.py plane     # rates of b and d apart, three ranks
    python scripts/study/scale.py lines     # one rate, every rank, width and law
    python scripts/study/scale.py extremes  # gains 10 apart
    python scripts/study/scale.py steps     # longer runs
    python scripts/study/scale.py plot      # docs/images/rates.png, from what is there

Rates are told in the scale of docs/method.md: `step` is how far a step of b moves an adapted output, in units of the
RMS of its input, and `turn` how far a step of d moves d, in units of d_init.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from bed import ROOT, Bed, Results, cifar60_tail, fit, score, sst2_tail, tiny

import uora_vision as uora
from uora_vision.lifecycle.parameter_groups import gain


def groups(model: Any, step: float, turn: float, head_lr: float) -> list[dict[str, Any]]:
    out = [{"params": list(model.head.parameters()), "lr": head_lr}]
    for adapter in uora.adapters(model).values():
        d_init = adapter.d.abs().mean().item()
        out.append({"params": [adapter.b], "lr": step / (d_init * gain(adapter))})
        out.append({"params": [adapter.d], "lr": turn * d_init})
    return out


def one(
    bed: str, rank: int, law: str, seed: int, epochs: int, targets: str = "attention+mlp", **rates: float
) -> dict[str, Any]:
    """A run at `lr`, the rate of `uora.param_groups`, or at `step` and `turn`."""
    there: Bed = BEDS[bed]()
    torch.manual_seed(seed)
    model, started = there.make(), time.process_time()
    options = {"init": "kaiming", "layout": "slice"} if law == "kaiming" else {}
    uora.inject(model, rank=rank, seed=seed, targets=targets, **options)
    if "lr" in rates:
        chosen = uora.param_groups(model, lr=rates["lr"])
    else:
        chosen = groups(model, rates["step"], rates["turn"], 4e-3)
    losses = list(fit(model, torch.optim.AdamW(chosen, weight_decay=0.0), *there.train, epochs=epochs, seed=seed))
    result = score(model, there.tune)
    del result["right"]
    last = losses[-len(losses) // epochs :]
    gains = sorted(gain(adapter) for adapter in uora.adapters(model).values())
    result |= {"gain": round(gains[len(gains) // 2], 4), "train_loss": round(sum(last) / len(last), 5)}
    return result | {"seconds": round(time.process_time() - started, 1)}


BEDS = {
    "tiny48": lambda: tiny(48),
    "tiny192": lambda: tiny(192),
    "tiny384": lambda: tiny(384),
    "cifar60 tail": cifar60_tail,
    "sst2 tail": sst2_tail,
}
EPOCHS = {"cifar60 tail": 4, "sst2 tail": 3}
LAWS = (("haar", 8), ("haar", 64), ("haar", 256), ("kaiming", 64))
RATES = (0.05, 0.1, 0.2, 0.025, 0.4)


def plane(results: Results) -> None:
    for turn in (0.03, 0.1, 0.3, 1.0, 3.0):
        for step in (0.003, 0.01, 0.03, 0.1, 0.3):
            for rank in (8, 64, 256):
                results.get(one, bed="tiny48", rank=rank, law="haar", step=step, turn=turn, seed=0, epochs=5)
    for step, turn in ((0.01, 1.0), (0.03, 0.3), (0.03, 1.0), (0.003, 3.0)):
        for rank in (8, 64, 256):
            results.get(one, bed="cifar60 tail", rank=rank, law="haar", step=step, turn=turn, seed=0, epochs=4)


def lines(results: Results) -> None:
    for bed in sys.argv[2:] or BEDS:
        for lr in RATES:
            for law, rank in LAWS[: 2 if bed == "sst2 tail" else None]:
                results.get(one, bed=bed, rank=rank, law=law, seed=0, epochs=EPOCHS.get(bed, 5), lr=lr)


def extremes(results: Results) -> None:
    """Banks whose gains are 10 apart, on q and v alone, where VeRA's is largest."""
    for lr in RATES:
        for law, rank in (("haar", 2), ("kaiming", 64)):
            results.get(one, bed="tiny48", rank=rank, law=law, seed=0, epochs=5, targets="qv", lr=lr)


def steps(results: Results) -> None:
    """Does the best rate fall as training gets longer?"""
    for epochs, rates in ((20, (0.05, 0.1, 0.2, 0.025)), (80, (0.05, 0.1, 0.025, 0.0125))):
        for lr in rates:
            results.get(one, bed="tiny48", rank=64, law="haar", seed=0, epochs=epochs, lr=lr)


def plot(results: Results) -> None:
    """Loss against the rate as `param_groups` takes it, and against the plain rate that does the same."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    runs = [
        run
        for run in results.runs
        if "lr" in run and run["epochs"] == EPOCHS.get(run["bed"], 5) and "targets" not in run
    ]
    beds = [bed for bed in BEDS if len({run["lr"] for run in runs if run["bed"] == bed}) > 2]
    figure, axes = pyplot.subplots(2, len(beds), figsize=(4 * len(beds), 6), squeeze=False)
    for column, bed in zip(axes.T, beds, strict=True):
        for law, rank in LAWS:
            mine = sorted(
                (r for r in runs if (r["bed"], r["law"], r["rank"]) == (bed, law, rank)), key=lambda r: r["lr"]
            )
            for row, axis in enumerate(column):
                # Equal rates p = q do what lr does where p q s = lr ** 2.
                x = [r["lr"] / (r["gain"] ** 0.5 if row else 1) for r in mine]
                if mine:
                    axis.plot(x, [r["loss"] for r in mine], marker=".", label=f"{law} r{rank}")
        column[0].set_title(bed)
        for axis, name in zip(column, ("lr of param_groups", "plain rate of b and d"), strict=True):
            axis.set(xscale="log", xlabel=name, ylabel="loss, held out")
            axis.set_xticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
        column[0].legend()
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/rates.png", dpi=80)


def main() -> None:
    torch.set_num_threads(1)
    {"plane": plane, "lines": lines, "extremes": extremes, "steps": steps, "plot": plot}[sys.argv[1]](
        Results(ROOT / "docs/results/scale.json")
    )


if __name__ == "__main__":
    main()
