"""Runs of the recipe of language models, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from common.language import toy
from common.language.dialogues import encode, prepare_template
from common.language.models import load_model, load_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

CHAT = [
    {"role": "system", "content": "the fox"}, {"role": "user", "content": "the owl lives"},
    {"role": "assistant", "content": "in the city ."}, {"role": "user", "content": "the bear"},
    {"role": "assistant", "content": "likes bread ."},
]  # fmt: skip


def pretrained(folder: Path) -> Path:
    """A Llama of 20k parameters that has hardly read anything."""
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        toy.pretrain_lm(folder, toy.stories(0, 128), 0, config, epochs=1)
    return folder


def questions(folder: Path) -> Path:
    """48 of them."""
    file = toy.write_instructions(folder, 0)
    file.write_text(json.dumps(json.loads(file.read_text())[:48]))
    return file


def loaded(folder: Path, dialogues: list[Any] | None = None) -> tuple[Any, Any, Any]:
    tokenizer = load_tokenizer(str(folder))
    prepare_template(tokenizer)
    rows = encode(dialogues or [CHAT], tokenizer, 64, "a test").rows
    return load_model(AutoModelForCausalLM, str(folder), tokenizer), tokenizer, rows
