"""Toy restaurants in the form of the E2E NLG challenge, and a tiny GPT-2 that knows their words: the demo's data."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ..command.choices import Method
from ..command.options import Defaults
from .toy import _learn, word_tokenizer

FIRST = ["Blue", "Golden", "Green", "Old", "Silver", "Red", "Royal", "Quiet"]
SECOND = ["Spice", "Curry", "Mill", "Vaults", "Punter", "Wrestlers", "Plough", "Olive"]
CHOICES = {
    "eatType": ["pub", "restaurant", "cafe"],
    "food": ["Chinese", "Italian", "French", "Indian", "English", "Japanese"],
    "priceRange": ["cheap", "moderate", "high"],
    "area": ["riverside", "centre"],
    "familyFriendly": ["yes", "no"],
}
SPOKEN = {  # ways to say it; the first sentence of a text holds name and type
    "food": ("it serves {} food .", "you can eat {} food there .", "its kitchen is {} ."),
    "priceRange": ("its prices are {} .", "it has {} prices .", "you pay {} prices ."),
    "area": ("it is in the {} area .", "you find it in the {} .", "it stands in the {} ."),
    "yes": ("families are welcome .", "children are welcome .", "it is good for families ."),
    "no": ("it is not for families .", "children are not welcome .", "families should not go ."),
}
OPENINGS = ("{name} is a {eatType} .", "there is a {eatType} called {name} .", "the {eatType} {name} is open .")
ROWS = {  # rank and learning rates for the demo
    Method.bitfit: Defaults(None, 0.01, 0.01),
    Method.lora: Defaults(4, 0.01, 0.01),
    Method.vera: Defaults(64, 0.1, 0.1),
    Method.vera_peft: Defaults(64, 0.1, 0.1),
    Method.uora: Defaults(64, 0.1, 0.1),
    Method.full: Defaults(None, 2e-3, 2e-3),
}
END = "[END]"

Restaurant = dict[str, str]


def restaurants(count: int, random: np.random.Generator) -> list[Restaurant]:
    """Name and type, and two to four of the other attributes."""
    out = []
    for _ in range(count):
        told = {"name": f"{random.choice(FIRST)} {random.choice(SECOND)}", "eatType": random.choice(CHOICES["eatType"])}
        others = list(CHOICES)[1:]
        kept = set(random.choice(others, random.integers(2, 5), replace=False))
        out.append({**told, **{name: str(random.choice(CHOICES[name])) for name in others if name in kept}})
    return out


def meaning(restaurant: Restaurant) -> str:
    """As the challenge's files have it."""
    return ", ".join(f"{name}[{value}]" for name, value in restaurant.items())


def sentences(restaurant: Restaurant, way: int) -> str:
    """One of three ways to tell all of it."""
    parts = [OPENINGS[way].format(**restaurant)]
    for name, value in list(restaurant.items())[2:]:
        parts.append(SPOKEN[value if name == "familyFriendly" else name][way].format(value))
    return " ".join(parts)


def write(folder: Path, seed: int, train: int = 100, test: int = 60) -> None:
    """`trainset.csv` and `testset_w_refs.csv`, every restaurant told in the second and the third way."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("trainset", train), ("testset_w_refs", test)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["mr", "ref"])
            out.writerows((meaning(r), sentences(r, way)) for r in restaurants(count, random) for way in (1, 2))


def pretrain(folder: Path, seed: int, linearise: Callable[[str], str], count: int = 1500, epochs: int = 8) -> None:
    """A GPT-2 of 0.1M parameters that tells data in the first way, and has read the other ways without their data.

    Args:
        linearise: from the challenge's form of a meaning to what a model reads.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed + 1)
    told = restaurants(count, random)
    first = [f"{linearise(meaning(r))} {END} {sentences(r, 0)} {END}" for r in told]
    free = [f"{END} {sentences(r, 1 + n % 2)} {END}" for n, r in enumerate(told[: count // 2])]
    texts = first + free
    tokenizer = word_tokenizer(texts, ("[UNK]", "[PAD]", END))
    tokenizer.eos_token = END
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=96, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    begun = (inputs["input_ids"] == tokenizer.eos_token_id).cumsum(1).roll(1, 1)  # marks so far, this one not counted
    begun[:, 0] = inputs["input_ids"][:, 0] == tokenizer.eos_token_id
    labels = inputs["input_ids"].masked_fill((begun == 0) | (inputs["attention_mask"] == 0), -100)

    def loss(rows: Tensor) -> Tensor:
        chosen = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
        return model(**chosen, labels=labels[rows]).loss

    _learn(model, loss, len(texts), epochs=epochs, lr=3e-3, batch=32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
