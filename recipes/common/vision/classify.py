"""What the recipes that classify images have in common: reading the images, and what comes after adapting a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console

import uora_vision as uora
from uora_vision.predict.tasks import IMAGES

from ..command import cli
from ..command.display import Display
from ..command.options import ImageChoice
from ..data.images import parse_classes
from ..data.loading import Images
from ..data.mixing import Mixed
from ..data.splits import Splits, load_splits
from ..report.results import finish
from ..training.about import described
from ..training.find_rate import find_rate
from ..training.folder import CHECKPOINT, record_config
from ..training.loop import train
from ..training.methods import AdaptedModel
from ..training.parts import TrainOptions
from ..training.tracking import tracking
from .evaluation import Classification, sections


def load_sets(options: ImageChoice) -> Splits:
    """Images to train on, and images to measure.

    Raises:
        DataError: see `load_splits`.
    """
    return load_splits(
        options.data, parse_classes(options.classes), validation=options.validation, shots=options.shots,
        seed=options.seed, strict=options.strict,
    )  # fmt: skip


def train_images(
    options: ImageChoice,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    reinit: uora.Reinitializer | None,
    data: Images,
    tests: Images,
    splits: Splits,
    base: str,
    folder: Path,
    config: dict[str, Any],
    comparison: list[dict[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """Train on images, measure, and write the results.

    Args:
        adapted, optimizer, reinit: what trains, and how; see `train`.
        data, tests: to train on, and to measure.
        splits: what they were made of.
        base: digest of the model before it was adapted; see `digest_of`.
        folder, config: as `prepare_folder` made the one and took the other.
        comparison: see `finish`.

    Returns:
        The metrics; None in all processes but the main one.

    Raises:
        typer.Exit: the run was stopped; it left a checkpoint.
        TrainingError, CheckpointError, PrecisionError, DataError: see there.
    """
    train_set, test_set = data.data, tests.data
    console, main_process = Console(), PartialState().is_main_process
    display = Display(console, options.quiet or not main_process)
    display.say(
        f"{options.method} on {options.model}: {adapted.trained:,} parameters train, {adapted.trained_without_head:,} "
        f"of them outside the head. {len(train_set):,} images of {len(train_set.names)} classes to train on, "
        f"{len(test_set):,} to measure. Results go to {folder}."
    )
    if main_process:
        for note in splits.notes:
            display.warn(note)
        record_config(folder, config, {"data": splits.digest, "base": base}, options.resume)
    about = described(folder, IMAGES, f"timm/{options.model}", labels=train_set.names, **tests.prepare.form.config())
    task = Classification(tests, options.batch, options.workers, options.smoothing)
    shown: Images | Mixed = data
    if options.mixup or options.cutmix:
        shown = Mixed(data, options.mixup, options.cutmix, options.smoothing, adapted.base.num_classes)
    how = TrainOptions.of(options)
    sweep = find_rate(adapted, options.opt, shown, task, how) if options.find_lr else None
    if sweep is not None:
        display.say(sweep.told)
    with tracking(folder, options.trackers, config) as log:
        outcome = train(
            adapted, optimizer, reinit, shown, task, how, display=display, log=log,
            checkpoint_path=folder / CHECKPOINT, resume=options.resume,
        )  # fmt: skip
    if not main_process:
        return None
    if outcome.stopped:
        raise cli.stopped(console, outcome.stopped, outcome.progress.step, folder)
    measured = "the test images" if not options.validation else "training images that were held out"
    told = f"{len(train_set):,} images of {len(train_set.names)} classes, measured on {measured}."
    metrics = finish(
        folder,
        adapted,
        outcome,
        {
            **outcome.evaluation.scores,
            "classes": len(train_set.names),
            "train_images": len(train_set),
            "test_images": len(test_set),
            "unreadable_images": splits.unreadable,
            "measured_on": "validation" if options.validation else "test",
        },
        config,
        f"{options.method.shown} on {Path(options.data).name}",
        f"{options.method.shown} on {Path(options.model).name}, {told}",
        comparison=comparison,
        sweep=sweep,
        **about,
        **sections(tests, outcome.evaluation),
    )
    display.say(f"accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.3f}. Report: {folder / 'report.html'}")
    return metrics
