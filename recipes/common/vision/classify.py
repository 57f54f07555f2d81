"""What the recipes of images have in common: reading the images, and what comes after adapting a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from rich.console import Console

import uora_vision as uora
from uora_vision.cli.page import label, show
from uora_vision.predict.frames import SUFFIXES
from uora_vision.predict.image_table import is_table
from uora_vision.predict.tasks import IMAGES, LABELS, NUMBERS, RANKS

from ..command import cli
from ..command.choices import Target
from ..command.display import Display
from ..command.options import ImageChoice
from ..data.images import parse_classes
from ..data.labelled import in_order, load_labelled
from ..data.loading import Images
from ..data.mixing import Mixed
from ..data.splits import Splits, load_splits
from ..errors import DataError
from ..report.results import finish
from ..training.about import described
from ..training.find_rate import find_rate
from ..training.folder import CHECKPOINT, record_config
from ..training.loop import train
from ..training.methods import AdaptedModel
from ..training.parts import TrainOptions
from ..training.tracking import tracking
from .balance import balanced_chances
from .evaluation import ImageTask
from .intervals import intervals, per_part, sheets


class Kind(NamedTuple):
    """A task: as the hub names it, and what its images have."""

    hub: str
    thing: str
    things: str


KINDS = {
    Target.classification: Kind(IMAGES, "class", "classes"),
    Target.multilabel: Kind(LABELS, "label", "labels"),
    Target.regression: Kind(NUMBERS, "target", "targets"),
    Target.ordinal: Kind(RANKS, "class", "classes"),
}


def load_sets(options: ImageChoice) -> Splits:
    """Images to train on, and images to measure.

    Raises:
        DataError: see `load_labelled` and `load_splits`; labels or numbers are asked for, and not a table given.
    """
    if is_table(options.data):
        return load_labelled(options)
    if not options.task.one_class:
        raise DataError(f"--task {options.task} takes a table with --data, {', '.join(SUFFIXES)}, not {options.data}")
    for name in ("path_column", "target_columns", "split_column"):
        if getattr(options, name) is not None:
            raise DataError(f"--{name.replace('_', '-')} names a column of a table, and {options.data} is none")
    splits = load_splits(
        options.data, parse_classes(options.classes), validation=options.validation, shots=options.shots,
        seed=options.seed, strict=options.strict,
    )  # fmt: skip
    return in_order(splits, options.data, options.classes) if options.task is Target.ordinal else splits


def train_images(
    options: ImageChoice,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    reinit: uora.Reinitializer | None,
    data: Images,
    task: ImageTask,
    splits: Splits,
    base: str,
    folder: Path,
    config: dict[str, Any],
    comparison: list[dict[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """Train on images, measure, and write the results.

    Args:
        adapted, optimizer, reinit: what trains, and how; see `train`.
        data: to train on.
        task: what is learned of it, and measured.
        splits: what both were made of.
        base: digest of the model before it was adapted; see `digest_of`.
        folder, config: as `prepare_folder` made the one and took the other.
        comparison: see `finish`.

    Returns:
        The metrics; None in all processes but the main one.

    Raises:
        typer.Exit: the run was stopped; it left a checkpoint.
        TrainingError, CheckpointError, PrecisionError, DataError: see there.
    """
    train_set, test_set, tests = data.data, task.tests.data, task.tests
    kind = KINDS[options.task]
    what = f"{len(train_set.names)} {kind.thing if len(train_set.names) == 1 else kind.things}"
    console, main_process = Console(), PartialState().is_main_process
    display = Display(console, options.quiet or not main_process)
    display.say(
        f"{options.method} on {options.model}: {adapted.trained:,} parameters train, {adapted.trained_without_head:,} "
        f"of them outside the head. {len(train_set):,} images of {what} to train on, "
        f"{len(test_set):,} to measure. Results go to {folder}."
    )
    if main_process:
        for note in splits.notes:
            display.warn(note)
        record_config(folder, config, {"data": splits.digest, "base": base}, options.resume)
    about = described(folder, kind.hub, f"timm/{options.model}", **task.about(), **tests.prepare.form.config())
    shown: Images | Mixed = data
    if options.mixup or options.cutmix:
        shown = Mixed(data, options.mixup, options.cutmix, options.smoothing, adapted.base.num_classes)
    how = TrainOptions.of(options)
    if options.sampler == "balanced":
        how = dataclasses.replace(how, chances=balanced_chances(train_set.labels))
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
    evaluation, measured = outcome.evaluation, "images that were held out" if splits.held_out else "the test images"
    found = intervals(evaluation, options.seed)
    parts = per_part(evaluation, train_set.names, found)
    metrics = finish(
        folder,
        adapted,
        outcome,
        {
            **evaluation.scores,
            "intervals": found.scores,
            kind.things: len(train_set.names),
            "train_images": len(train_set),
            "test_images": len(test_set),
            "unreadable_images": splits.unreadable,
            "measured_on": "validation" if splits.held_out else "test",
            f"per_{kind.thing}": parts,
        },
        config,
        f"{options.method.shown} on {Path(options.data).name}",
        f"{options.method.shown} on {Path(options.model).name}, {len(train_set):,} images of {what}, measured on "
        f"{measured}.",
        score=task.measures[0],
        comparison=comparison,
        sweep=sweep,
        tables=sheets(evaluation, parts, found, kind.thing),
        **about,
        **task.sections(evaluation),
    )
    numbers = ", ".join(f"{label(name)} {show(name, metrics[name])}" for name in task.measures)
    display.say(f"{numbers}. Report: {folder / 'report.html'}")
    return metrics
