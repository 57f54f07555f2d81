"""The loop that every method runs in: steps, evaluation, checkpoints, and a line that says how it goes."""

from __future__ import annotations

import difflib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import timm.optim
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import Dataset

import uora_vision as uora
from uora_vision.lifecycle.informing import informed_rows, put_informed_rows

from ..command.display import Display
from ..data.loading import Batches, train_loader
from ..errors import CheckpointError, TrainingError
from . import checkpoint
from .machine import StopRequest, make_accelerator, peak_memory
from .methods import AdaptedModel


class Scored(Protocol):
    """The result of an evaluation."""

    @property
    def scores(self) -> dict[str, float]:
        """`loss`, and what else was measured."""
        ...


class Task(Protocol):
    """What is learned: the loss of a batch, and a measurement."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, int]:
        """The mean loss of a batch (on the device), the number of right answers, and the number of examples."""
        ...

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Scored:
        """Measure the model as it is; it is back in train mode afterwards."""
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
        same = ("epochs", "batch", "warmup", "clip", "precision", "workers", "seed", "eval_every", "max_steps",
                "max_seconds")  # fmt: skip
        return cls(
            **{name: getattr(options, name) for name in same},
            checkpoint_steps=steps, checkpoint_seconds=seconds,
        )  # fmt: skip


@dataclass
class Progress:
    """Where a run stands; all of it goes into a checkpoint.

    Args:
        step: optimizer steps done.
        seen, loss, hits: examples, summed loss and correct predictions since the epoch began.
        seconds: spent training and evaluating, over all sittings.
        step_seconds: of every step.
        history: one entry per epoch; see `RunReport.history`.
    """

    step: int = 0
    seen: int = 0
    loss: float = 0.0
    hits: int = 0
    seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """What a run leaves. `stopped` is None when it ran to its end, otherwise why it did not."""

    stopped: str | None
    progress: Progress
    reinit: uora.Reinitializer | None
    evaluation: Any
    peak_memory_bytes: int
    device: str

    @property
    def seconds_per_step(self) -> float | None:
        return statistics.median(self.progress.step_seconds) if self.progress.step_seconds else None


def train(
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    reinit: uora.Reinitializer | None,
    data: Dataset,
    task: Task,
    options: TrainOptions,
    *,
    display: Display | None = None,
    log: Callable[[int, dict[str, float]], None] | None = None,
    checkpoint_path: Path | None = None,
    resume: bool = False,
) -> Outcome:
    """Train what `adapted` trains.

    Args:
        optimizer: of the parameters of `adapted`; see `make_optimizer`.
        reinit: steps after the optimizer; None to redraw nothing.
        data: sized; gives an example for (epoch, index).
        display: shows progress.
        log: called with (step, numbers) after every step and every evaluation.
        checkpoint_path: where to keep the state of the run; None keeps none.
        resume: go on from that checkpoint.

    Raises:
        TrainingError: the loss is not finite.
        CheckpointError: there is nothing to resume, or it does not fit.
    """
    accelerator = make_accelerator(options.precision)
    run = Run(adapted, optimizer, reinit, options, accelerator, len(data), checkpoint_path)
    if resume:
        run.load()
    display = display or Display(quiet=True)
    with StopRequest() as wish, display.running(run.total, run.progress.step, options.epochs):
        stopped, evaluation = run.go(data, task, wish, display, log or (lambda step, numbers: None))
    return Outcome(
        stopped,
        run.progress,
        run.reinit,
        evaluation,
        peak_memory(accelerator.device),
        str(accelerator.device),
    )


class Run:
    """A run in progress: the parts that a checkpoint must hold, and the loop over them."""

    def __init__(
        self,
        adapted: AdaptedModel,
        optimizer: torch.optim.Optimizer,
        reinit: uora.Reinitializer | None,
        options: TrainOptions,
        accelerator: Accelerator,
        examples: int,
        path: Path | None,
    ) -> None:
        self.adapted, self.reinit, self.options, self.accelerator = adapted, reinit, options, accelerator
        self.path = path
        self.examples = examples
        self.progress = Progress()
        self.per_epoch = self.batches().per_epoch
        self.total = self.per_epoch * options.epochs
        adapted.model.to(accelerator.device)
        warmup = round(options.warmup * self.total)
        self.scheduler = CosineLRScheduler(
            optimizer, t_initial=self.total - warmup + 1, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
        )
        self.model, self.optimizer = accelerator.prepare(adapted.model, optimizer)
        self.parameters = [p for group in adapted.groups for p in group["params"]]

    def batches(self) -> Batches:
        """The batches that are still to come."""
        return Batches(
            self.examples,
            self.options.batch,
            self.options.epochs,
            self.options.seed,
            self.progress.step,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )

    def go(
        self, data: Dataset, task: Task, wish: StopRequest, display: Display, log: Callable
    ) -> tuple[str | None, Scored | None]:
        """Train to the end, or until something asks to stop."""
        progress, options, acc = self.progress, self.options, self.accelerator
        loader = train_loader(data, self.batches(), options.workers)
        evaluation, started, saved, base_seconds = None, time.monotonic(), time.monotonic(), progress.seconds
        before = time.monotonic()
        self.model.train()
        for batch in loader:
            self.step(task, send_to_device(batch, acc.device))
            now = time.monotonic()
            progress.step_seconds.append(now - before)
            progress.seconds = base_seconds + now - started
            display.step(progress.step, (progress.step - 1) // self.per_epoch + 1, self.numbers())
            log(progress.step, self.numbers())
            if progress.step % self.per_epoch == 0:
                evaluation = self.end_epoch(task, display, log)
                progress.seconds = base_seconds + time.monotonic() - started
            if self.agree(self.due(saved) and progress.step < self.total):
                self.save()
                saved = time.monotonic()
            if progress.step < self.total and (reason := self.reason(wish, started)):
                self.save()
                return reason, None
            before = time.monotonic()
        self.save()
        return None, evaluation or task.evaluate(self.model, acc)

    def step(self, task: Task, batch: Any) -> None:
        """One optimizer step. The loss is looked at before anything changes, so the weights stay as they were at the
        last good step."""
        progress, acc = self.progress, self.accelerator
        self.scheduler.step_update(progress.step + 1)
        loss, hits, count = task.loss(self.model, batch)
        sums = torch.stack([loss.detach() * count, hits.float(), torch.tensor(float(count), device=loss.device)])
        total, correct, seen = acc.reduce(sums, "sum").tolist()
        if not math.isfinite(total):
            kept = (
                f"The last checkpoint, {self.path}, is from before that. " if self.path and self.path.exists() else ""
            )
            raise TrainingError(
                f"the loss is {total / seen} at step {progress.step + 1} of {self.total}; the run stops. {kept}"
                "Try a smaller --lr or --head-lr, or --precision no."
            )
        self.optimizer.zero_grad()
        acc.backward(loss)
        if self.options.clip:
            acc.clip_grad_norm_(self.parameters, self.options.clip)
        self.optimizer.step()
        if self.reinit is not None and not acc.optimizer_step_was_skipped:
            self.reinit.step()
        progress.step += 1
        progress.seen, progress.loss, progress.hits = (
            progress.seen + int(seen),
            progress.loss + total,
            progress.hits + int(correct),
        )

    def end_epoch(self, task: Task, display: Display, log: Callable) -> Scored | None:
        """Close an epoch's entry in the history, with an evaluation where one is due."""
        progress = self.progress
        epoch = progress.step // self.per_epoch
        due = epoch % self.options.eval_every == 0 or epoch == self.options.epochs
        evaluation = task.evaluate(self.model, self.accelerator) if due else None
        entry = {
            "epoch": epoch,
            "train_loss": progress.loss / progress.seen,
            "train_accuracy": progress.hits / progress.seen,
            **({f"test_{name}": value for name, value in evaluation.scores.items()} if evaluation else {}),
            "lr": self.rate(),
            "firings": self.firings(),
            "seconds": progress.seconds,
        }
        progress.history.append(entry)
        progress.seen, progress.loss, progress.hits = 0, 0.0, 0
        display.epoch(entry, self.options.epochs)
        log(progress.step, {f"epoch/{key}": entry[key] for key in entry if "_" in key})
        return evaluation

    def rate(self) -> float:
        """Learning rate of what the method trains (of the head, where that is all)."""
        return self.optimizer.param_groups[0]["lr"]

    def firings(self) -> int:
        return self.reinit.firings if self.reinit else 0

    def numbers(self) -> dict[str, float]:
        progress = self.progress
        return {
            "train/loss": progress.loss / progress.seen,
            "train/accuracy": progress.hits / progress.seen,
            "train/lr": self.rate(),
            "train/firings": self.firings(),
        }

    def due(self, saved: float) -> bool:
        """Whether it is time for a checkpoint."""
        options = self.options
        by_steps = options.checkpoint_steps and self.progress.step % options.checkpoint_steps == 0
        now_due = time.monotonic() - saved >= options.checkpoint_seconds
        return bool(by_steps or (options.checkpoint_seconds and now_due))

    def reason(self, wish: StopRequest, started: float) -> str | None:
        """Why to stop now, the same in all processes; None to go on."""
        options, reason = self.options, wish.reason
        if options.max_steps is not None and self.progress.step >= options.max_steps:
            reason = "max-steps"
        elif options.max_seconds is not None and time.monotonic() - started >= options.max_seconds:
            reason = "max-seconds"
        if self.accelerator.num_processes == 1:
            return reason
        return next(filter(None, gather_object([reason])), None)

    def agree(self, answer: bool) -> bool:
        """The main process's answer, in all processes: their clocks differ."""
        if self.accelerator.num_processes == 1:
            return answer
        return broadcast_object_list([answer])[0]

    def save(self) -> None:
        """Write a checkpoint; every process takes part, the main one writes."""
        if self.path is None:
            return
        random_states = gather_object([checkpoint.random_state()])
        if self.accelerator.is_main_process:
            state = {
                "total": self.total,
                "informed": informed_rows(self.adapted.base) if self.adapted.is_uora else {},
                "model": checkpoint.changing_state(self.adapted.model),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "reinitializer": self.reinit.state_dict() if self.reinit else None,
                "random": random_states,
                "progress": asdict(self.progress),
            }
            checkpoint.write_checkpoint(self.path, state)
        self.accelerator.wait_for_everyone()

    def load(self) -> None:
        """Take up the run where the checkpoint left it."""
        assert self.path is not None
        state = checkpoint.read_checkpoint(self.path, FIELDS)
        if state["total"] != self.total:
            raise CheckpointError(
                f"the checkpoint is of a run of {state['total']} steps, this one has {self.total}: the data changed"
            )
        if len(state["random"]) != self.accelerator.num_processes:
            raise CheckpointError(f"the run had {len(state['random'])} processes; resume it with as many")
        if self.adapted.is_uora:
            put_informed_rows(self.adapted.base, state["informed"])
        checkpoint.load_changing_state(self.adapted.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.reinit is not None:
            self.reinit.load_state_dict(state["reinitializer"])
        self.progress = Progress(**state["progress"])
        checkpoint.set_random_state(state["random"][self.accelerator.process_index])


FIELDS = ("total", "informed", "model", "optimizer", "scheduler", "scaler", "reinitializer", "random", "progress")
"""Of a checkpoint."""


def make_optimizer(adapted: AdaptedModel, name: str = "adamw") -> torch.optim.Optimizer:
    """One of timm's optimizers over what trains.

    Raises:
        TrainingError: timm has none of that name.
    """
    known = timm.optim.list_optimizers()
    if name.lower().removeprefix("lookahead_") not in known:
        hint = ", ".join(difflib.get_close_matches(name, known, 3)) or "adamw, sgd, lamb, lion, ..."
        raise TrainingError(f"timm has no optimizer {name!r}; there are {hint}")
    return timm.optim.create_optimizer_v2(adapted.groups, opt=name, lr=adapted.options.lr)
