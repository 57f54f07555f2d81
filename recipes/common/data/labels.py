"""Labels of examples, in numbers or in words, as numbers of classes that mean the same in training and test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from uora_vision.predict.frames import as_text

from ..errors import DataError


def as_classes(
    train: Sequence[Any], test: Sequence[Any], source: str, known: Sequence[str] = ()
) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Classes of training and test examples, from 0, and the names of all classes.

    Whole numbers stay what they are. Words are numbered as in `known` where all of them are there, else by alphabet.

    Raises:
        DataError: an example has no label; numbers below 0, fractions, or numbers among words; all training examples
            have one label; a test label that no training example has.
    """
    told = [as_text(label) for label in train], [as_text(label) for label in test]
    for part, labels in zip(("training", "test"), told, strict=True):
        if "" in labels:
            raise DataError(f"{part} example {labels.index('') + 1} of {source} has no label")
    numbers = {label: number(label) for label in {*told[0], *told[1]}}
    if words := sorted(label for label, number in numbers.items() if number is None):
        if odd := sorted(label for label, number in numbers.items() if number is not None):
            raise DataError(
                f"the labels of {source} must be whole numbers from 0, or words; {words[0]!r} and {odd[0]!r} are there"
            )
        names = tuple(known) if set(words) <= set(known) else tuple(sorted(set(told[0])))
        places = {name: place for place, name in enumerate(names)}
    else:
        if odd := sorted(label for label, number in numbers.items() if number < 0 or number % 1):  # type: ignore[operator]
            raise DataError(f"the labels of {source} must be whole numbers from 0, or words; there is {odd[0]!r}")
        places = {label: int(number) for label, number in numbers.items() if number is not None}
        names = tuple(str(place) for place in range(max(places[label] for label in told[0]) + 1))
    trained = {places[label] for label in told[0]}
    if len(trained) < 2:
        raise DataError(f"all {len(train)} training examples of {source} have the label {told[0][0]}; 2 are needed")
    if strange := sorted({label for label in told[1] if places.get(label) not in trained}):
        raise DataError(f"{source} has test labels that no training example has: {', '.join(strange[:5])}")
    return [places[label] for label in told[0]], [places[label] for label in told[1]], names


def as_values(labels: Sequence[Any], source: str) -> list[float]:
    """Labels that are measured, not told apart.

    Raises:
        DataError: one of them is no number.
    """
    numbers = [number(as_text(label)) for label in labels]
    if None in numbers:
        place = numbers.index(None)
        raise DataError(f"example {place + 1} of {source} has the label {as_text(labels[place])!r}, expected a number")
    return [float(number) for number in numbers if number is not None]


def number(value: Any) -> float | None:
    """A finite number, or one that is written out; None of anything else."""
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
