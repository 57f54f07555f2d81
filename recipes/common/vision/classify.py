"""What the recipes that classify images have in common, from their options to the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from accelerate import PartialState
from rich.console import Console
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter
from typer import Option

import uora_vision as uora

from ..command import cli
from ..command.display import Display
from ..command.options import MethodChoice, RunChoice, TrainChoice
from ..data.images import ImageSet, load_images, parse_classes
from ..data.loading import Images
from ..report.results import finish
from ..training.folder import CHECKPOINT, record_config
from ..training.loop import TrainOptions, train
from ..training.methods import MethodOptions, apply_method
from .evaluation import Classification, sections


@dataclass(frozen=True, kw_only=True)
class ImageChoice(RunChoice, TrainChoice, MethodChoice):
    """Which images, and which model learns them."""

    data: Annotated[str, Option(help="cifar100, digits, a folder, or a data set on the Hugging Face hub")] = "cifar100"
    model: Annotated[str, Option(help="a timm model, or local-dir:FOLDER")] = "vit_small_patch16_224"
    classes: Annotated[str | None, Option(help="only these classes: 60-99 or apple,bear")] = None
    shots: Annotated[int | None, Option(min=1, help="training images per class; all by default")] = None
    validation: Annotated[
        float, Option(min=0, max=0.9, help="evaluate on this share of the training images, held out")
    ] = 0
    keep_head: Annotated[bool, Option("--keep-head", help="train on from the model's own head")] = False


def load_sets(options: ImageChoice) -> tuple[ImageSet, ImageSet]:
    """Images to train on, and images to measure.

    Raises:
        DataError: see `load_images`.
    """
    classes = parse_classes(options.classes)
    train_set = load_images(options.data, "train", classes)
    if options.validation:
        train_set, test_set = train_set.split(options.validation, options.seed)
    else:
        test_set = load_images(options.data, "test", classes)
    if options.shots:
        train_set = train_set.few_shot(options.shots, options.seed)
    return train_set, test_set


def train_images(
    options: ImageChoice,
    chosen: MethodOptions,
    backbone: nn.Module,
    data: Images,
    tests: Images,
    folder: Path,
    config: dict[str, Any],
    comparison: list[dict[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """Adapt a model to images by the chosen method, measure it, and write the results.

    Args:
        chosen: the method with its rank and rates.
        data, tests: to train on, and to measure.
        folder, config: as `prepare_folder` made the one and took the other.
        comparison: see `finish`.

    Returns:
        The metrics; None in all processes but the main one.

    Raises:
        typer.Exit: the run was stopped; it left a checkpoint.
        MethodError, TrainingError, CheckpointError, PrecisionError, DataError: see there.
    """
    steps, seconds = options.cadence
    train_set, test_set = data.data, tests.data
    adapted = apply_method(backbone, chosen)
    if adapted.is_uora:
        uora.verify(backbone, data[0, 0][0][None])

    console, main_process = Console(), PartialState().is_main_process
    display = Display(console, options.quiet or not main_process)
    display.say(
        f"{options.method} on {options.model}: {adapted.trained:,} parameters train, {adapted.trained_without_head:,} "
        f"of them outside the head. {len(train_set):,} images of {len(train_set.names)} classes to train on, "
        f"{len(test_set):,} to measure. Results go to {folder}."
    )
    if main_process:
        record_config(folder, config)
    writer = SummaryWriter(str(folder / "tensorboard")) if main_process else None

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items() if writer else ():
            writer.add_scalar(name, value, step)

    outcome = train(
        adapted,
        data,
        Classification(tests, options.batch, options.workers),
        TrainOptions(
            epochs=options.epochs,
            batch=options.batch,
            warmup=options.warmup,
            optimizer=options.opt,
            clip=options.clip,
            precision=options.precision,
            workers=options.workers,
            seed=options.seed,
            eval_every=options.eval_every,
            checkpoint_steps=steps,
            checkpoint_seconds=seconds,
            max_steps=options.max_steps,
            max_seconds=options.max_seconds,
        ),
        display=display,
        log=log,
        checkpoint_path=folder / CHECKPOINT,
        resume=options.resume,
    )
    if writer:
        writer.close()
    if not main_process:
        return None
    if outcome.stopped:
        raise cli.stopped(console, outcome.stopped, outcome.progress.step, folder)
    measured = "the test images" if not options.validation else "training images that were held out"
    about = f"{len(train_set):,} images of {len(train_set.names)} classes, measured on {measured}."
    metrics = finish(
        folder,
        adapted,
        outcome,
        {
            **outcome.evaluation.scores,
            "classes": len(train_set.names),
            "train_images": len(train_set),
            "test_images": len(test_set),
            "measured_on": "validation" if options.validation else "test",
        },
        config,
        f"{options.method} on {Path(options.data).name}",
        f"{options.method} on {Path(options.model).name}, {about}",
        comparison=comparison,
        **sections(tests, outcome.evaluation),
    )
    display.say(f"accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.3f}. Report: {folder / 'report.html'}")
    return metrics
