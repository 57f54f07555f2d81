"""What a training run consists of: its task, how it is trained, where it stands, and what it leaves."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn

import uora_vision as uora


class Scored(Protocol):
    """The result of an evaluation."""

    @property
    def scores(self) -> dict[str, float]:
        """`loss`, and what else was measured."""
        ...


class Task(Protocol):
    """What is learned: the loss of a batch, and a measurement."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, int]:
        """The mean loss of a batch (on the device), the sum of `running` over it, and the number of examples."""
        ...

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Scored:
        """Measure the model as it is; it is back in train mode afterwards."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of what it measures, first the one that it is judged by."""
        ...

    @property
    def running(self) -> str:
        """What is told of training besides the loss, a mean over examples."""
        ...


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Args:
        epochs: passes over the training data.
        batch: examples per optimizer step, over all processes.
        warmup: share of all steps in which the learning rate rises linearly; it falls along a cosine after that.
        clip: largest norm of the gradient; 0 for none.
        precision: `no`, `bf16` or `fp16`.
        workers: processes that read data.
        seed: of the order and the augmentation.
        eval_every: epochs between evaluations; the last epoch always has one.
        accumulate: parts in which the batch of a step is computed, one after the other.
        ema: decay of an average of the weights, which is what is measured and kept; None for none.
        best: the measure by which the best evaluation is kept; None for the last one.
        patience: stop after so many evaluations without a better one; None for not before the end.
        chances: of each example to be drawn; see `Batches`.
        checkpoint_steps, checkpoint_seconds: how often a checkpoint is written; 0 for not by this count.
        max_steps, max_seconds: stop there, with a checkpoint, as if interrupted; None for no limit.
    """

    epochs: int = 10
    batch: int = 64
    warmup: float = 0.1
    clip: float = 1.0
    precision: str = "no"
    workers: int = 0
    seed: int = 0
    eval_every: int = 1
    accumulate: int = 1
    ema: float | None = None
    best: str | None = None
    patience: int | None = None
    chances: np.ndarray | None = None
    checkpoint_steps: int = 0
    checkpoint_seconds: float = 600.0
    max_steps: int | None = None
    max_seconds: float | None = None

    @classmethod
    def of(cls, options: Any) -> TrainOptions:
        """From a recipe's options: those of `RunChoice`, `TrainChoice` and `MethodChoice`.

        Raises:
            RecipeError: `--checkpoint-every` is neither steps nor minutes.
        """
        steps, seconds = options.cadence
        same = ("epochs", "batch", "warmup", "clip", "precision", "workers", "seed", "eval_every", "accumulate", "best",
                "patience", "max_steps", "max_seconds")  # fmt: skip
        return cls(
            **{name: getattr(options, name) for name in same}, ema=getattr(options, "ema", None),
            checkpoint_steps=steps, checkpoint_seconds=seconds,
        )  # fmt: skip


@dataclass
class Progress:
    """Where a run stands; all of it goes into a checkpoint.

    Args:
        step: optimizer steps done.
        seen, loss, running: examples, summed loss and the sum of `Task.running` since the epoch began.
        seconds: spent training and evaluating, over all sittings.
        step_seconds: of every step.
        history: one entry per epoch; see `RunReport.history`.
    """

    step: int = 0
    seen: int = 0
    loss: float = 0.0
    running: float = 0.0
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """What a run leaves.

    Args:
        stopped: None when it ran to its end, otherwise why it did not.
        kept_epoch: whose weights were kept; None for those of the end.
    """

    stopped: str | None
    progress: Progress
    reinit: uora.Reinitializer | None
    evaluation: Any
    peak_memory_bytes: int
    device: str
    kept_epoch: int | None = None

    @property
    def seconds_per_step(self) -> float | None:
        return statistics.median(self.progress.step_seconds) if self.progress.step_seconds else None
