"""How figures look, and how they get into a page: drawn with matplotlib, as data URIs."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

LARGEST_SVG = 250_000  # bytes
INK, MUTED, PALE = "#1f2933", "#6b7785", "#eef1f4"
BLUE, ORANGE, GREEN = "#1f5fa8", "#d9772b", "#23807a"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$x"
    "axes.edgecolor": "#c3cad2",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ec",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.hashsalt": "report",  # the same data give the same file
}

P = ParamSpec("P")


def drawn(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Draw under this file's style and return the data URI of the picture."""

    @wraps(draw)
    def encoded(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks
            figure = draw(*args, **kwargs)
            drawing = io.BytesIO()
            figure.savefig(drawing, format="svg", dpi=200, metadata={"Date": None})
            if drawing.tell() <= LARGEST_SVG:
                return data_uri("svg+xml", drawing.getvalue())
            pixels = io.BytesIO()
            figure.savefig(pixels, format="png", dpi=200)
            return data_uri("png", pixels.getvalue())

    return encoded


def data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def shorten(name: str, longest: int = 18) -> str:
    """`name` in one line of at most `longest` printable characters."""
    line = "".join(c for c in " ".join(name.split()) if c.isprintable())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def engineering(value: float, _: object = None) -> str:
    """24576 as `24.6k`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


@drawn
def overlay(
    lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], quantity: str, percent: bool = False, most: int = 10
) -> Figure:
    """The same quantity over the epochs of several runs.

    Args:
        lines: a name and points (epoch, value) of each run; of some there may be none.
        most: so many of them have a colour and stand in the legend; the others are grey.
    """
    figure = Figure(figsize=(4.8, 3.4 + 0.17 * min(len(lines), most)))
    axes = figure.subplots()
    colours = [f"C{place}" for place in range(10)]
    for place, (name, points) in reversed([*enumerate(lines)]):  # the first lies on top
        if not points:
            continue
        own = place < most
        look = {"color": colours[place % 10], "label": shorten(name, 40)} if own else {"color": "#c9cfd6", "zorder": 1}
        marker = "o" if len(points) <= 30 else None
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=3.5, linewidth=1.8 if own else 1.0, **look)
    axes.set(xlabel="epoch", ylabel=quantity)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}%" if percent else f"{v:g}"))
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, fontsize=8)
    return figure
