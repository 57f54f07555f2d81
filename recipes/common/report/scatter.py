"""Predicted numbers against true ones, as a picture of a report."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from uora_vision.cli.drawing import BLUE, MUTED, drawn

from .page import Picture

MOST = 2000
"""Points of a picture."""


def picture(name: str, true: np.ndarray, predicted: np.ndarray) -> Picture:
    """A target of every test image, true (n,) and predicted (n,)."""
    error = float(np.abs(predicted - true).mean())
    some = np.linspace(0, len(true) - 1, min(MOST, len(true))).round().astype(int)
    return Picture(
        f"Predicted {name}",
        scatter(true[some], predicted[some]),
        "A point for each test image; on the line the prediction is right.",
        f"Predicted against true {name} of {len(true):,} test images; the mean absolute error is {error:.4g}.",
    )


@drawn
def scatter(true: np.ndarray, predicted: np.ndarray) -> Figure:
    """Points, and a line where both are the same."""
    figure = Figure(figsize=(3.9, 2.9))
    axes = figure.subplots()
    axes.axline((float(true.mean()), float(true.mean())), slope=1, color=MUTED, linewidth=1, linestyle="--")
    axes.scatter(true, predicted, s=12, color=BLUE, alpha=0.6, linewidths=0)
    axes.set(xlabel="true", ylabel="predicted")
    axes.grid()
    return figure
