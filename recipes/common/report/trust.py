"""How far the probabilities of a classifier can be trusted: a diagram, and its most confident mistakes."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from uora_vision.cli.drawing import BLUE, MUTED, PALE, drawn

from .page import Picture

BINS = 10
MOST = 12
"""Mistakes that are shown."""


def calibration(confidence: np.ndarray, right: np.ndarray) -> tuple[float, Picture | None]:
    """The expected calibration error (Guo et al., arXiv 1706.04599; 10 bins of equal width), and its diagram.

    Of a run that diverged, confidences that are no numbers are left out; where there are no others, there is none.

    Args:
        confidence: the probability given to each prediction (n,).
        right: whether it was right (n,).
    """
    finite = np.isfinite(confidence)
    confidence, right = confidence[finite], right[finite]
    if not len(confidence):
        return float("nan"), None
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(which, minlength=BINS)
    said, found = (np.bincount(which, part, BINS) / np.maximum(counts, 1) for part in (confidence, right))
    error = float((counts * np.abs(said - found)).sum() / len(confidence))
    told = (
        f"On average the confidence is {confidence.mean():.0%} and {right.mean():.0%} are right; "
        f"by confidence, the two differ by {100 * error:.1f} points (expected calibration error)."
    )
    there = counts > 0
    return error, Picture(
        "Confidence and accuracy",
        _drawn(said[there], found[there], counts[there]),
        f"{told} Points on the dashed line are as sure as they should be, those below it too sure; a larger point "
        "stands for more images.",
        f"Share of right predictions by confidence. {told}",
    )


@drawn
def _drawn(said: np.ndarray, found: np.ndarray, counts: np.ndarray) -> Figure:
    figure = Figure(figsize=(4.8, 3.3))
    axes = figure.subplots()
    axes.set_facecolor("white")
    axes.plot((0, 1), (0, 1), linestyle="--", color=MUTED, linewidth=1)
    axes.plot(said, found, color=PALE, linewidth=3, zorder=1)
    axes.scatter(said, found, s=20 + 180 * counts / counts.max(), color=BLUE, zorder=2)
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.04), ylim=(-0.04, 1.06))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid()
    return figure


def mistakes(confidence: np.ndarray, right: np.ndarray) -> list[int]:
    """Which predictions were wrong, the most confident first; at most `MOST`."""
    wrong = np.flatnonzero(~right)
    return wrong[np.argsort(-confidence[wrong], kind="stable")][:MOST].tolist()
