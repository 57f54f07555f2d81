"""What a model computed, as answers: by softmax over classes, or as the task has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from .tasks import LABELS, NUMBERS, RANKS, Computed

CUTOFF = 0.5
"""Probability from which a label counts as there."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input.

    Args:
        answer: the name of the likeliest class; of several labels those that are there; of ordered classes the one in
            the middle of the probabilities, which errs by the fewest ranks; of a regression the value, or a tuple of
            them; of a language model the text.
        probability: of that class; None where there is not one class.
        probabilities: of every class, (classes,) float32, in the order of `Predictor.classes`. Those of several labels
            are independent of one another.
        embedding: what the head was given, (width,) float32, where asked for.
        classes: their names.
        values: of a regression of images, by the name of the target, in its own unit.
        rank: of ordered classes the one to be expected, as a number from 0.

    Example:
        >>> import torch, uora_vision as uora
        >>> found = uora.Prediction("dog", 0.75, torch.tensor([0.25, 0.75]), classes=("cat", "dog"))
        >>> found.top(2)
        [('dog', 0.75), ('cat', 0.25)]
    """

    answer: str | float | tuple[str, ...] | tuple[float, ...]
    probability: float | None = None
    probabilities: Tensor | None = None
    embedding: Tensor | None = None
    classes: tuple[str, ...] = ()
    values: Mapping[str, float] | None = None
    rank: float | None = None

    def top(self, count: int) -> list[tuple[str, float]]:
        """The likeliest classes with their probabilities, the likeliest first."""
        if self.probabilities is None:
            return []
        best = self.probabilities.sort(descending=True, stable=True)
        values, places = best.values[:count].tolist(), best.indices[:count].tolist()
        return [(self.classes[place], value) for place, value in zip(places, values, strict=True)]


def answers(computed: Computed, task: str, classes: Sequence[str], about: Mapping[str, Any]) -> list[Prediction]:
    """What was computed for each input.

    Args:
        task: as the hub names it.
        classes: their names; empty where the task has none.
        about: `preprocessing` of the adapter.

    Raises:
        FormatError: the model has not the outputs that the adapter tells of.
    """
    count = len(computed.texts) if computed.logits is None else len(computed.logits)
    kept: list[Tensor | None] = [None] * count if computed.features is None else list(computed.features)
    if computed.logits is None:
        return [Prediction(text, embedding=e) for text, e in zip(computed.texts, kept, strict=True)]
    logits = computed.logits
    if task == NUMBERS:
        return _numbers(logits, about, kept)
    if task == RANKS:
        return _ranks(logits, tuple(classes), kept)
    if not classes:
        return [Prediction(float(row[0]), embedding=e) for row, e in zip(logits, kept, strict=True)]
    if (outputs := logits.shape[1]) < len(classes):  # there may be more, as of a head that was kept
        raise FormatError(f"there are names of {len(classes)} classes, and the model tells {outputs} apart")
    names = (*classes, *(f"output {i}" for i in range(len(classes), outputs)))
    if task == LABELS:
        cutoff = about.get("cutoff", CUTOFF)
        return [
            Prediction(tuple(n for n, p in zip(names, row, strict=True) if p >= cutoff), None, row, e, names)
            for row, e in zip(logits.sigmoid(), kept, strict=True)
        ]
    return [
        Prediction(names[int(p.argmax())], float(p.max()), p, e, names)
        for p, e in zip(logits.softmax(1), kept, strict=True)
    ]


def _numbers(logits: Tensor, about: Mapping[str, Any], kept: Sequence[Tensor | None]) -> list[Prediction]:
    outputs = logits.shape[1]
    names = about.get("targets") or [f"value_{place}" for place in range(1, outputs + 1)]
    mean, std = (about.get(f"target_{name}") or [number] * outputs for name, number in (("mean", 0.0), ("std", 1.0)))
    if not len(names) == len(mean) == len(std) == outputs:
        raise FormatError(
            f"the adapter tells of {len(names)} targets, {len(mean)} means and {len(std)} deviations, and the model "
            f"has {outputs} outputs"
        )
    values = logits.double() * torch.tensor(std).double() + torch.tensor(mean).double()
    rows = [tuple(row) for row in values.tolist()]
    return [
        Prediction(row[0] if outputs == 1 else row, embedding=e, values=dict(zip(names, row, strict=True)))
        for row, e in zip(rows, kept, strict=True)
    ]


def _ranks(logits: Tensor, classes: tuple[str, ...], kept: Sequence[Tensor | None]) -> list[Prediction]:
    if logits.shape[1] != len(classes) - 1:
        raise FormatError(
            f"{len(classes)} classes in order need a model of {len(classes) - 1} outputs, and it has {logits.shape[1]}"
        )
    shares = rank_shares(logits)
    places = middle(shares).tolist()
    ranks = (shares.double() @ torch.arange(len(classes)).double()).tolist()
    return [
        Prediction(classes[place], float(row[place]), row, e, classes, rank=rank)
        for place, row, rank, e in zip(places, shares, ranks, kept, strict=True)
    ]


def rank_shares(logits: Tensor) -> Tensor:
    """Probabilities of K classes in order, (n, K) float32, from (n, K - 1) logits.

    Logit k is that of "above k, given above k - 1", as in CORN (Shi, Cao and Raschka, arXiv 2111.08851); so the
    probability of being above a class never rises with the class.
    """
    above = torch.cat([torch.ones_like(logits[:, :1]), logits.sigmoid().cumprod(1)], 1)
    return above - torch.cat([above[:, 1:], torch.zeros_like(logits[:, :1])], 1)


def middle(shares: Tensor) -> Tensor:
    """The median class of each row of probabilities (n, K): (n,) int64."""
    return (shares.cumsum(1)[:, :-1] < 0.5).sum(1)
