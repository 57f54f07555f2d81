"""What a language model makes of prompts: its loss on known answers, and answers of its own."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

MOST_ROWS = 8
"""In one forward without gradients: its logits are as large as the vocabulary."""


@contextlib.contextmanager
def answering(model: torch.nn.Module, precision: str = "no") -> Iterator[torch.device]:
    """No dropout, no gradients, and the precision of the run. Gives the device of the model."""
    device, training = next(model.parameters()).device, model.training
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, kind, enabled=kind is not None):
            yield device
    finally:
        model.train(training)


def held_out_loss(model: Any, rows: Dataset, padding: int, batch: int, precision: str = "no") -> float:
    """Mean negative log-likelihood of a token of the answers, over all of them and not by batch; in nats."""
    collate = DataCollatorForLanguageModeling(padding)
    batch, order = min(batch, MOST_ROWS), sorted(range(len(rows)), key=lambda n: len(rows[n]["input_ids"]))
    state, total, count = PartialState(), 0.0, 0
    mine = order[state.process_index :: state.num_processes]
    with answering(model, precision) as device:
        for start in range(0, len(mine), batch):
            chosen = rows.select(mine[start : start + batch]).select_columns(["input_ids", "labels"])
            inputs = {name: value.to(device) for name, value in collate(list(chosen)).items()}
            labels = inputs.pop("labels")[:, 1:].flatten()
            logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            total += cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    sums = gather_object([(total, count)])
    return sum(part for part, _ in sums) / max(1, sum(part for _, part in sums))


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def generate(
    model: PreTrainedModel, prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, new: int, limit: int,
    precision: str = "no",
) -> list[str]:  # fmt: skip
    """An answer to each prompt, the likeliest token at each step, at most `new` tokens and `limit` with the prompt."""
    texts = []
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    with answering(model, precision) as device:
        for ids in prompts:
            asked = torch.tensor([ids], device=device)
            found = model.generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False, num_beams=1, use_cache=True,
                max_new_tokens=min(new, limit - len(ids)), pad_token_id=tokenizer.pad_token_id,
                eos_token_id=list({*ends, tokenizer.eos_token_id}),
            )  # fmt: skip
            texts.append(tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True).strip())
    return texts
