"""Teach a pretrained encoder a task of GLUE: classify sentences or pairs of sentences.

    python recipes/glue.py --demo                                         # no data, no network
    python recipes/glue.py --task sst2 --model roberta-base               # GLUE and RoBERTa, downloaded once
    python recipes/glue.py --task mrpc --model microsoft/deberta-v3-base --method lora
    python recipes/glue.py --task sst2 --data sst2/ --columns label,sentence --model minilm/   # files without header
    accelerate launch recipes/glue.py --precision bf16 ...                # several GPUs

Measured on the validation split, as is usual for GLUE, whose test labels are not public. One run leaves metrics.json,
report.html, history.json, config.yaml, adapter/ and tensorboard/ in its output folder. Ctrl-C leaves a checkpoint, from
which the same command with --resume goes on.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from common.command import cli
from common.command.choices import Method
from common.command.display import Display
from common.command.options import LR, PEFT_LR, Defaults, MethodChoice, RunChoice, TableChoice, TrainChoice
from common.errors import DataError
from typer import Option


class Task(StrEnum):
    cola = "cola"
    sst2 = "sst2"
    mrpc = "mrpc"
    qqp = "qqp"
    stsb = "stsb"
    mnli = "mnli"
    qnli = "qnli"
    rte = "rte"
    wnli = "wnli"


COLUMNS = {  # the texts of an example
    Task.cola: ("sentence",), Task.sst2: ("sentence",), Task.mrpc: ("sentence1", "sentence2"),
    Task.qqp: ("question1", "question2"), Task.stsb: ("sentence1", "sentence2"), Task.mnli: ("premise", "hypothesis"),
    Task.qnli: ("question", "sentence"), Task.rte: ("sentence1", "sentence2"), Task.wnli: ("sentence1", "sentence2"),
}  # fmt: skip
SCORES = {Task.cola: ("matthews",), Task.mrpc: ("f1", "accuracy"), Task.qqp: ("f1", "accuracy"),
          Task.stsb: ("pearson", "spearman")}  # fmt: skip
"""GLUE's own metrics, the first is the one to compare by; accuracy for the others."""
CLASSES = {
    Task.cola: ("unacceptable", "acceptable"), Task.sst2: ("negative", "positive"),
    Task.mrpc: ("not_equivalent", "equivalent"), Task.qqp: ("not_duplicate", "duplicate"),
    Task.mnli: ("entailment", "neutral", "contradiction"), Task.qnli: ("entailment", "not_entailment"),
    Task.rte: ("entailment", "not_entailment"), Task.wnli: ("not_entailment", "entailment"),
}  # fmt: skip
"""GLUE's names of its classes, by number."""
NUMBERED = {task: tuple(map(str, range(len(names)))) for task, names in CLASSES.items()}
DEFAULTS = {
    Method.uora: Defaults(256, LR, 4e-3),
    Method.vera: Defaults(256, LR, 4e-3),
    Method.vera_peft: Defaults(256, PEFT_LR, 4e-3),
    Method.lora: Defaults(8, 2e-3, 2e-3),
    Method.linear: Defaults(None, 4e-3, 4e-3),
    Method.full: Defaults(None, 1e-4, 1e-3),
    Method.bitfit: Defaults(None, 2e-3, 2e-3),
}


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice, TrainChoice, TableChoice, MethodChoice):
    demo: Annotated[bool, Option("--demo", help="toy reviews, a tiny model, every method; needs nothing else")] = False
    task: Annotated[Task, Option(help="of GLUE")] = Task.sst2
    data: Annotated[
        str, Option(help="a data set on the hub, or a folder with train.tsv and dev.tsv (or csv, json, ...)")
    ] = "nyu-mll/glue"
    model: Annotated[str, Option(help="an encoder on the Hugging Face hub, or a folder")] = "roberta-base"
    max_length: Annotated[int | None, Option(min=4, help="tokens per example; 128 by default, longer ones are cut")] = (
        None
    )
    shots: Annotated[int | None, Option(min=1, help="training examples per class; all by default")] = None
    validation: Annotated[float, Option(min=0, max=0.9, help="measure on this share of the training set, held out")] = 0
    epochs: Annotated[int, Option(min=1, help="passes over the training data")] = 3
    batch: Annotated[int, Option(min=1, help="examples per step, over all processes")] = 32


if __name__ == "__main__":
    options = cli.parse(Options, __doc__)  # first of all: what is imported below takes seconds

import numpy as np
import torch
from accelerate import PartialState
from common.data.labels import as_classes, as_values
from common.data.tables import hold_out, load_table, need_columns, shuffled
from common.language import toy
from common.language.models import load_model, load_tokenizer, longest
from common.report.results import compare, finish
from common.training.about import described
from common.training.digests import digest_of
from common.training.folder import prepare_folder, record_config
from common.training.loop import make_optimizer
from common.training.methods import AdaptedModel, apply_method
from common.training.trainer import arguments, careful, fit
from datasets import Dataset
from rich.console import Console
from torchmetrics.functional import accuracy, f1_score, matthews_corrcoef, pearson_corrcoef, spearman_corrcoef
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

import uora_vision as uora
from uora_vision.predict.frames import as_text
from uora_vision.predict.tasks import TEXTS, VALUES


def run(options: Options, comparison: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """Train and measure; returns the metrics, or None where there are none to tell."""
    if options.demo:
        return demo(options)
    chosen = options.method_options(DEFAULTS)
    config = cli.plain(options) | {"rank": chosen.rank, "lr": chosen.lr, "head_lr": chosen.head_lr}
    folder = prepare_folder(options.output, options.resume, f"{options.task}-{options.method}", config)
    main_process = PartialState().is_main_process
    console = Console()
    display = Display(console, options.quiet or not main_process)

    # The data: what to train on, and what to measure.
    train_set = load_examples(options, "train")
    if options.validation:
        train_set, test_set = hold_out(train_set, options.validation, options.seed)
    else:
        test_set = load_examples(options, "validation")
    regression = options.task is Task.stsb
    train_set, test_set, classes = with_labels(train_set, test_set, options)
    if options.shots is not None:
        train_set = few_shot(train_set, options.shots, options.seed)

    # The model, and the data as it reads them.
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(options.model)
    model = load_model(
        AutoModelForSequenceClassification, options.model, tokenizer, num_labels=len(classes),
        problem_type="regression" if regression else "single_label_classification",
    )  # fmt: skip
    base = digest_of(model)
    length = longest(model, options.max_length, 128)
    train_set, cut = tokenize(train_set, tokenizer, COLUMNS[options.task], length)
    test_set, _ = tokenize(test_set, tokenizer, COLUMNS[options.task], length)

    # What of it trains: by UORA, or by a method to compare it with.
    if chosen.method is Method.uora:
        uora.inject(
            model, rank=chosen.rank, targets=chosen.targets, seed=chosen.seed, init=chosen.init,
            token_sampling=chosen.token_sampling,
        )  # fmt: skip
        groups = uora.param_groups(
            model, lr=chosen.lr, head_lr=chosen.head_lr, weight_decay=chosen.weight_decay,
            layer_decay=chosen.layer_decay,
        )  # fmt: skip
        adapted = AdaptedModel(model, model, groups, chosen)
    else:
        adapted = apply_method(model, chosen)
    spoken = CLASSES[options.task] if not regression and classes == NUMBERED[options.task] else classes
    about = described(
        folder, VALUES if regression else TEXTS, f"transformers/{options.model}",
        labels=None if regression else spoken, columns=list(COLUMNS[options.task]), max_length=length,
    )  # fmt: skip
    collate = DataCollatorWithPadding(tokenizer)
    if adapted.is_uora:
        uora.verify(model, dict(collate([train_set[0], train_set[1]])))
    if chosen.informs:
        uora.inform(model, shuffled(train_set, collate, options.batch, options.seed))
    optimizer = make_optimizer(adapted, options.opt)
    reinit = None
    if chosen.redraws:
        reinit = uora.Reinitializer(
            model, optimizer=optimizer, scope=chosen.scope.value, threshold=chosen.threshold,
            relative=chosen.relative, alpha=chosen.alpha, every=chosen.every,
        )  # fmt: skip
    display.say(
        f"{options.method} on {options.model}: {adapted.trained:,} parameters train, {adapted.trained_without_head:,} "
        f"of them outside the head. {options.task}: {len(train_set):,} examples to train on, {len(test_set):,} to "
        "measure" + (f"; {cut:,} are cut to {length} tokens" if cut else "")
        + ("" if regression else f". Classes: {', '.join(classes)}") + f". Results go to {folder}."
    )  # fmt: skip
    if main_process:
        record_config(folder, config, {"data": digest_of([*train_set, *test_set]), "base": base}, options.resume)

    def make(**parts: Any) -> Trainer:
        settings = arguments(options, folder, train_sampling_strategy="group_by_length", length_column_name="length")
        return careful(Trainer, adapted)(
            args=TrainingArguments(**settings), train_dataset=train_set, eval_dataset=test_set, data_collator=collate,
            processing_class=tokenizer, compute_metrics=lambda found: measure(found, options.task), **parts,
        )  # fmt: skip

    names = SCORES.get(options.task, ("accuracy",))

    def scores(found: dict[str, float]) -> dict[str, float]:
        return {key: found[key] for key in (*names, "loss")}

    outcome = fit(adapted, optimizer, reinit, options, folder, make, scores, (*names, "loss"), display)
    if not main_process:
        return None
    if outcome.stopped:
        raise cli.stopped(console, outcome.stopped, outcome.progress.step, folder)
    measured = "the validation split" if not options.validation else "training examples that were held out"
    told = (
        f"{len(train_set):,} training examples of GLUE's {options.task}, measured on {len(test_set):,} of {measured}."
    )
    metrics = finish(
        folder, adapted, outcome,
        {**outcome.evaluation.scores, "train_examples": len(train_set), "test_examples": len(test_set)},
        config, f"{options.method.shown} on {options.task}",
        f"{options.method.shown} on {Path(options.model).name}, {told}",
        score=names[0], comparison=comparison, **about,
    )  # fmt: skip
    display.say(f"{names[0]} {metrics[names[0]]:.4f}, loss {metrics['loss']:.3f}. Report: {folder / 'report.html'}")
    return metrics


def load_examples(options: Options, split: str) -> Dataset:
    """The texts and labels of a split, with columns as GLUE has them."""
    table = load_table(options.data, split, config=options.task.value, names=options.column_names)
    need_columns(table, (*COLUMNS[options.task], "label"), options.data)
    table = table.select_columns([*COLUMNS[options.task], "label"])
    for number, texts in enumerate(zip(*(table[name] for name in COLUMNS[options.task]), strict=True), 1):
        if not any(map(as_text, texts)):
            told = " and no ".join(COLUMNS[options.task])
            raise DataError(f"row {number} of the {split} split of {options.data} has no {told}")
    return table


def with_labels(train_set: Dataset, test_set: Dataset, options: Options) -> tuple[Dataset, Dataset, tuple[str, ...]]:
    """Both with labels as the model is to give them, and the names of the classes: one for a value.

    Raises:
        DataError: see `as_classes` and `as_values`.
    """
    given = train_set["label"], test_set["label"]
    names: tuple[str, ...] = ("value",)
    labels: list[Any] = [as_values(part, options.data) for part in given] if options.task is Task.stsb else []
    if not labels:
        *labels, names = as_classes(*given, options.data, CLASSES[options.task])
    parts = (train_set, test_set)
    train_set, test_set = (
        part.remove_columns("label").add_column("label", own) for part, own in zip(parts, labels, strict=True)
    )
    return train_set, test_set, names


def few_shot(table: Dataset, shots: int, seed: int) -> Dataset:
    """At most `shots` examples of every class, drawn by `seed`."""
    labels = np.array(table["label"])
    order = np.random.default_rng(seed).permutation(len(labels))
    return table.select(np.sort(np.concatenate([order[labels[order] == c][:shots] for c in np.unique(labels)])))


def tokenize(table: Dataset, tokenizer: Any, columns: tuple[str, ...], length: int) -> tuple[Dataset, int]:
    """Token ids, labels and lengths, and how many examples were cut."""
    texts = [[as_text(text) for text in table[name]] for name in columns]
    whole = tokenizer(*texts)
    encoded = tokenizer(*texts, truncation=True, max_length=length)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    cut = sum(len(ids) > length for ids in whole["input_ids"])
    return Dataset.from_dict({**encoded, "label": table["label"], "length": lengths}), cut


def measure(found: Any, task: Task) -> dict[str, float]:
    """GLUE's metrics from (predictions, labels)."""
    logits, labels = torch.as_tensor(found.predictions), torch.as_tensor(found.label_ids)
    if task is Task.stsb:
        values = logits.squeeze(-1).double()
        return {
            "pearson": pearson_corrcoef(values, labels.double()).item(),
            "spearman": spearman_corrcoef(values, labels.double()).item(),
        }
    classes, guesses = logits.shape[-1], logits.argmax(-1)
    scores = {"accuracy": accuracy(guesses, labels, task="multiclass", num_classes=classes).item()}
    if task is Task.cola:
        scores["matthews"] = matthews_corrcoef(guesses, labels, task="binary").item()
    if task in (Task.mrpc, Task.qqp):
        scores["f1"] = f1_score(guesses, labels, task="binary").item()
    return scores


def demo(options: Options) -> dict[str, Any] | None:
    """A tiny BERT knows the opinions of toy reviews; it learns to tell the first of two from a few, by every method."""
    folder = prepare_folder(options.output, False, "glue-demo")
    display = Display(Console(), options.quiet)
    display.say("Pretraining a tiny BERT to count the good opinions in toy reviews.")
    toy.pretrain_encoder(folder / "backbone", options.seed)
    toy.write_reviews(folder / "data", options.seed)
    base = dataclasses.replace(
        options, demo=False, data=str(folder / "data"), model=str(folder / "backbone"), epochs=24, batch=16,
        eval_every=8, quiet=True, checkpoint_every="0",
    )  # fmt: skip
    return compare(run, base, toy.ENCODER_ROWS, folder, display, "accuracy")


if __name__ == "__main__":
    sys.exit(cli.main(run, options))
