"""What is measured with shares of an adapter, after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import nn

import uora_vision as uora

from ..errors import RecipeError
from ..report.strength import Points


def parse_strengths(text: str) -> list[float]:
    """`0.25,0.5` as numbers between 0 and 1, each once.

    Raises:
        RecipeError: it has something else.
    """
    try:
        found = sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        found = [math.nan]
    if not all(0 < share < 1 for share in found):
        raise RecipeError(f"--strengths takes numbers between 0 and 1 such as 0.25,0.5,0.75, got {text!r}")
    return found


def along(
    shares: list[float],
    model: nn.Module,
    measure: Callable[[], Mapping[str, float]],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> Points:
    """The accuracies on trained classes and on others by strength, from none to all; the model is as it was then.

    Args:
        measure: the model as it is.
        before, after: what was measured of the base, and with all of the adapter.
    """
    found = {0.0: before}
    for share in shares:
        uora.strength(model, share)
        found[share] = measure()
    uora.strength(model, 1)
    found[1.0] = after
    return [(share, scores["accuracy"], scores["other_accuracy"]) for share, scores in found.items()]
