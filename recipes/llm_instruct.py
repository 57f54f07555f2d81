"""Teach a pretrained causal language model to follow instructions, or to chat.

    python recipes/llm_instruct.py --demo                                        # no data, no network
    python recipes/llm_instruct.py --model HuggingFaceTB/SmolLM2-135M            # Alpaca and model, downloaded once
    python recipes/llm_instruct.py --data records.json --model llama/ --load-in-4bit --gradient-checkpointing
    python recipes/llm_instruct.py --data chats.jsonl --method lora --output runs/chat
    python recipes/llm_instruct.py --serve --output runs/chat                    # talk to it, beside its base
    accelerate launch recipes/llm_instruct.py --precision bf16 ...               # several GPUs

Data has rows of `instruction`, `input` and `output` (or `response`), or of `messages`. Only answers count in the loss.
One run leaves metrics.json, report.html, samples.json, history.json, config.yaml, chat_template.jinja, adapter/ and
tensorboard/ in its output folder. Ctrl-C leaves a checkpoint, from which the same command with --resume goes on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common.command import cli
from common.command.choices import Method
from common.command.display import Display
from common.command.options import LR, PEFT_LR, Defaults, MethodChoice, RunChoice, TableChoice, TrainChoice
from common.errors import MethodError, ModelError, OutputError
from typer import Option

DEFAULTS = {
    Method.uora: Defaults(256, LR, 4e-3),
    Method.vera: Defaults(256, LR, 4e-3),
    Method.vera_peft: Defaults(256, PEFT_LR, 4e-3),
    Method.lora: Defaults(8, 4e-4, 4e-4),
    Method.linear: Defaults(None, 4e-4, 4e-4),
    Method.full: Defaults(None, 2e-5, 2e-5),
    Method.bitfit: Defaults(None, 1e-3, 1e-3),
}


@dataclass(frozen=True, kw_only=True)
class Options(RunChoice, TrainChoice, TableChoice, MethodChoice):
    demo: Annotated[bool, Option("--demo", help="toy questions, a tiny Llama, every method; needs nothing else")] = (
        False
    )
    serve: Annotated[bool, Option("--serve", help="chat with the finished run in --output, in a browser")] = False
    port: Annotated[int, Option(min=0, max=65535, help="of --serve, on this machine only")] = 8000
    data: Annotated[str, Option(help="a data set on the hub, or a json, jsonl, csv or parquet file")] = (
        "yahma/alpaca-cleaned"
    )
    model: Annotated[str, Option(help="a causal language model on the Hugging Face hub, or a folder")] = (
        "HuggingFaceTB/SmolLM2-135M"
    )
    max_length: Annotated[
        int | None, Option(min=4, help="tokens per example, 1024 by default; longer ones lose their end")
    ] = None
    validation: Annotated[float, Option(min=0, max=0.9, help="measure on this share of the data, held out")] = 0.1
    packing: Annotated[bool, Option("--packing", help="several examples in a row of --max-length tokens")] = False
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="less memory, about a third more time")
    ] = False
    load_in_4bit: Annotated[bool, Option("--load-in-4bit", help="the frozen weights in nf4, by bitsandbytes")] = False
    samples: Annotated[int, Option(min=0, help="held-out prompts to answer before and after training")] = 6
    max_new_tokens: Annotated[int, Option(min=1, help="longest answer to write")] = 128
    epochs: Annotated[int, Option(min=1, help="passes over the training data")] = 3
    batch: Annotated[int, Option(min=1, help="examples per step, over all processes")] = 16


if __name__ == "__main__":
    options = cli.parse(Options, __doc__)  # first of all: what is imported below takes seconds

import torch
from accelerate import PartialState
from common.data.tables import hold_out, load_table, shuffled
from common.language import chat, toy
from common.language.answers import generate, held_out_loss, perplexity
from common.language.dialogues import (
    TEMPLATE_FILE,
    Messages,
    encode,
    prepare_template,
    prompt_ids,
    question,
    read_dialogues,
)
from common.language.models import load_model, load_tokenizer, longest
from common.language.sft import make_trainer
from common.report.page import Sheet
from common.report.results import compare, finish
from common.training.about import described
from common.training.digests import digest_of
from common.training.folder import CONFIG, METRICS, prepare_folder, record_config, write_json, write_text
from common.training.loop import make_optimizer
from common.training.methods import AdaptedModel, apply_method
from common.training.trainer import arguments, fit
from datasets import Dataset
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorForSeq2Seq

import uora_vision as uora
from uora_vision.predict.tasks import GENERATION


def run(options: Options, comparison: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """Train and measure; returns the metrics, or None where there are none to tell."""
    if options.serve:
        return serve(options)
    if options.demo:
        return demo(options)
    chosen = options.method_options(DEFAULTS)
    config = cli.plain(options) | {"rank": chosen.rank, "lr": chosen.lr, "head_lr": chosen.head_lr}
    folder = prepare_folder(options.output, options.resume, f"instruct-{options.method}", config)
    main_process = PartialState().is_main_process
    console = Console()
    display = Display(console, options.quiet or not main_process)

    # The data: what to train on, and what to measure.
    table = load_table(options.data, "train", names=options.column_names)
    dialogues, incomplete = read_dialogues(table, options.data)
    numbers = Dataset.from_dict({"number": range(len(dialogues))})
    train_part, test_part = (
        [dialogues[n] for n in part["number"]] for part in hold_out(numbers, options.validation, options.seed)
    )

    # The model, and the data as it reads them.
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(options.model)
    template = prepare_template(tokenizer)
    model = load(options, tokenizer)
    base = digest_of(model)
    limit = longest(model, None, sys.maxsize)
    length = longest(model, options.max_length, 1024)
    train_set = encode(train_part, tokenizer, length, f"the training part of {options.data}")
    test_set = encode(test_part, tokenizer, length, f"the held-out part of {options.data}")

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
    if adapted.is_uora:
        example = torch.tensor([train_set.rows[0]["input_ids"]], device=model.device)
        uora.verify(model, {"input_ids": example, "use_cache": False})
    if chosen.informs:
        rows = train_set.rows.select_columns(["input_ids", "labels"])
        uora.inform(model, shuffled(rows, DataCollatorForSeq2Seq(tokenizer), options.batch, options.seed))
    optimizer = make_optimizer(adapted, options.opt)
    reinit = None
    if chosen.redraws:
        reinit = uora.Reinitializer(
            model, optimizer=optimizer, scope=chosen.scope.value, threshold=chosen.threshold,
            relative=chosen.relative, alpha=chosen.alpha, every=chosen.every,
        )  # fmt: skip
    about = described(
        folder, GENERATION, f"transformers/{options.model}", columns=["instruction"], chat_template=template,
        max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    left_out = incomplete + train_set.left_out + test_set.left_out
    display.say(
        f"{options.method} on {options.model}: {adapted.trained:,} parameters train. {len(train_set.rows):,} examples "
        f"to train on, {len(test_set.rows):,} to measure{trimmed(train_set.cut + test_set.cut, left_out, length)}. "
        f"Results go to {folder}."
    )
    if main_process:
        content = digest_of([*train_set.rows, *test_set.rows])
        record_config(folder, config, {"data": content, "base": base}, options.resume)
        write_text(folder / TEMPLATE_FILE, template)

    def measure() -> dict[str, float]:
        loss = held_out_loss(adapted.base, test_set.rows, tokenizer.pad_token_id, options.batch, options.precision)
        return {"loss": loss, "perplexity": perplexity(loss)}

    def answer(shown: list[Messages]) -> list[str]:
        prompts = [prompt_ids(turns[:-1], tokenizer) for turns in shown]
        return generate(adapted.base, prompts, tokenizer, options.max_new_tokens, limit, options.precision)

    shown = with_room([test_part[n] for n in test_set.kept], tokenizer, limit, options.samples)
    before, first_answers = measure(), answer(shown) if main_process else []
    display.say(f"before training: loss {before['loss']:.4f}, perplexity {before['perplexity']:.4g}")

    def make(**parts: Any) -> Any:
        settings = arguments(
            options, folder, max_length=length, packing=options.packing, eval_packing=False,
            gradient_checkpointing=options.gradient_checkpointing,
            **({} if options.packing else {"train_sampling_strategy": "group_by_length"}),
        )  # fmt: skip
        return make_trainer(
            adapted, settings, options.precision, train_dataset=train_set.rows, eval_dataset=test_set.rows,
            processing_class=tokenizer, **parts,
        )  # fmt: skip

    def scores(found: dict[str, float]) -> dict[str, float]:
        return {"loss": found["loss"], "perplexity": perplexity(found["loss"])}

    outcome = fit(adapted, optimizer, reinit, options, folder, make, scores, ("loss", "perplexity"), display)
    if not main_process:
        return None
    if outcome.stopped:
        raise cli.stopped(console, outcome.stopped, outcome.progress.step, folder)
    texts = zip(shown, first_answers, answer(shown), strict=True)
    written = [
        {"prompt": question(turns), "expected": turns[-1]["content"], "before": first, "after": last}
        for turns, first, last in texts
    ]
    write_json(folder / "samples.json", written)
    trained_on = f"{len(train_set.rows):,} examples to train on, measured on {len(test_set.rows):,} that were held out"
    metrics = finish(
        folder, adapted, outcome,
        {
            **outcome.evaluation.scores, **{f"{name}_before": value for name, value in before.items()},
            "train_examples": len(train_set.rows), "test_examples": len(test_set.rows),
            "cut": train_set.cut + test_set.cut, "left_out": left_out, "max_length": length,
        },
        config, f"{options.method.shown} on {Path(options.data).name}",
        f"{options.method.shown} on {Path(options.model).name}, {trained_on}"
        f"{trimmed(train_set.cut + test_set.cut, left_out, length)}.",
        score="loss", comparison=comparison, **about, tables=[sheet(written)] if written else [],
    )  # fmt: skip
    display.say(
        f"held-out loss {before['loss']:.4f} before, {metrics['loss']:.4f} after; perplexity "
        f"{before['perplexity']:.4g} before, {metrics['perplexity']:.4g} after. Report: {folder / 'report.html'}"
    )
    return metrics


def load(options: Options, tokenizer: Any) -> Any:
    """The model on its device, in float32, or its weights in 4 bits.

    Raises:
        ModelError: it cannot be loaded, or bitsandbytes is missing.
        MethodError: 4-bit weights cannot train.
    """
    device = PartialState().device
    if not options.load_in_4bit:
        return load_model(AutoModelForCausalLM, options.model, tokenizer).to(device)
    if options.method is Method.full:
        raise MethodError("--method full cannot train weights of --load-in-4bit; leave one of them out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("--load-in-4bit needs the package bitsandbytes: pip install bitsandbytes")
    kind = torch.bfloat16 if options.precision == "bf16" else torch.float32
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=kind, bnb_4bit_use_double_quant=True
    )
    return load_model(
        AutoModelForCausalLM, options.model, tokenizer, quantization_config=quantised, device_map={"": device}
    )


def with_room(dialogues: list[Messages], tokenizer: Any, limit: int, count: int) -> list[Messages]:
    """The first of them whose prompts leave room for an answer."""
    found: list[Messages] = []
    for turns in dialogues:
        if len(found) == count:
            break
        if len(prompt_ids(turns[:-1], tokenizer)) < limit:
            found.append(turns)
    return found


def trimmed(cut: int, left_out: int, length: int) -> str:
    """What happened to examples that are too long, in words."""
    told = f"; {cut:,} of more than {length} tokens lose their end" if cut else ""
    return told + (f"; {left_out:,} have no answer, or none within {length} tokens, and are left out" * bool(left_out))


def sheet(written: list[dict[str, str]]) -> Sheet:
    """What the model wrote, for the report."""
    caption = "Held-out prompts; the likeliest token at each step. All of it is in samples.json."
    return Sheet("Before and after", list(written[0]), [list(row.values()) for row in written], caption)


def serve(options: Options) -> None:
    """Answer in a browser from a finished run, beside its base.

    Raises:
        OutputError: there is none in --output, or the port is taken.
    """
    folder = options.output
    if folder is None or not (folder / METRICS).is_file():
        raise OutputError(f"--serve needs --output FOLDER with a finished run; {folder or 'none'} is not one")
    with chat.listen(options.port) as door:
        known = {f.name for f in dataclasses.fields(Options)}
        kept = cli.read_yaml(folder / CONFIG, known)
        made = Options(**(kept | {"method": Method(kept["method"]), "reinit": options.reinit, "output": folder}))
        adapted, tokenizer, off = restore(made, folder)
        limit = longest(adapted.base, None, sys.maxsize)
        talk = chat.Talk(adapted.base, tokenizer, off, options.max_new_tokens, limit, made.precision)
        Display(Console(), options.quiet).say(f"{made.method} on {made.model}. Ctrl-C ends it.")
        chat.serve(talk, door, f"{made.method.shown} on {Path(made.model).name}")


def restore(options: Options, folder: Path) -> tuple[AdaptedModel, Any, dict[torch.nn.Parameter, torch.Tensor]]:
    """The trained model of a run, its tokenizer, and for what was trained the values that make it the base again."""
    tokenizer = load_tokenizer(options.model)
    prepare_template(tokenizer, folder)
    model = load(options, tokenizer)
    chosen = options.method_options(DEFAULTS)
    if options.method in (Method.uora, Method.vera):
        uora.load(model, folder / "adapter")
        off = {adapter.b: torch.zeros_like(adapter.b) for adapter in uora.adapters(model).values()}
        return AdaptedModel(model, model, [], chosen), tokenizer, off
    torch.manual_seed(options.seed)
    adapted = apply_method(model, chosen)
    off = {p: p.detach().clone() for p in adapted.model.parameters() if p.requires_grad}
    adapted.model.load_state_dict(load_file(folder / "adapter" / "trained.safetensors"), strict=False)
    return adapted, tokenizer, off


def demo(options: Options) -> dict[str, Any] | None:
    """A tiny Llama has read about animals; it learns to answer questions about them, by every method."""
    folder = prepare_folder(options.output, False, "instruct-demo")
    display = Display(Console(), options.quiet)
    display.say(f"Pretraining a tiny Llama on stories of {len(toy.ANIMALS)} animals.")
    toy.pretrain_lm(folder / "backbone", toy.stories(options.seed), options.seed)
    data = toy.write_instructions(folder / "data", options.seed)
    display.say("Teaching it to answer questions about them. A quarter of the questions is held out.")
    base = dataclasses.replace(
        options, demo=False, data=str(data), model=str(folder / "backbone"), validation=0.25, epochs=10, batch=16,
        eval_every=5, max_new_tokens=12, quiet=True, checkpoint_every="0",
    )  # fmt: skip
    return compare(run, base, toy.LM_ROWS, folder, display, "loss")


if __name__ == "__main__":
    sys.exit(cli.main(run, options))
