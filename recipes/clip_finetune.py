"""Fine-tune a model of images and texts (CLIP, SigLIP): on classes named by prompts, or on images with captions.

    python recipes/clip_finetune.py --demo                                          # no data, no network
    python recipes/clip_finetune.py --classes 0-49 --shots 16                       # CIFAR-100, ViT-B-32 of open_clip
    python recipes/clip_finetune.py --data photos/ --template "a photo of a {}, a type of pet" --text-tower frozen
    python recipes/clip_finetune.py --model hf:google/siglip-base-patch16-224 --pairs pairs.csv --text-column caption
    python recipes/clip_finetune.py --pairs "shards/*.tar" --image-tower full --last 2 --train-logit-scale
    accelerate launch recipes/clip_finetune.py --precision bf16 ...                 # several GPUs

Measured before and after: zero-shot accuracy on the classes, and on those that are not trained, to see what is
forgotten; or recall of images by texts and of texts by images. One run leaves metrics.json, report.html, history.json,
adapter/, tensorboard/ and, of classes, prompts.json in its output folder. Ctrl-C leaves a checkpoint, from which the
same command with --resume goes on, to the same weights as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common.command import cli
from common.command.choices import Augment, Domain, Method, Tower
from common.command.display import Display
from common.command.options import MethodChoice, MethodOptions, RunChoice, TableChoice, TrainChoice
from common.errors import DataError
from typer import Option


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice, TrainChoice, TableChoice, MethodChoice):
    demo: Annotated[bool, Option("--demo", help="digits, a tiny CLIP and every method; needs nothing else")] = False
    model: Annotated[
        str, Option(help="a model of open_clip (also hf-hub:NAME, local-dir:FOLDER), hf:NAME of transformers, a folder")
    ] = "ViT-B-32"
    pretrained: Annotated[str, Option(help="weights of a model that open_clip names: a tag or a file")] = (
        "laion2b_s34b_b79k"
    )
    data: Annotated[str, Option(help="cifar100, digits, a folder, or a data set on the Hugging Face hub")] = "cifar100"
    classes: Annotated[str | None, Option(help="train on only these classes: 60-99 or apple,bear")] = None
    shots: Annotated[int | None, Option(min=1, help="training images per class; all by default")] = None
    template: Annotated[str, Option(help="text of a class; {} is its name")] = "a photo of a {}"
    names: Annotated[str | None, Option(help="what to call the classes: a,b,... or a file with a name per line")] = None
    pairs: Annotated[
        str | None, Option(help="images with texts, not classes: a table, tar shards, a folder of train and test files")
    ] = None
    image_column: Annotated[str, Option(help="of a table of pairs: path or bytes")] = "image"
    text_column: Annotated[str, Option(help="of a table of pairs")] = "text"
    strict: Annotated[bool, Option("--strict", help="stop at an image or pair of no use; else it is left out")] = False
    validation: Annotated[
        float, Option(min=0, max=0.9, help="measure on this share of the training images, held out")
    ] = 0
    augment: Annotated[Augment, Option(help="random changes of training images")] = Augment.flip
    image_tower: Annotated[Tower | None, Option(help="what trains there; by default what the method does")] = None
    text_tower: Annotated[Tower | None, Option(help="what trains there; by default what the method does")] = None
    last: Annotated[int | None, Option(min=1, help="only so many last blocks of each tower; all by default")] = None
    train_logit_scale: Annotated[bool, Option("--train-logit-scale", help="and SigLIP's bias")] = False
    strengths: Annotated[
        str, Option(help="shares of a UORA adapter to measure with, where classes are left out; none: ''")
    ] = "0.25,0.5,0.75"
    head_lr: Annotated[
        float | None, Option(min=0, help="of a tower that trains in full beside an adapter, and of the logit scale")
    ] = None


if __name__ == "__main__":
    options = cli.parse(Options, __doc__)  # first of all: what is imported below takes seconds

import torch
from accelerate import Accelerator, PartialState
from common.data.augment import DomainShift, ModelInput
from common.data.images import ImageSet, load_images, parse_classes
from common.data.loading import Batches, Images, train_loader
from common.data.splits import Splits, join, match, readable
from common.report import strength
from common.report.page import Sheet
from common.report.results import compare, finish
from common.training.about import described
from common.training.digests import digest_of
from common.training.folder import CHECKPOINT, prepare_folder, record_config, write_json
from common.training.loop import make_optimizer, train
from common.training.machine import make_accelerator
from common.training.methods import AdaptedModel
from common.training.parts import TrainOptions
from common.training.tracking import tracking
from common.vision.evaluation import sections
from common.vision_language.contrastive import Matching, Naming, prompts, zero_shot
from common.vision_language.pairs import PairImages, Pairs, load_pairs
from common.vision_language.strengths import along, parse_strengths
from common.vision_language.towers import DEFAULTS, Towers, adapt_towers, plan_towers, trains, with_whole_parts
from rich.console import Console
from torch.utils.data import Dataset

import uora_vision as uora
from uora_vision.predict.dual import Dual, Tokens, load_dual
from uora_vision.predict.tasks import CLIP

WAYS = {"": "", "image_to_text_": "image to text, ", "text_to_image_": "text to image, "}


@dataclass
class Work:
    """What a run learns and measures.

    Args:
        train: what to train on.
        task: loss and measurement.
        score: the metric to compare methods by.
        sizes: numbers of examples, for the metrics.
        about: the data in words.
        example: (images, tokens) of one batch.
        others: images and texts of classes that are not trained.
    """

    train: Dataset
    task: Naming | Matching
    score: str
    sizes: dict[str, Any]
    about: str
    example: tuple[torch.Tensor, Tokens]
    others: tuple[Images, Tokens] | None = None


@dataclass(frozen=True)
class Classes:
    """Labelled images: to train and measure on, and of the classes that are left out; the text of each class."""

    splits: Splits
    others: ImageSet | None
    texts: list[str]


def run(options: Options, comparison: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """Train and measure; returns the metrics, or None where there are none to tell."""
    if options.demo:
        return demo(options)
    console = Console()
    chosen = options.method_options(DEFAULTS)
    shares = parse_strengths(options.strengths)
    config = cli.plain(options) | {"rank": chosen.rank, "lr": chosen.lr, "head_lr": chosen.head_lr}
    folder = prepare_folder(options.output, options.resume, f"clip-{options.method}", config)
    main_process = PartialState().is_main_process
    display = Display(console, options.quiet or not main_process)

    # The data: what to train on, and what to measure.
    prompts(options.template, ())
    data = read_classes(options) if options.pairs is None else read_pairs(options, display)

    # The model, and what of it trains.
    torch.manual_seed(options.seed)
    dual = load_dual(options.model, options.pretrained)
    base = digest_of(dual.model)
    towers = Towers(options.image_tower, options.text_tower, options.last, options.train_logit_scale)
    adapted = adapt(dual, chosen, towers)
    work = class_work(options, data, dual) if isinstance(data, Classes) else pair_work(options, *data, dual)
    if adapted.is_uora:
        uora.verify(dual.model, dual.example(*work.example))
    adapted.model.to(PartialState().device)
    if chosen.informs:
        batches = train_loader(work.train, Batches(len(work.train), options.batch, 1, options.seed), options.workers)
        uora.inform(dual.model, batches, lambda _, batch: work.task.loss(adapted.model, batch)[0])
    optimizer = make_optimizer(adapted, options.opt)
    reinit = None
    if chosen.redraws:
        reinit = uora.Reinitializer(
            dual.model, optimizer=optimizer, scope=chosen.scope.value, threshold=chosen.threshold,
            relative=chosen.relative, alpha=chosen.alpha, every=chosen.every,
        )  # fmt: skip
    display.say(
        f"{options.method} on {options.model}: {adapted.trained:,} parameters train. {work.about} Results go to "
        f"{folder}."
    )
    if main_process:
        for note in data.splits.notes if isinstance(data, Classes) else ():
            display.warn(note)
        content = data.splits.digest if isinstance(data, Classes) else digest_of([data[0].digest, data[1].digest])
        record_config(folder, config, {"data": content, "base": base}, options.resume)

    about = described(
        folder, CLIP, *dual.source, template=options.template, **dual.form.config(),
        labels=data.splits.test.names if isinstance(data, Classes) else None,
        prompts=data.texts if isinstance(data, Classes) else None,
    )  # fmt: skip
    accelerator = make_accelerator(options.precision)
    before = measure(work, dual, accelerator, options)
    display.say("before: " + told(before))
    with tracking(folder, options.trackers, config) as log:
        outcome = train(
            adapted, optimizer, reinit, work.train, work.task, TrainOptions.of(options), display=display, log=log,
            checkpoint_path=folder / CHECKPOINT, resume=options.resume,
        )  # fmt: skip
    if outcome.stopped:
        if not main_process:
            return None
        raise cli.stopped(console, outcome.stopped, outcome.progress.step, folder)
    after = measure(work, dual, accelerator, options, outcome.evaluation.scores)
    points: strength.Points = []
    if adapted.is_uora and work.others is not None and not towers.whole:
        points = along(shares, dual.model, lambda: measure(work, dual, accelerator, options), before, after)
    if not main_process:
        return None
    if points:
        keys = ("strength", "accuracy", "other_accuracy")
        write_json(folder / "strengths.json", [dict(zip(keys, point, strict=True)) for point in points])
    if isinstance(data, Classes):
        names = dict(zip(data.splits.test.names, data.texts, strict=True))
        write_json(folder / "prompts.json", {"template": options.template, "prompts": names})
    shown = sections(work.task.tests, outcome.evaluation) if isinstance(work.task, Naming) else {}
    metrics = finish(
        folder,
        adapted,
        outcome,
        {**after, **{f"{key}_before": value for key, value in before.items()}, **work.sizes},
        config,
        f"{options.method.shown} on {Path(options.pairs or options.data).name}",
        f"{options.method.shown} on {Path(options.model).name}, {work.about}",
        score=work.score,
        comparison=comparison,
        **about,
        tables=[sheet(before, after), *([strength.sheet(points)] if points else [])],
        pictures=[strength.picture(points)] if points else [],
        **shown,
    )
    display.say(f"after: {told(after)}. Report: {folder / 'report.html'}")
    return metrics


def adapt(dual: Dual, chosen: MethodOptions, towers: Towers) -> AdaptedModel:
    """Adapt the towers by UORA, with one bank of random matrices for both, or by a method to compare it with.

    Raises:
        MethodError: the method and what is asked of the towers do not go together, or nothing would train.
        uora.UoraError: an option of the adapter is wrong, or nothing matches `targets`.
    """
    plan = plan_towers(dual, chosen, towers)
    if chosen.method is not Method.uora:
        return adapt_towers(dual, chosen, plan)
    uora.inject(
        dual.model, rank=chosen.rank, targets=plan.targets, seed=chosen.seed, init=chosen.init,
        token_sampling=chosen.token_sampling,
    )  # fmt: skip
    groups = uora.param_groups(
        dual.model, lr=chosen.lr, head_lr=chosen.head_lr, weight_decay=chosen.weight_decay,
        layer_decay=chosen.layer_decay,
    )  # fmt: skip
    return with_whole_parts(dual, chosen, plan, groups)


def read_classes(options: Options) -> Classes:
    """Labelled images and the text of every class.

    Raises:
        DataError: nothing usable, fewer than two classes to tell apart, or another number of names than of classes.
    """
    whole, tests = load_images(options.data, "train"), load_images(options.data, "test")
    wanted, every, others, notes = parse_classes(options.classes), whole.names, None, ()
    spoken = called(options, every)
    if wanted is not None:
        whole = whole.keep_classes(wanted)
        left = tuple(name for name in every if name not in whole.names)
        if len(left) > 1:
            seen = readable(tests.as_classes(left), options.strict)
            others = seen.data if len(seen.data) else None
            notes = tuple(f"{why}; it is left out" for why in seen.reasons)
    if options.validation:
        whole, tests = whole.split(options.validation, options.seed)
    else:
        tests = match(whole, tests, options.data, wanted is not None)
    if options.shots is not None:
        whole = whole.few_shot(options.shots, options.seed)
    splits = join(readable(whole, options.strict), readable(tests, options.strict), options.data)
    splits = dataclasses.replace(splits, notes=(*splits.notes, *notes))
    if others is not None:
        others = dataclasses.replace(others, names=tuple(spoken[name] for name in others.names))
    return Classes(splits, others, prompts(options.template, [spoken[name] for name in splits.test.names]))


def called(options: Options, names: tuple[str, ...]) -> dict[str, str]:
    """What to call each class."""
    if options.names is None:
        return dict(zip(names, names, strict=True))
    path = Path(options.names)
    given = path.read_text(encoding="utf-8").splitlines() if path.is_file() else options.names.split(",")
    given = [name.strip() for name in given if name.strip()]
    if len(given) != len(names):
        raise DataError(f"--names gives {len(given)} names, the data has {len(names)} classes: {', '.join(names[:8])}")
    return dict(zip(names, given, strict=True))


def class_work(options: Options, data: Classes, dual: Dual) -> Work:
    shift, plain = DomainShift(Domain.none), ModelInput(dual.form)
    train_set, test_set = data.splits.train, data.splits.test
    train_images = Images(train_set, shift, ModelInput(dual.form, options.augment), options.seed)
    tokens = dual.tokenize(data.texts)
    others = None
    if data.others is not None:
        others = Images(data.others, shift, plain), dual.tokenize(prompts(options.template, data.others.names))
    task = Naming(
        dual, Images(test_set, shift, plain), tokens, not trains(dual, "text"), options.batch, options.workers
    )
    measured = "held-out training images" if options.validation else "test images"
    sizes = {
        "classes": len(train_set.names),
        "other_classes": len(data.others.names) if data.others else 0,
        "train_images": len(train_set),
        "test_images": len(test_set),
        "unreadable_images": data.splits.unreadable,
        "measured_on": "validation" if options.validation else "test",
    }
    about = f"{len(train_set):,} images of {len(train_set.names)} classes, measured on {len(test_set):,} {measured}."
    return Work(train_images, task, "accuracy", sizes, about, (train_images[0, 0][0][None], tokens), others)


def read_pairs(options: Options, display: Display) -> tuple[Pairs, Pairs, bool]:
    assert options.pairs is not None
    columns = options.image_column, options.text_column
    found = load_pairs(options.pairs, columns, options.validation, options.seed, options.strict, options.column_names)
    left_out = list(dict.fromkeys(why for pairs in found[:2] for why in pairs.left_out))
    if left_out:
        display.warn(f"{len(left_out)} pairs are left out, since they cannot be used; {left_out[0]}")
    return found


def pair_work(options: Options, train_set: Pairs, test_set: Pairs, held: bool, dual: Dual) -> Work:
    train_images, test_images = (
        PairImages(pairs, dual.tokenize(pairs.texts), ModelInput(dual.form, augment), options.seed)
        for pairs, augment in ((train_set, options.augment), (test_set, Augment.none))
    )
    task = Matching(dual, test_images, options.batch, options.workers)
    sizes = {
        "train_pairs": len(train_set),
        "test_pairs": len(test_set),
        "left_out_pairs": len(dict.fromkeys([*train_set.left_out, *test_set.left_out])),
        "measured_on": "validation" if held else "test",
    }
    measured = "that were held out" if held else "to measure on"
    about = f"{len(train_set):,} pairs to train on, {len(test_set):,} {measured}."
    image, tokens, _ = train_images[0, 0]
    return Work(
        train_images, task, "recall_1", sizes, about, (image[None], {key: value[None] for key, value in tokens.items()})
    )


def measure(
    work: Work, dual: Dual, accelerator: Accelerator, options: Options, scores: dict[str, float] | None = None
) -> dict[str, float]:
    """What the task measures, if it is not known yet, and the accuracy on classes that are not trained."""
    if scores is None:
        dual.to(accelerator.device)
        scores = work.task.evaluate(dual, accelerator).scores
    if work.others is None:
        return dict(scores)
    found = zero_shot(dual, *work.others, accelerator, options.batch, options.workers)
    return {**scores, "other_accuracy": found.scores["accuracy"]}


def told(scores: dict[str, float]) -> str:
    words = {"accuracy": "zero-shot accuracy", "other_accuracy": "on other classes", "recall_1": "recall@1",
             "recall_5": "recall@5"}  # fmt: skip
    return ", ".join(f"{word} {scores[key]:.1%}" for key, word in words.items() if key in scores)


def sheet(before: dict[str, float], after: dict[str, float]) -> Sheet:
    words = {
        "accuracy": "zero-shot, trained classes",
        "other_accuracy": "zero-shot, other classes",
        **{f"{way}recall_{k}": f"{word}recall@{k}" for way, word in WAYS.items() for k in (1, 5)},
    }
    rows: list[list[Any]] = [
        [word, f"{before[key]:.1%}", f"{after[key]:.1%}"] for key, word in words.items() if key in before
    ]
    note = "What the other classes lose was forgotten." if "accuracy" in before else "Without a way: the mean of both."
    return Sheet("Before and after", ["measure", "before", "after"], rows, note)


def demo(options: Options) -> dict[str, Any] | None:
    """A tiny CLIP learns the digits 0 to 4 and is adapted to 5 to 9 by every method."""
    from common.vision_language.demo import NEW, OLD, ROWS, SHOTS, TEMPLATE, WORDS, pretrain

    folder = prepare_folder(options.output, False, "clip-demo")
    display = Display(Console(), options.quiet)
    display.say(f"Pretraining a tiny CLIP on the digits {OLD} (8 x 8 pixels, from scikit-learn) and their names.")
    model = pretrain(folder / "backbone", options.seed, display)
    display.say(f"Adapting it to the digits {NEW}, {SHOTS} images of each. 290 test images leave 3 points of chance.")
    base = dataclasses.replace(
        options, demo=False, data="digits", model=model, classes=NEW, shots=SHOTS, template=TEMPLATE, pairs=None,
        names=",".join(WORDS), augment=Augment.none, epochs=30, batch=25, eval_every=5, quiet=True,
    )  # fmt: skip
    return compare(run, base, ROWS, folder, display)


if __name__ == "__main__":
    sys.exit(cli.main(run, options))
