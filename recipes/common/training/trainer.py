"""Text models train on transformers' Trainer: this is what a recipe adds to it.

`fit` runs a Trainer to its end, or until something asks to stop, and gives the same `Outcome` as `training.train`.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_pt_utils import LengthGroupedSampler

import uora_vision as uora
from uora_vision.integrations.transformers import UoraCallback, adapter_only

from ..command import cli
from ..command.display import Display
from ..errors import CheckpointError, TrainingError
from .best import Best
from .checkpoint import changing_state, load_changing_state, read_checkpoint, write_checkpoint
from .folder import CHECKPOINTS, write_json
from .machine import StopRequest, peak_memory
from .methods import AdaptedModel
from .parts import Outcome, Progress
from .tracking import Log, tracking

PROGRESS, TRAINED, DIGESTS, BEST = "progress.json", "trained.safetensors", "digests.json", "best.pt"


def arguments(options: Any, folder: Path, **more: Any) -> dict[str, Any]:
    """A recipe's options as keyword arguments of TrainingArguments, or of a class derived from it."""
    processes = max(1, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": -(-options.batch // (processes * options.accumulate)),
        "per_device_eval_batch_size": max(32, options.batch),
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.warmup,
        "max_grad_norm": options.clip,
        "gradient_accumulation_steps": options.accumulate,
        "bf16": options.precision == "bf16",
        "fp16": options.precision == "fp16",
        "seed": options.seed,
        "dataloader_num_workers": options.workers,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_broadcast_buffers": False,
        "save_strategy": "no",  # `Watch` asks for checkpoints, and for evaluations
        "eval_strategy": "no",
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "report_to": [],  # `fit` logs to the run's own folder
        "disable_tqdm": True,
        "log_level": "error",
        **more,
    }


def careful(base: type[Trainer], adapted: AdaptedModel) -> type[Trainer]:
    """A Trainer that stops at the first loss that is not finite, before it changes a weight, and whose checkpoints hold
    what trains and not the model."""
    slim = adapter_only(base) if adapted.is_uora else _trained_only(base, adapted)

    class Careful(slim):  # type: ignore[misc, valid-type]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            value = self.accelerator.reduce(loss.detach().clone(), "sum").item()
            if not math.isfinite(value):
                raise TrainingError(
                    f"the loss is {value} at step {self.state.global_step + 1} of {self.state.max_steps}; the run "
                    "stops, and its last checkpoint is from before that. Try a smaller --lr or --head-lr, or "
                    "--precision no."
                )
            return loss

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            sampler = super()._get_train_sampler(*args, **kwargs)
            return EpochOrder(sampler, self.args.seed) if isinstance(sampler, LengthGroupedSampler) else sampler

    return Careful


class EpochOrder(Sampler[int]):
    """The order of a sampler, as it follows from seed and epoch alone.

    The Trainer's own draws from the global generator, which a run resumed in a later epoch has in another state.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        return iter(self.sampler)


def _trained_only(base: type[Trainer], adapted: AdaptedModel) -> type[Trainer]:
    class TrainedOnly(base):  # type: ignore[misc, valid-type]
        def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(adapted.trained_tensors(), folder / TRAINED)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            adapted.model.load_state_dict(load_file(Path(resume_from_checkpoint) / TRAINED), strict=False)

    return TrainedOnly


def fit(
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    reinit: uora.Reinitializer | None,
    options: Any,
    folder: Path,
    make: Callable[..., Trainer],
    scores: Callable[[dict[str, float]], dict[str, float]],
    measures: Sequence[str],
    display: Display,
) -> Outcome:
    """Train what `adapted` trains.

    Args:
        optimizer: of the parameters of `adapted`; see `make_optimizer`.
        reinit: steps after the optimizer; None to redraw nothing.
        options: a recipe's options: those of `RunChoice` and `TrainChoice`.
        folder: of the run; checkpoints go to a folder inside.
        make: makes the Trainer, given `model`, `optimizers` and `callbacks`.
        scores: from the metrics of `Trainer.evaluate` to what is told, `loss` among it.
        measures: the names of what is told.

    Raises:
        TrainingError: the loss is not finite, or the measure to choose the best by is not measured.
        CheckpointError: there is nothing to resume, or it is damaged.
    """
    transformers.utils.logging.disable_progress_bar()
    watch = Watch(adapted.model, options, folder, display)
    watch.best.check(measures)
    callbacks: list[TrainerCallback] = [watch]
    if reinit is not None:
        keeper = UoraCallback()
        keeper.reinit = reinit
        callbacks.insert(0, keeper)  # it adds to what others log
    trainer = make(model=adapted.model, optimizers=(optimizer, None), callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    watch.begin(trainer, scores)
    last = None
    if options.resume:
        last = str(last_whole(folder / CHECKPOINTS))
    with (
        tracking(folder, options.trackers, cli.plain(options)) as log,
        StopRequest() as watch.wish,
        display.running(watch.total, 0, options.epochs),
    ):
        trainer.add_callback(Numbers(log))
        trainer.train(resume_from_checkpoint=last)
    evaluation = None if watch.stopped else watch.keep()
    device = trainer.accelerator.device
    kept = watch.best.epoch
    return Outcome(watch.stopped, watch.progress, reinit, evaluation, peak_memory(device), str(device), kept)


def digests_of(folder: Path) -> dict[str, str]:
    """Of every file of a checkpoint, by name, but of this list itself."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != DIGESTS)
    found = {}
    for file in files:
        with file.open("rb") as content:
            found[str(file.relative_to(folder))] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def last_whole(folder: Path) -> Path:
    """The last checkpoint that was written to its end.

    Raises:
        CheckpointError: there is none, or its content is not what was written.
    """
    written = sorted(folder.glob(f"checkpoint-*/{DIGESTS}"), key=lambda file: int(file.parent.name.rpartition("-")[2]))
    if not written:
        raise CheckpointError(f"--resume needs a whole checkpoint in {folder}; start without --resume")
    last = written[-1].parent
    try:
        same = json.loads(written[-1].read_text(encoding="utf-8")) == digests_of(last)
    except ValueError:
        same = False
    if not same:
        raise CheckpointError(f"{last} is damaged: its content is not what was written; delete it and start again")
    return last


class Scores(dict[str, float]):
    """The result of an evaluation, as `training.Scored` has it."""

    @property
    def scores(self) -> dict[str, float]:
        return dict(self)


class Numbers(TrainerCallback):
    """Gives what the Trainer logs to the trackers of a run."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.is_world_process_zero:
            logs = rewrite_logs(more["logs"])
            self.log(state.global_step, {name: x for name, x in logs.items() if isinstance(x, int | float)})


class Watch(TrainerCallback):
    """Keeps a run's progress, asks for evaluations and checkpoints, and stops it when told to."""

    def __init__(self, model: nn.Module, options: Any, folder: Path, display: Display) -> None:
        self.model, self.options, self.folder, self.display = model, options, folder, display
        self.best = Best(options.best, options.patience)
        self.steps, self.seconds = options.cadence
        self.progress, self.stopped = Progress(), None
        self.evaluation: Scores | None = None
        self.wish = StopRequest()

    def begin(self, trainer: Trainer, scores: Callable[[dict[str, float]], dict[str, float]]) -> None:
        self.trainer, self.scores = trainer, scores
        accumulate = trainer.args.gradient_accumulation_steps
        self.per_epoch = max(1, -(-len(trainer.get_train_dataloader()) // accumulate))
        self.total = self.per_epoch * self.options.epochs

    def measure(self) -> Scores:
        """Evaluate the model as it is."""
        found = self.trainer.evaluate()
        return Scores(self.scores({key.removeprefix("eval_"): value for key, value in found.items()}))

    def keep(self) -> Scores:
        """Leave the weights in the model that are to be kept, measured."""
        if self.best.state is not None:
            load_changing_state(self.model, self.best.state)
            self.evaluation = self.evaluation if self.best.worse == 0 else None
        return self.evaluation or self.measure()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.progress = Progress(**json.loads((folder / PROGRESS).read_text()))
            self.best.load_state_dict(read_checkpoint(folder / BEST))
        self.started = self.saved = time.monotonic()
        self.earlier = self.progress.seconds

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.before = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now, progress = time.monotonic(), self.progress
        progress.step = state.global_step
        progress.step_seconds.append(now - self.before)
        progress.seconds = self.earlier + now - self.started
        lately = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
        shown = {key: lately[key] for key in ("loss", "learning_rate", "firings") if key in lately}
        self.display.step(state.global_step, (state.global_step - 1) // self.per_epoch + 1, shown)
        if state.global_step % self.per_epoch == 0:  # `on_epoch_end` does the rest, after an evaluation
            control.should_log = True
        else:
            self._save_or_stop(state, control)

    def _save_or_stop(self, state: TrainerState, control: TrainerControl) -> None:
        now = time.monotonic()
        by_steps = self.steps and state.global_step % self.steps == 0
        control.should_save |= bool(by_steps or (self.seconds and now - self.saved >= self.seconds))
        self.stopped = self._reason()
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopped:
            return
        epoch, progress = round(state.epoch or 0), self.progress
        due = epoch % self.options.eval_every == 0 or epoch == self.options.epochs
        self.evaluation = self.measure() if due else None
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry and entry["epoch"] > epoch - 1]
        entry = {
            "epoch": epoch,
            **({"train_loss": sum(losses) / len(losses)} if losses else {}),
            **({f"test_{name}": value for name, value in self.evaluation.items()} if self.evaluation else {}),
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
            "firings": next((e["firings"] for e in reversed(state.log_history) if "firings" in e), 0),
            "seconds": self.earlier + time.monotonic() - self.started,
        }
        progress.history.append(entry)
        self.display.epoch(entry, self.options.epochs)
        if self.evaluation is not None:
            self.best.look(self.evaluation, epoch, lambda: changing_state(self.model))
        if self.best.exhausted:
            control.should_training_stop = True
        elif state.global_step < state.max_steps:
            self._save_or_stop(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved = time.monotonic()
        self.trainer.accelerator.wait_for_everyone()  # each process has written its own random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / PROGRESS).write_text(json.dumps(asdict(self.progress)))
            write_checkpoint(folder / BEST, self.best.state_dict())
            write_json(folder / DIGESTS, digests_of(folder))
            for older in folder.parent.glob("checkpoint-*"):
                if older != folder:
                    shutil.rmtree(older)

    def _reason(self) -> str | None:
        """Why to stop now, the same in all processes; None to go on."""
        options, reason = self.options, self.wish.reason
        if options.max_steps is not None and self.progress.step >= options.max_steps:
            reason = "max-steps"
        elif options.max_seconds is not None and time.monotonic() - self.started >= options.max_seconds:
            reason = "max-seconds"
        if self.trainer.accelerator.num_processes == 1:
            return reason
        return next(filter(None, gather_object([reason])), None)
