"""Teach a pretrained causal language model to put data into words: the E2E NLG challenge, about restaurants.

    python recipes/e2e_nlg.py --demo                                      # no data, no network
    python recipes/e2e_nlg.py --model gpt2-medium                         # data and model, downloaded once
    python recipes/e2e_nlg.py --data e2e-dataset/ --model gpt2/ --method lora   # trainset.csv, testset_w_refs.csv
    python recipes/e2e_nlg.py --data e2e-dataset/ --train-split validation ...  # where there is no training file
    accelerate launch recipes/e2e_nlg.py --precision bf16 ...             # several GPUs

Meaning representations are written out as in the LoRA paper (`name : Blue Spice | Type : coffee shop | ...`), only the
reference counts in the loss, and the test's are put into words by beam search once, at the end. One run leaves
metrics.json, report.html, generations.json, history.json, config.yaml, adapter/ and tensorboard/ in its output folder.
Ctrl-C leaves a checkpoint, from which the same command with --resume goes on.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from common.command import cli
from common.command.choices import Method
from common.command.display import Display
from common.command.options import LR, PEFT_LR, Defaults, MethodChoice, RunChoice, TableChoice, TrainChoice
from common.errors import DataError, ModelError
from typer import Option

DEFAULTS = {
    Method.uora: Defaults(1024, LR, 2e-2),
    Method.vera: Defaults(1024, LR, 2e-2),
    Method.vera_peft: Defaults(1024, PEFT_LR, 2e-2),
    Method.lora: Defaults(4, 1e-3, 1e-3),
    Method.linear: Defaults(None, 1e-3, 1e-3),
    Method.full: Defaults(None, 5e-5, 5e-5),
    Method.bitfit: Defaults(None, 1e-3, 1e-3),
}
COLUMNS = (("mr", "ref"), ("meaning_representation", "human_reference"), ("meaning_representation", "target"))
"""Meaning and reference: in the challenge's files, and in two data sets on the hub."""
WRITTEN = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
SHOWN = 12
"""Samples in the report."""


class Split(StrEnum):
    train = "train"
    validation = "validation"
    test = "test"


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice, TrainChoice, TableChoice, MethodChoice):
    demo: Annotated[bool, Option("--demo", help="toy restaurants, a tiny GPT-2, every method; needs nothing else")] = (
        False
    )
    data: Annotated[str, Option(help="a data set on the hub, or a folder with trainset.csv and testset_w_refs.csv")] = (
        "tuetschek/e2e_nlg"
    )
    train_split: Annotated[Split, Option(help="what to train on")] = Split.train
    test_split: Annotated[Split, Option(help="what to measure on")] = Split.test
    model: Annotated[str, Option(help="a causal language model on the Hugging Face hub, or a folder")] = "gpt2-medium"
    max_length: Annotated[
        int | None, Option(min=4, help="tokens per training example, 512 by default; longer ones are left out")
    ] = None
    examples: Annotated[int | None, Option(min=1, help="training examples, drawn by --seed; all by default")] = None
    meanings: Annotated[int | None, Option(min=1, help="to measure on, drawn by --seed; all by default")] = None
    targets: Annotated[str, Option(help="projections to adapt: attention+mlp, attention, qv, ...")] = "qv"
    beams: Annotated[int, Option(min=1, help="of the beam search; 1 for the likeliest token at each step")] = 10
    length_penalty: Annotated[float, Option(help="of the beam search; more is longer")] = 0.9
    no_repeat_ngram: Annotated[int, Option(min=0, help="write no n tokens twice; 0 to allow it")] = 4
    max_new_tokens: Annotated[int, Option(min=1, help="longest text to write")] = 64
    generate_batch: Annotated[int, Option(min=1, help="texts to write at a time, per process")] = 16
    epochs: Annotated[int, Option(min=1, help="passes over the training data")] = 5
    batch: Annotated[int, Option(min=1, help="examples per step, over all processes")] = 8


@dataclass(frozen=True)
class Meaning:
    """What is to be said, and how people said it."""

    text: str
    references: list[str]


if __name__ == "__main__":
    options = cli.parse(Options, __doc__)  # first of all: what is imported below takes seconds

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from common.data.tables import load_table, need_columns, shuffled
from common.language import toy_restaurants
from common.language.generation_metrics import score_texts
from common.language.models import load_model, load_tokenizer, longest
from common.report.page import Sheet
from common.report.results import compare, finish
from common.training.about import described
from common.training.digests import digest_of
from common.training.folder import prepare_folder, record_config, write_json
from common.training.loop import make_optimizer
from common.training.methods import AdaptedModel, apply_method
from common.training.trainer import arguments, careful, fit
from datasets import Dataset
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

import uora_vision as uora
from uora_vision.predict.frames import as_text
from uora_vision.predict.tasks import GENERATION
from uora_vision.predict.texts import no_repeats


def run(options: Options, comparison: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """Train and measure; returns the metrics, or None where there are none to tell."""
    if options.demo:
        return demo(options)
    chosen = options.method_options(DEFAULTS)
    config = cli.plain(options) | {"rank": chosen.rank, "lr": chosen.lr, "head_lr": chosen.head_lr}
    folder = prepare_folder(options.output, options.resume, f"e2e-{options.method}", config)
    main_process = PartialState().is_main_process
    console = Console()
    display = Display(console, options.quiet or not main_process)

    # The data: what to train on, and what to measure.
    pairs, meanings = load_data(options)
    pairs = draw(pairs, options.examples, options.seed)
    meanings = draw(meanings, options.meanings, options.seed)

    # The model, and the data as it reads them.
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(options.model)
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {options.model!r} has no end token, so no text would ever end; set one")
    tokenizer.padding_side = "right"  # as training needs it, whatever the model's files say
    model = load_model(AutoModelForCausalLM, options.model, tokenizer)
    base = digest_of(model)
    prompts = [prompt_ids(m.text, tokenizer) for m in meanings]
    check_room(prompts, options.max_new_tokens, longest(model, None, sys.maxsize), options.data)
    length = longest(model, options.max_length, 512)
    train_set, left_out = encode(pairs, tokenizer, length, options.data)
    told = [(m.text, ref) for m in meanings for ref in m.references]
    test_set, _ = encode(told, tokenizer, length, options.data)

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
    about = described(
        folder, GENERATION, f"transformers/{options.model}", columns=["meaning"], prompt_end="eos",
        max_new_tokens=options.max_new_tokens, num_beams=options.beams, length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram,
    )  # fmt: skip
    collate = DataCollatorForSeq2Seq(tokenizer)
    if adapted.is_uora:
        uora.verify(model, dict(collate([features(train_set, 0)])))
    if chosen.informs:
        rows = train_set.select_columns(["input_ids", "attention_mask", "labels"])
        uora.inform(model, shuffled(rows, collate, options.batch, options.seed))
    optimizer = make_optimizer(adapted, options.opt)
    reinit = None
    if chosen.redraws:
        reinit = uora.Reinitializer(
            model, optimizer=optimizer, scope=chosen.scope.value, threshold=chosen.threshold,
            relative=chosen.relative, alpha=chosen.alpha, every=chosen.every,
        )  # fmt: skip
    display.say(
        f"{options.method} on {options.model}: {adapted.trained:,} parameters train. {len(train_set):,} texts to train "
        f"on, {len(meanings):,} meanings with {len(told):,} references to measure"
        + (f"; {left_out:,} texts of more than {length} tokens are left out" if left_out else "")
        + f". Results go to {folder}."
    )
    if main_process:
        record_config(folder, config, {"data": digest_of([*train_set, *test_set]), "base": base}, options.resume)

    def make(**parts: Any) -> Trainer:
        settings = arguments(
            options, folder, train_sampling_strategy="group_by_length", length_column_name="length",
            prediction_loss_only=True,
        )  # fmt: skip
        return careful(Trainer, adapted)(
            args=TrainingArguments(**settings), train_dataset=train_set, eval_dataset=test_set, data_collator=collate,
            processing_class=tokenizer, **parts,
        )  # fmt: skip

    outcome = fit(adapted, optimizer, reinit, options, folder, make, lambda m: {"loss": m["loss"]}, ("loss",), display)
    if outcome.stopped:
        if main_process:
            raise cli.stopped(console, outcome.stopped, outcome.progress.step, folder)
        return None
    display.say(f"Putting {len(meanings):,} meanings into words, {options.beams} beams each.")
    with PartialState().split_between_processes(prompts) as mine:
        texts = gather_object(generate(adapted.base, mine, tokenizer, options))
    if not main_process:
        return None
    scores = score_texts(texts, [m.references for m in meanings])
    written = [{**dataclasses.asdict(m), "written": text} for m, text in zip(meanings, texts, strict=True)]
    write_json(folder / "generations.json", written)
    data = f"{len(train_set):,} texts to train on, measured on {len(meanings):,} meanings of {options.test_split}."
    metrics = finish(
        folder, adapted, outcome,
        {
            **scores, **outcome.evaluation.scores, "train_examples": len(train_set), "left_out": left_out,
            "test_meanings": len(meanings), "test_references": len(told),
        },
        config, f"{options.method.shown} on {Path(options.data).name}",
        f"{options.method.shown} on {Path(options.model).name}, {data}",
        score="bleu", comparison=comparison, **about, tables=[samples(written)],
    )  # fmt: skip
    shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items() if value is not None)
    display.say(f"{shown}, loss {metrics['loss']:.3f}. Report: {folder / 'report.html'}")
    return metrics


def load_data(options: Options) -> tuple[list[tuple[str, str]], list[Meaning]]:
    """Meanings and texts to train on, and meanings with all of their references to measure.

    Raises:
        DataError: there is nothing to train on, or it would be measured on its own training data.
    """
    source = Path(options.data)
    if options.train_split is options.test_split or source.is_file():
        raise DataError(
            f"{options.data} would be trained on and measured alike; give a folder with files for two splits, and "
            "different --train-split and --test-split"
        )
    try:
        pairs = load_pairs(options.data, options.train_split, options.column_names)
    except DataError as error:
        if source.is_dir() and str(error).startswith("no train file"):
            raise DataError(f"{error}; --train-split validation trains on the development set") from error
        raise
    groups: dict[str, list[str]] = {}
    for text, reference in load_pairs(options.data, options.test_split, options.column_names):
        groups.setdefault(text, []).append(reference)
    return pairs, [Meaning(text, references) for text, references in groups.items()]


def load_pairs(source: str, split: Split, names: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Meanings, written out, and references.

    Args:
        names: of the columns of a file without header.

    Raises:
        DataError: there are none, or not in the form of the challenge.
    """
    table = load_table(source, split.value, names=names)
    columns = next((pair for pair in COLUMNS if set(pair) <= set(table.column_names)), COLUMNS[0])
    need_columns(table, columns, f"the {split} split of {source}")
    references = [[text] for text in table[columns[1]]]
    if "references" in table.column_names:  # of GEM: all that a meaning has, in one row; empty for training
        references = [list(more) or own for more, own in zip(table["references"], references, strict=True)]
    pairs = []
    for number, (meaning, texts) in enumerate(zip(table[columns[0]], references, strict=True), 1):
        linear = linearise(as_text(meaning))
        if not linear or not all(map(as_text, texts)):
            what = (
                f"{columns[0]} {as_text(meaning)!r}, expected name[Blue Spice], area[riverside], ..."
                if not linear
                else ""
            )
            raise DataError(f"row {number} of the {split} split of {source} has {what or f'an empty {columns[1]}'}")
        pairs += [(linear, as_text(text)) for text in texts]
    return pairs


def linearise(meaning: str) -> str:
    """`name[Blue Spice], eatType[pub]` as `name : Blue Spice | Type : pub`, as the LoRA paper does it."""
    fields = re.findall(r"(\w[\w ]*)\[([^\]]*)\]", meaning)
    return " | ".join(f"{WRITTEN.get(name, name)} : {value}" for name, value in fields)


def draw(items: list[Any], count: int | None, seed: int) -> list[Any]:
    """So many of them, drawn by `seed`, in their order."""
    if count is None or count >= len(items):
        return items
    return [items[n] for n in np.sort(np.random.default_rng(seed).permutation(len(items))[:count])]


def prompt_ids(text: str, tokenizer: Any) -> list[int]:
    """A meaning, and the end token as the mark after which its text begins."""
    ids, end = tokenizer(text)["input_ids"], tokenizer.eos_token_id
    return ids if ids and ids[-1] == end else [*ids, end]


def encode(pairs: list[tuple[str, str]], tokenizer: Any, length: int, source: str) -> tuple[Dataset, int]:
    """Token ids with labels for the references alone, and how many examples were too long and left out: cut ones would
    teach to end in the middle.

    Raises:
        DataError: all are too long.
    """
    prompts = {text: prompt_ids(text, tokenizer) for text, _ in pairs}
    rows, lengths = [], []
    for text, reference in pairs:
        prompt = prompts[text]
        answer = [*tokenizer(" " + reference, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        lengths.append(len(prompt) + len(answer))
        if lengths[-1] <= length:
            rows.append({
                "input_ids": prompt + answer, "attention_mask": [1] * lengths[-1],
                "labels": [-100] * len(prompt) + answer, "length": lengths[-1],
            })  # fmt: skip
    if not rows:
        raise DataError(
            f"all {len(pairs)} examples of {source} are longer than {length} tokens, the shortest has {min(lengths)}; "
            "raise --max-length, or take a model with more positions"
        )
    return Dataset.from_list(rows), len(pairs) - len(rows)


def features(rows: Dataset, number: int) -> dict[str, list[int]]:
    """What of an example goes into the model."""
    return {name: rows[number][name] for name in ("input_ids", "attention_mask", "labels")}


def check_room(prompts: list[list[int]], new: int, limit: int, source: str) -> None:
    """Raise a DataError if a text might not fit behind its meaning."""
    most = max(map(len, prompts))
    if most + new > limit:
        raise DataError(
            f"a meaning of {source} has {most} tokens; with --max-new-tokens {new} that is more than the model's "
            f"{limit} positions; lower it, or take a model with more"
        )


def generate(model: Any, prompts: list[list[int]], tokenizer: Any, options: Options) -> list[str]:
    """A text for each prompt, by beam search."""
    model.eval()
    device, texts = next(model.parameters()).device, [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # little to pad
    for start in range(0, len(order), options.generate_batch):
        chosen = order[start : start + options.generate_batch]
        batch = tokenizer.pad({"input_ids": [prompts[n] for n in chosen]}, padding_side="left", return_tensors="pt")
        width = batch["input_ids"].shape[1]
        found = model.generate(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=options.max_new_tokens, do_sample=False, num_beams=options.beams,
            length_penalty=options.length_penalty, logits_processor=no_repeats(options.no_repeat_ngram, width),
            use_cache=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for n, ids in zip(chosen, found[:, width:], strict=True):
            texts[n] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts


def samples(written: list[dict[str, Any]]) -> Sheet:
    """Some meanings, evenly over the test, beside what people and the model said."""
    rows = [
        [entry["text"].replace(" | ", "\n"), "\n".join(entry["references"][:3]), entry["written"]]
        for entry in written[:: max(1, len(written) // SHOWN)][:SHOWN]
    ]
    caption = f"{len(rows)} of {len(written)} meanings, with up to three references; all are in generations.json."
    return Sheet("What the model wrote", ["meaning", "references", "written"], rows, caption)


def demo(options: Options) -> dict[str, Any] | None:
    """A tiny GPT-2 tells data of toy restaurants in one way; it learns two others, by every method."""
    folder = prepare_folder(options.output, False, "e2e-demo")
    display = Display(Console(), options.quiet)
    display.say("Pretraining a tiny GPT-2 to tell the data of toy restaurants in one way.")
    toy_restaurants.pretrain(folder / "backbone", options.seed, linearise)
    toy_restaurants.write(folder / "restaurants", options.seed)
    display.say("Adapting it to two other ways. 60 meanings, 2 references each, to measure.")
    base = dataclasses.replace(
        options, demo=False, data=str(folder / "restaurants"), model=str(folder / "backbone"), targets="attention+mlp",
        epochs=10, batch=32, beams=2, max_new_tokens=32, generate_batch=60, eval_every=10, quiet=True,
        checkpoint_every="0",
    )  # fmt: skip
    return compare(run, base, toy_restaurants.ROWS, folder, display, "bleu")


if __name__ == "__main__":
    sys.exit(cli.main(run, options))
