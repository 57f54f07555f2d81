"""What a share of the adapter keeps of the old and has of the new, as a table and a picture of a report."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from uora_vision.cli.drawing import BLUE, drawn

from .page import Picture, Sheet

Points = Sequence[tuple[float, float, float]]
"""Of each strength: it, the accuracy on the classes that were trained, and on the others."""


def sheet(points: Points) -> Sheet:
    rows = [[f"{share:g}", f"{new:.1%}", f"{old:.1%}"] for share, new, old in points]
    return Sheet(
        "Strength of the adapter", ["strength", "trained classes", "other classes"], rows,
        "0 is the base, 1 what was learnt; uora.strength(model, 0.5) sets it. To choose one, measure by --validation.",
    )  # fmt: skip


def picture(points: Points) -> Picture:
    """The accuracy on trained classes over that on the others, a point for each strength."""
    return Picture(
        "Old and new, by strength",
        _drawn(points),
        "Further up is more of the new, further right more of what the model could do before.",
        "Accuracy on other classes and on trained ones: "
        + "; ".join(f"strength {share:g}: {old:.1%} and {new:.1%}" for share, new, old in points),
    )


@drawn
def _drawn(points: Points) -> Figure:
    figure = Figure(figsize=(3.9, 2.9))
    axes = figure.subplots()
    axes.plot([old for _, _, old in points], [new for _, new, _ in points], color=BLUE, marker="o", markersize=4)
    for share, new, old in points:
        axes.annotate(f"{share:g}", (old, new), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(xlabel="other classes", ylabel="trained classes")
    axes.margins(0.15)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    axes.grid()
    return figure
