"""The loop that every method runs in: steps, evaluation, checkpoints, and a line that says how it goes."""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm.optim
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, find_batch_size, gather_object, send_to_device, slice_tensors
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, Dataset

import uora_vision as uora
from uora_vision.lifecycle.informing import informed_rows, put_informed_rows

from ..command.display import Display
from ..data.loading import Batches, train_loader
from ..errors import CheckpointError, TrainingError
from . import checkpoint
from .average import Average
from .best import Best
from .machine import StopRequest, make_accelerator, peak_memory
from .methods import AdaptedModel
from .parts import Outcome, Progress, Scored, Task, TrainOptions


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
        TrainingError: the loss is not finite, or the measure to choose the best by is not measured.
        CheckpointError: there is nothing to resume, or it does not fit.
    """
    Best(options.best).check(task.measures)
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
        run.best.epoch,
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
        self.progress, self.best = Progress(), Best(options.best, options.patience)
        self.per_epoch = self.batches().per_epoch
        self.total = self.per_epoch * options.epochs
        adapted.model.to(accelerator.device)
        self.average = Average(adapted.model, options.ema, reinit) if options.ema else None
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
            self.options.chances,
        )

    def go(
        self, data: Dataset, task: Task, wish: StopRequest, display: Display, log: Callable
    ) -> tuple[str | None, Scored | None]:
        """Train to the end, or until something asks to stop."""
        progress = self.progress
        loader = () if self.best.exhausted else self.loader(data)
        evaluation, started, saved, base_seconds = None, time.monotonic(), time.monotonic(), progress.seconds
        before = time.monotonic()
        self.model.train()
        for batch in loader:
            self.step(task, batch)
            now = time.monotonic()
            progress.step_seconds.append(now - before)
            progress.seconds = base_seconds + now - started
            display.step(progress.step, (progress.step - 1) // self.per_epoch + 1, self.numbers(task))
            log(progress.step, self.numbers(task))
            if progress.step % self.per_epoch == 0:
                evaluation = self.end_epoch(task, display, log)
                progress.seconds = base_seconds + time.monotonic() - started
                if self.best.exhausted:
                    break
            if self.agree(self.due(saved) and progress.step < self.total):
                self.save()
                saved = time.monotonic()
            if progress.step < self.total and (reason := self.reason(wish, started)):
                self.save()
                return reason, None
            before = time.monotonic()
        self.save()
        return None, self.keep(task, evaluation)

    def keep(self, task: Task, evaluation: Scored | None) -> Scored:
        """Leave the weights in the model that are to be kept, measured."""
        kept = self.average.state() if self.average else None
        if self.best.state is not None:
            kept = self.best.state
            evaluation = evaluation if self.best.worse == 0 else None
        if kept is not None:
            checkpoint.load_changing_state(self.adapted.model, kept)
        return evaluation or task.evaluate(self.model, self.accelerator)

    def measure(self, task: Task) -> Scored:
        """Evaluate what would be kept if training ended now."""
        if self.average is None:
            return task.evaluate(self.model, self.accelerator)
        with self.accelerator.autocast():
            return task.evaluate(self.average.module, self.accelerator)

    def loader(self, data: Dataset) -> DataLoader:
        """Over the batches that are still to come."""
        return train_loader(data, self.batches(), self.options.workers)

    def step(self, task: Task, batch: Any) -> None:
        """One optimizer step. The loss is looked at before anything changes, so the weights stay as they were at the
        last good step."""
        progress, acc = self.progress, self.accelerator
        self.scheduler.step_update(progress.step + 1)
        self.optimizer.zero_grad()
        batch = send_to_device(batch, acc.device)
        whole = find_batch_size(batch)
        cuts = [whole * part // self.options.accumulate for part in range(self.options.accumulate + 1)]
        parts = [slice(first, last) for first, last in pairwise(cuts) if first < last]
        found = [0.0, 0.0, 0.0]
        for part in parts:
            with nullcontext() if part is parts[-1] else acc.no_sync(self.model):
                sums = self.backward(task, slice_tensors(batch, part) if len(parts) > 1 else batch, whole)
            found = [before + more for before, more in zip(found, sums, strict=True)]
        if self.options.clip:
            acc.clip_grad_norm_(self.parameters, self.options.clip)
        self.optimizer.step()
        progress.step += 1
        if not acc.optimizer_step_was_skipped:
            fired = self.reinit.step() if self.reinit is not None else 0
            if self.average is not None:
                self.average.update(progress.step, fired)
        total, running, seen = found
        progress.seen, progress.loss, progress.running = (
            progress.seen + int(seen),
            progress.loss + total,
            progress.running + running,
        )

    def backward(self, task: Task, batch: Any, whole: int) -> list[float]:
        """Add the gradients of a part of a step's batch of `whole` examples: sums of the loss and of `running`, and
        examples, over all processes."""
        acc = self.accelerator
        loss, told, count = task.loss(self.model, batch)
        sums = torch.stack([loss.detach() * count, told.float(), torch.tensor(float(count), device=loss.device)])
        total, running, seen = acc.reduce(sums, "sum").tolist()
        if not math.isfinite(total):
            kept = (
                f"The last checkpoint, {self.path}, is from before that. " if self.path and self.path.exists() else ""
            )
            raise TrainingError(
                f"the loss is {total / seen} at step {self.progress.step + 1} of {self.total}; the run stops. {kept}"
                "Try a smaller --lr or --head-lr, or --precision no."
            )
        acc.backward(loss if count == whole else loss * (count / whole))
        return [total, running, seen]

    def end_epoch(self, task: Task, display: Display, log: Callable) -> Scored | None:
        """Close an epoch's entry in the history, with an evaluation where one is due."""
        progress = self.progress
        epoch = progress.step // self.per_epoch
        due = epoch % self.options.eval_every == 0 or epoch == self.options.epochs
        evaluation = self.measure(task) if due else None
        entry = {
            "epoch": epoch,
            "train_loss": progress.loss / progress.seen,
            f"train_{task.running}": progress.running / progress.seen,
            **({f"test_{name}": value for name, value in evaluation.scores.items()} if evaluation else {}),
            "lr": self.rate(),
            "firings": self.firings(),
            "seconds": progress.seconds,
        }
        progress.history.append(entry)
        progress.seen, progress.loss, progress.running = 0, 0.0, 0.0
        if evaluation is not None:
            self.best.look(evaluation.scores, epoch, self.average.state if self.average else self.changing)
        display.epoch(entry, self.options.epochs)
        log(progress.step, {f"epoch/{key}": entry[key] for key in entry if "_" in key})
        return evaluation

    def rate(self) -> float:
        """Learning rate of what the method trains (of the head, where that is all)."""
        return self.optimizer.param_groups[0]["lr"]

    def firings(self) -> int:
        return self.reinit.firings if self.reinit else 0

    def numbers(self, task: Task) -> dict[str, float]:
        progress = self.progress
        return {
            "train/loss": progress.loss / progress.seen,
            f"train/{task.running}": progress.running / progress.seen,
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
                "model": self.changing(),
                "average": self.average.state() if self.average else None,
                "best": self.best.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "reinitializer": self.reinit.state_dict() if self.reinit else None,
                "random": random_states,
                "progress": asdict(self.progress),
            }
            checkpoint.write_checkpoint(self.path, state)
        self.accelerator.wait_for_everyone()

    def changing(self) -> dict[str, torch.Tensor]:
        return checkpoint.changing_state(self.adapted.model)

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
        self.best.load_state_dict(state["best"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.reinit is not None:
            self.reinit.load_state_dict(state["reinitializer"])
        if self.average is not None:
            self.average.load(state["average"])
        self.progress = Progress(**state["progress"])
        checkpoint.set_random_state(state["random"][self.accelerator.process_index])


FIELDS = (
    "total", "informed", "model", "average", "best", "optimizer", "scheduler", "scaler", "reinitializer", "random",
    "progress",
)  # fmt: skip
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
