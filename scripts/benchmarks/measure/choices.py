"""What the options of the benchmarks can be, without what takes seconds to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

import typer

DEFAULT_METHODS = "floor,linear,uora-16,uora-64,uora-256,uora-256/4,uora-1024,lora-8,lora-16,vera-256,full"
LABELS = {
    "floor": "frozen floor",
    "linear": "linear head",
    "uora": "UORA r{}",
    "lora": "PEFT LoRA r{}",
    "vera": "PEFT VeRA r{}",
    "full": "full fine-tuning",
}
RANKED, PEFT = ("uora", "lora", "vera"), ("lora", "vera")
LLAMAS = {  # hidden, intermediate, layers, heads, heads of keys and values, words
    "Llama 134M": (576, 1536, 30, 9, 3, 49152),
    "Llama 1.1B": (2048, 5632, 22, 32, 4, 32000),
    "Llama 7B": (4096, 11008, 32, 32, 32, 32000),
}
VITS = {"ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224", "ViT-H/14": "vit_huge_patch14_224",
        "ViT-g/14": "vit_giant_patch14_224"}  # fmt: skip
PATCH = 16
"""Pixels of a patch, where a vision transformer of any size is made."""


class Dtype(StrEnum):
    """Types of weights and products."""

    fp32 = "fp32"
    bf16 = "bf16"
    autocast = "autocast-bf16"


@dataclass(frozen=True)
class Method:
    """A way to train: its kind (a key of `LABELS`), the rank, for those that have one, and UORA's token sampling."""

    kind: str
    rank: int | None = None
    sampling: int = 1

    @property
    def name(self) -> str:
        name = self.kind if self.rank is None else f"{self.kind}-{self.rank}"
        return name if self.sampling == 1 else f"{name}/{self.sampling}"

    @property
    def label(self) -> str:
        return LABELS[self.kind].format(self.rank) + ("" if self.sampling == 1 else f", 1 token of {self.sampling}")


def parse_methods(text: str) -> list[Method]:
    """Methods by their names, the floor before all others.

    Raises:
        typer.BadParameter: a name is unknown, or its rank is missing.
    """
    methods = [Method("floor")]
    for name in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([a-z]+)(?:-([1-9]\d*))?(?:/([1-9]\d*))?", name)
        known = match is not None and match[1] in LABELS and (match[1] in RANKED) == (match[2] is not None)
        if match is None or not known or (match[3] and match[1] != "uora"):
            raise typer.BadParameter(
                f"no method {name!r}; there are floor, linear, full, and uora-R, lora-R, vera-R of any rank R, such as "
                "uora-256; uora-256/4 takes the gradients from one token of 4"
            )
        methods.append(Method(match[1], int(match[2]) if match[2] else None, int(match[3] or 1)))
    return list(dict.fromkeys(methods))


def numbers(text: str) -> list[int]:
    """`1,10,100` as numbers.

    Raises:
        typer.BadParameter: they are not whole numbers above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"{text!r} must be whole numbers above 0, separated by commas, such as 1,10,100")
    return [int(part) for part in parts]
