"""TRL's SFTTrainer, as the recipe for language models uses it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from datasets import disable_progress_bars
from trl import SFTConfig, SFTTrainer

from ..training.methods import AdaptedModel
from ..training.trainer import careful
from .answers import held_out_loss

disable_progress_bars()


def make_trainer(adapted: AdaptedModel, settings: dict[str, Any], precision: str = "no", **parts: Any) -> SFTTrainer:
    """A trainer over rows that have `input_ids` and `labels`.

    It measures the loss per token of all held-out answers.
    """

    class AnswerTrainer(careful(SFTTrainer, adapted)):  # type: ignore[misc]
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            loss = held_out_loss(
                self.model, self.eval_dataset, self.processing_class.pad_token_id,
                self.args.per_device_eval_batch_size, precision,
            )  # fmt: skip
            self.log({"eval_loss": loss})
            return {"eval_loss": loss}

    with unquantised(adapted.model), warnings.catch_warnings():
        # Of the new name for gradient_checkpointing, which older versions do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return AnswerTrainer(args=SFTConfig(**settings), **parts)


@contextlib.contextmanager
def unquantised(model: torch.nn.Module) -> Iterator[None]:
    """Let a trainer take a model with a quantised base for a plain one.

    Trainer accepts trained vectors on a quantised base only as PEFT's, and SFTTrainer would round them to bfloat16.
    """
    marks = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
    held = [(m, name, m.__dict__[name]) for m in model.modules() for name in marks if m.__dict__.get(name)]
    for module, name, _ in held:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name, value in held:
            setattr(module, name, value)
