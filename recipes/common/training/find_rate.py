"""A learning rate from a short sweep: the rate rises from step to step, and the loss tells where it falls fastest.

Smith, Cyclical Learning Rates for Training Neural Networks (2017).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import TrainingError
from . import checkpoint
from .loop import Run, make_optimizer
from .machine import make_accelerator
from .methods import AdaptedModel
from .parts import Task, TrainOptions

STEPS = 80
LOWEST, HIGHEST = 1e-3, 1e2
"""Of the rates that were asked for, all of them alike."""
DIVERGED = 3.0
"""Times the least loss: there a sweep ends."""
AROUND = 5
"""Losses on either side that a smoothed one is the mean of."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep has found.

    Args:
        rates: of each step.
        losses: smoothed, of each step.
        suggested: the rate where the smoothed loss falls fastest; None if it does not fall.
        head_suggested: of the head, raised alike.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggested: float | None
    head_suggested: float | None

    @property
    def told(self) -> str:
        """In a sentence."""
        if self.suggested is None:
            return (
                f"The loss fell at no rate from {min(self.rates):.2g} to {max(self.rates):.2g}; no --lr is suggested."
            )
        return f"The loss falls fastest near --lr {self.suggested:g} --head-lr {self.head_suggested:g}."


class Rising:
    """In the place of a scheduler: all rates rise alike, evenly in their logarithms."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.groups = [(group, group["lr"]) for group in optimizer.param_groups]

    def step_update(self, step: int) -> None:
        for group, rate in self.groups:
            group["lr"] = rate * factor(step)


def factor(step: int) -> float:
    """Of the rates that were asked for, at a step counted from 1."""
    return float(LOWEST * (HIGHEST / LOWEST) ** ((step - 1) / (STEPS - 1)))


def find_rate(adapted: AdaptedModel, optimizer: str, data: Dataset, task: Task, options: TrainOptions) -> Sweep:
    """Sweep over learning rates on a copy of the model, without redraws. The model and the generators of random numbers
    are as before after it.

    Args:
        optimizer: an optimizer's name in timm.
        data: to train on, sized.
    """
    before = checkpoint.random_state()
    tried = copy.deepcopy(adapted)
    stepping = make_optimizer(tried, optimizer)
    per_epoch = -(-len(data) // options.batch)  # type: ignore[arg-type]
    how = replace(options, epochs=-(-STEPS // per_epoch), max_steps=STEPS, ema=None, best=None, patience=None)
    run = Run(tried, stepping, None, how, make_accelerator(options.precision), len(data), None)  # type: ignore[arg-type]
    run.scheduler = Rising(stepping)
    run.model.train()
    losses: list[float] = []
    for batch in run.loader(data):
        earlier, seen = run.progress.loss, run.progress.seen
        try:
            run.step(task, batch)
        except TrainingError:  # a loss that is not finite
            break
        losses.append((run.progress.loss - earlier) / (run.progress.seen - seen))
        if len(losses) == STEPS or losses[-1] > DIVERGED * min(losses):
            break
    checkpoint.set_random_state(before)
    steepest = steepest_fall(losses)
    best = None if steepest is None else factor(steepest + 1)
    asked = adapted.options
    return Sweep(
        tuple(asked.lr * factor(step) for step in range(1, len(losses) + 1)), tuple(smooth(losses)),
        None if best is None else float(f"{asked.lr * best:.2g}"),
        None if best is None else float(f"{asked.head_lr * best:.2g}"),
    )  # fmt: skip


def smooth(losses: Sequence[float]) -> list[float]:
    """The mean of each loss and those around it."""
    return [float(np.mean(losses[max(0, i - AROUND) : i + AROUND + 1])) for i in range(len(losses))]


def steepest_fall(losses: Sequence[float]) -> int | None:
    """Where losses, evenly spaced in the logarithm of the rate, fall fastest before their lowest point; None if they
    do not fall by more than what one differs from its neighbours."""
    if len(losses) <= AROUND:
        return None
    curve = np.asarray(smooth(losses))
    lowest = int(np.argmin(curve))
    noise = float(np.std(np.asarray(losses)[: lowest + 1] - curve[: lowest + 1]))
    if lowest == 0 or curve[0] - curve[lowest] <= noise:
        return None
    return int(np.argmin(np.gradient(curve)[: lowest + 1]))
