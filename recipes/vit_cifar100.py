"""Teach a pretrained vision transformer the classes of CIFAR-100, or of any folder of images.

    python recipes/vit_cifar100.py --demo                                   # no data, no network, about a minute
    python recipes/vit_cifar100.py --model vit_base_patch16_224 --shots 10  # CIFAR-100, downloaded once
    python recipes/vit_cifar100.py --data photos/ --method lora             # photos/train/CLASS/*.jpg, photos/test/...
    accelerate launch recipes/vit_cifar100.py --precision bf16 ...          # several GPUs

One run leaves metrics.json, report.html, history.json, adapter/ and tensorboard/ in its output folder. Ctrl-C leaves a
checkpoint; the same command with --resume goes on from it, to the same weights as if nothing had happened.
"""

from __future__ import annotations

import re
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from common.augment import Augment, Domain, DomainShift, ModelInput
from common.backbone import ModelError, create_backbone, input_format
from common.checkpoint import CheckpointError
from common.data import DataError, load_images, parse_classes
from common.demo import run_demo
from common.display import Display
from common.loading import Images
from common.machine import PrecisionError
from common.methods import DEFAULTS, Method, MethodError, MethodOptions, Scope, apply_method
from common.results import CHECKPOINT, OutputError, finish, prepare_folder
from common.training import TrainingError, TrainOptions, train
from rich.console import Console
from torch.utils.tensorboard.writer import SummaryWriter

import uora_vision as uora

# Options that may change when a run is resumed: they do not change what it computes.
FREE = {"output", "resume", "workers", "checkpoint_every", "max_steps", "max_seconds", "quiet", "demo"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    demo: Annotated[
        bool, typer.Option("--demo", help="digits, a tiny model and every method; needs nothing else")
    ] = False,
    data: Annotated[
        str, typer.Option(help="cifar100, digits, a folder, or a data set on the Hugging Face hub")
    ] = "cifar100",
    model: Annotated[str, typer.Option(help="a timm model, or local-dir:FOLDER")] = "vit_small_patch16_224",
    method: Annotated[Method, typer.Option(help="what to train")] = Method.uora,
    rank: Annotated[int | None, typer.Option(help="of the adapter; by default 256, and 8 for lora")] = None,
    targets: Annotated[
        str, typer.Option(help="projections to adapt: attention+mlp, attention, qv, ...")
    ] = "attention+mlp",
    classes: Annotated[str | None, typer.Option(help="only these classes: 60-99 or apple,bear")] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="training images per class; all by default")] = None,
    domain: Annotated[Domain, typer.Option(help="a fixed change of every image, training and test")] = Domain.none,
    augment: Annotated[Augment, typer.Option(help="random changes of training images")] = Augment.flip,
    validation: Annotated[
        float, typer.Option(min=0, max=0.9, help="evaluate on this share of the training images, held out")
    ] = 0,
    keep_head: Annotated[bool, typer.Option("--keep-head", help="train on from the model's own head")] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch: Annotated[int, typer.Option(min=1, help="images per step, over all processes")] = 64,
    lr: Annotated[float | None, typer.Option(min=0, help="of the adapter; by default what the method wants")] = None,
    head_lr: Annotated[float | None, typer.Option(min=0, help="of the head")] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="of matrices; vectors never decay")] = 0.0,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="share of the steps")] = 0.1,
    opt: Annotated[str, typer.Option(help="an optimizer that timm knows")] = "adamw",
    clip: Annotated[float, typer.Option(min=0, help="largest norm of the gradient; 0 for none")] = 1.0,
    reinit: Annotated[Scope, typer.Option(help="uora: whom a re-drawn direction changes")] = Scope.shared,
    threshold: Annotated[float, typer.Option(min=0, help="uora: re-draw where |d| is below")] = 1e-5,
    relative: Annotated[
        bool, typer.Option("--relative/--absolute", help="uora: threshold times the layer's median |d|")
    ] = False,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="uora: share of the old direction that stays")] = 0.5,
    every: Annotated[int, typer.Option(min=1, help="uora: re-draw at every n-th step below the threshold")] = 1,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16")] = "no",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int, typer.Option(min=0, help="processes that read images")] = 0,
    eval_every: Annotated[int, typer.Option(min=1, help="epochs between evaluations")] = 1,
    output: Annotated[Path | None, typer.Option(help="folder for the results; by default a new one in runs/")] = None,
    checkpoint_every: Annotated[str, typer.Option(help="steps (500) or minutes (10m); 0 for only at the end")] = "10m",
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --output")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="stop there, with a checkpoint")] = None,
    max_seconds: Annotated[float | None, typer.Option(min=0, help="stop then, with a checkpoint")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but errors")] = False,
) -> None:
    console = Console()
    if demo:
        run_demo(prepare_folder(output, resume, "demo"), seed, Display(console, quiet))
        return
    defaults = DEFAULTS[method]
    rank = defaults.rank if rank is None or defaults.rank is None else rank
    lr = defaults.lr if lr is None else lr
    head_lr = defaults.head_lr if head_lr is None else head_lr
    every_steps, every_seconds = _cadence(checkpoint_every)
    config = {name: _plain(value) for name, value in locals().items() if name in CONFIG}
    folder = prepare_folder(output, resume, method.value)

    # The data: what to train on, and what to measure.
    chosen = parse_classes(classes)
    train_set = load_images(data, "train", chosen)
    if validation:
        train_set, test_set = train_set.split(validation, seed)
    else:
        test_set = load_images(data, "test", chosen)
    if shots is not None:
        train_set = train_set.few_shot(shots, seed)

    # The model, and what of it trains.
    torch.manual_seed(seed)
    backbone = create_backbone(model, len(train_set.names), keep_head)
    form = input_format(backbone)
    adapted = apply_method(
        backbone,
        MethodOptions(
            method=method,
            rank=rank,
            targets=targets,
            lr=lr,
            head_lr=head_lr,
            weight_decay=weight_decay,
            seed=seed,
            scope=reinit,
            threshold=threshold,
            relative=relative,
            alpha=alpha,
            every=every,
        ),
    )
    shift = DomainShift(domain)
    train_images = Images(train_set, shift, ModelInput(form, augment), seed)
    test_images = Images(test_set, shift, ModelInput(form))
    if adapted.is_uora:
        uora.verify(backbone, train_images[0, 0][0][None])

    main_process = PartialState().is_main_process
    display = Display(console, quiet or not main_process)
    display.say(
        f"{method} on {model}: {adapted.trained:,} parameters train, {adapted.trained_without_head:,} of them outside "
        f"the head. {len(train_set):,} images of {len(train_set.names)} classes to train on, {len(test_set):,} to "
        f"measure. Results go to {folder}."
    )
    writer = SummaryWriter(str(folder / "tensorboard")) if main_process else None

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items() if writer else ():
            writer.add_scalar(name, value, step)

    options = TrainOptions(
        epochs=epochs,
        batch=batch,
        warmup=warmup,
        optimizer=opt,
        clip=clip,
        precision=precision,
        workers=workers,
        seed=seed,
        eval_every=eval_every,
        checkpoint_steps=every_steps,
        checkpoint_seconds=every_seconds,
        max_steps=max_steps,
        max_seconds=max_seconds,
    )
    outcome = train(
        adapted,
        train_images,
        test_images,
        options,
        display=display,
        log=log,
        checkpoint_path=folder / CHECKPOINT,
        resume=resume,
        config={key: value for key, value in config.items() if key not in FREE},
    )
    if writer:
        writer.close()
    if outcome.stopped:
        if main_process:
            console.print(
                _how_to_resume(outcome.stopped, outcome.progress.step, folder), soft_wrap=True, highlight=False
            )
        raise typer.Exit(130 if outcome.stopped == "interrupted" else 0)
    if main_process:
        measured = "the test images" if not validation else "training images that were held out"
        about = (
            f"{method} on {model}, {len(train_set):,} images of {len(train_set.names)} classes, measured on {measured}."
        )
        sizes: dict[str, Any] = {
            "classes": len(train_set.names),
            "train_images": len(train_set),
            "test_images": len(test_set),
        }
        sizes["measured_on"] = "validation" if validation else "test"
        metrics = finish(folder, adapted, outcome, test_images, config, f"{method} on {Path(data).name}", about, sizes)
        display.say(f"accuracy {metrics['accuracy']:.2%}, loss {metrics['loss']:.3f}. Report: {folder / 'report.html'}")


def _plain(value: object) -> object:
    """An option as JSON and a checkpoint can hold it."""
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _cadence(text: str) -> tuple[int, float]:
    """`500` as (500 steps, 0 seconds), `10m` as (0 steps, 600 seconds)."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", text)
    if match is None:
        raise typer.BadParameter(f"--checkpoint-every takes steps such as 500 or minutes such as 10m, got {text!r}")
    return int(match[1] or 0), 60 * float(match[2] or 0)


def _how_to_resume(reason: str, step: int, folder: Path) -> str:
    line = shlex.join(word for word in sys.argv if word != "--resume")
    words = shlex.split(re.sub(r" --max-(steps|seconds)[ =]\S+", "", line))
    if "--output" not in " ".join(words):
        words += ["--output", str(folder)]
    return f"stopped after step {step} ({reason}). To go on: {shlex.join(['python', *words, '--resume'])}"


CONFIG = {name for name in main.__annotations__ if name not in ("return", "demo")}
ERRORS = (
    DataError,
    ModelError,
    MethodError,
    CheckpointError,
    OutputError,
    PrecisionError,
    TrainingError,
    uora.UoraError,
)


def run() -> int:
    """The command line, with errors of use as one line on stderr and exit code 2."""
    try:
        return app(standalone_mode=False) or 0
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
    except ERRORS as error:
        # A worker's error arrives with the worker's traceback; its last line is the message.
        message = re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1])
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run())
