"""The figures of a report, each drawn with matplotlib and returned as a data URI.

Every figure is drawn one narrow column wide, so that the same picture can be read on a phone and, two or three
abreast, on a desk. Most are SVG; one that would be large that way becomes a PNG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from PIL import Image

from uora_vision.cli.drawing import BLUE, GREEN, INK, MUTED, ORANGE, PALE, data_uri, drawn, engineering, shorten

WIDTH = 4.8  # inches
COLUMNS = 64  # of a heat map: a single firing stays wide enough to be seen
THUMBNAIL = 160  # pixels


def _short(paths: Sequence[str], longest: int = 24) -> list[str]:
    """Paths of modules as labels; where one is too long, without the parents that all share."""
    parts = [path.split(".") for path in paths]
    shared = 0
    if max(map(len, paths)) > longest:
        shared = next((n for n, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    return [shorten(".".join(names[shared:]), 2 * longest) for names in parts]


def wrapped(name: str, width: int, lines: int = 3) -> str:
    """A name in lines of about `width` characters, broken behind spaces, dots and the like."""
    rows = [""]
    for part in re.findall(r"[^\s._/-]+[\s._/-]*|[\s._/-]+", shorten(name, width * lines)):
        if rows[-1] and len(rows[-1]) + len(part.rstrip()) > width:
            rows.append("")
        rows[-1] += part
    return "\n".join(row.strip() for row in rows)


@drawn
def curves(history: Sequence[Mapping[str, Any]], keys: Mapping[str, str], label: str, percent: bool = False) -> Figure:
    """One line over the epochs for each of `keys` (key in a row of history -> name in the legend)."""
    figure = Figure(figsize=(3.9, 2.9))  # these stand three abreast
    axes = figure.subplots()
    for (key, name), colour, line in zip(keys.items(), (BLUE, ORANGE, GREEN), ("-", "--", ":"), strict=False):
        points = [(row["epoch"], float(row[key])) for row in history if row.get(key) is not None]  # not every epoch
        marker = "o" if len(points) <= 30 else None
        look = {"markersize": 3.5, "linewidth": 1.8} if len(points) > 1 else {"markersize": 7, "zorder": 3}
        axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker, label=name, **look)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}%" if percent else f"{v:g}"))
    if len(keys) > 1:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(keys), borderaxespad=0)
    return figure


@drawn
def rates(values: Sequence[float], losses: Sequence[float], chosen: float | None) -> Figure:
    """The loss against the learning rate, on a log axis, with a line where one was chosen."""
    figure = Figure(figsize=(3.9, 2.9))
    axes = figure.subplots()
    axes.plot(values, losses, color=BLUE, linewidth=1.8)
    if chosen is not None:
        axes.axvline(chosen, color=ORANGE, linewidth=1.4, linestyle="--", label=f"{chosen:g}")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    axes.set_xscale("log")
    axes.set(xlabel="learning rate (log axis)", ylabel="loss")
    axes.grid(axis="y")
    return figure


def split_name(layer: str) -> tuple[str, str]:
    """`blocks.0.attn.q` as its block and its role: `("blocks.0", "attn.q")`."""
    match = re.fullmatch(r"(.*\d)\.(\D.*)", layer)
    return (match[1], match[2]) if match else ("", layer)


@drawn
def firings_where(firings: np.ndarray, layers: Sequence[str], rank: int) -> Figure:
    """Count of firings, layer x index. `firings`: (n, 3) of step, layer number, index."""
    per_column = -(-rank // COLUMNS)
    counts = np.zeros((len(layers), -(-rank // per_column)), dtype=np.int64)
    np.add.at(counts, (firings[:, 1], firings[:, 2] // per_column), 1)
    figure = Figure(figsize=(WIDTH, _height(layers)))
    axes = figure.subplots()
    _heat(figure, axes, [axes], counts, layers, right=counts.shape[1] * per_column)
    axes.set_xlabel("index of the direction" + (f" ({per_column} per cell)" if per_column > 1 else ""))
    return figure


@drawn
def firings_when(firings: np.ndarray, layers: Sequence[str], steps: int) -> Figure:
    """Count of firings, layer x optimizer step, under the sum over the layers."""
    steps = max(steps, int(firings[:, 0].max()) + 1)
    per_column = -(-steps // COLUMNS)
    counts = np.zeros((len(layers), -(-steps // per_column)), dtype=np.int64)
    np.add.at(counts, (firings[:, 1], firings[:, 0] // per_column), 1)
    figure = Figure(figsize=(WIDTH, _height(layers)))
    top, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 4))
    lefts = np.arange(counts.shape[1]) * per_column
    top.bar(lefts, counts.sum(0), width=per_column, align="edge", color=MUTED)
    top.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    top.yaxis.set_major_formatter(FuncFormatter(engineering))
    top.tick_params(axis="x", bottom=False, labelbottom=False)
    _heat(figure, axes, [top, axes], counts, layers, right=counts.shape[1] * per_column)
    axes.set_xlabel("optimizer step" + (f" ({per_column} per cell)" if per_column > 1 else ""))
    return figure


def _height(layers: Sequence[str]) -> float:
    return float(np.clip(1.2 + 0.16 * len(layers), 2.6, 4.8))


def _heat(
    figure: Figure, axes: Axes, beside: list[Axes], counts: np.ndarray, layers: Sequence[str], right: int
) -> None:
    """Counts as colours, empty cells pale; one tick per layer where there is room, else one per block."""
    colours = ListedColormap(matplotlib.colormaps["magma_r"](np.linspace(0.3, 1, 256)))
    shown = np.ma.masked_equal(counts, 0)
    box = (0, right, len(layers) - 0.5, -0.5)
    norm = PowerNorm(0.5, vmin=1, vmax=max(2, counts.max()))
    image = axes.imshow(shown, cmap=colours, norm=norm, aspect="auto", extent=box, interpolation="nearest")
    axes.set_facecolor(PALE)
    if counts.max() > 1:
        bar = figure.colorbar(image, ax=beside, aspect=30, pad=0.02, ticks=MaxNLocator(5, integer=True))
        bar.ax.yaxis.set_minor_locator(FixedLocator([]))
        bar.set_label("redraws in a cell")
    if len(layers) <= 24:
        axes.set_yticks(range(len(layers)), _short(layers), fontsize=7.5)
        return
    blocks = [split_name(name)[0] for name in layers]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    starts = starts[:: -(-len(starts) // 16)]
    axes.set_yticks(starts, _short([blocks[i] or layers[i] for i in starts]), fontsize=7.5)
    axes.hlines(np.array(starts[1:]) - 0.5, 0, right, color="white", linewidth=0.8)


@drawn
def magnitudes(sizes: Sequence[np.ndarray], layers: Sequence[str], symbol: str, start: float | None = None) -> Figure:
    """|b| or |d| of every layer, a panel per role: median, middle half, middle 90%. `start`: a line at this value."""
    roles: dict[str, list[np.ndarray]] = {}
    for layer, size in zip(layers, sizes, strict=True):
        roles.setdefault(split_name(layer)[1], []).append(size)
    rows = -(-len(roles) // 2)
    figure = Figure(figsize=(WIDTH, 0.5 + 1.25 * rows))
    panels = figure.subplots(rows, min(2, len(roles)), sharex=True, sharey=True, squeeze=False).ravel()
    for panel, (role, values) in zip(panels, roles.items(), strict=False):
        panel.set_title(wrapped(role, 24), loc="left", fontsize=8.5, color=INK)
        panel.grid(axis="y")
        if start is not None:
            panel.axhline(start, color=ORANGE, linewidth=1, linestyle="--")
        for x, value in enumerate(values):
            if value.size:
                low, q1, median, q3, high = np.quantile(value, (0.05, 0.25, 0.5, 0.75, 0.95))
                panel.vlines(x, low, high, color="#a9c1de", linewidth=2)
                panel.vlines(x, q1, q3, color=BLUE, linewidth=4)
                panel.plot(x, median, "o", color="white", markeredgecolor=BLUE, markersize=4)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    for panel in panels[len(roles) :]:
        panel.set_visible(False)
    if len(roles) % 2 and rows > 1:  # nothing stands below this one
        panels[len(roles) - 2].tick_params(labelbottom=True)
    panels[0].set_ylim(bottom=0)
    figure.supxlabel("block, in the order of the model", fontsize=9, color=MUTED)
    figure.supylabel(f"|{symbol}|", fontsize=9, color=MUTED)
    return figure


def most_confused(confusion: np.ndarray, limit: int) -> np.ndarray:
    """At most `limit` classes: all if they fit, else those of the most frequent confusions; ascending."""
    classes = len(confusion)
    if classes <= limit:
        return np.arange(classes)
    chosen: dict[int, None] = {}
    for true, predicted, _ in confused_pairs(confusion, limit):
        for one in (true, predicted):
            if len(chosen) < limit:
                chosen[one] = None
    rest = (c for c in range(classes) if c not in chosen)
    return np.sort([*chosen, *(next(rest) for _ in range(limit - len(chosen)))])


def confused_pairs(confusion: np.ndarray, limit: int) -> list[tuple[int, int, int]]:
    """The most frequent (true, predicted, count) off the diagonal, most frequent first."""
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(-errors, axis=None, kind="stable")[:limit]
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [(int(i), int(j), int(errors[i, j])) for i, j in pairs if errors[i, j] > 0]


@drawn
def confusion_matrix(confusion: np.ndarray, names: Sequence[str], classes: np.ndarray) -> Figure:
    """Share of each true class (row) predicted as each class, for these `classes`: right in blue, wrong in red."""
    counts = confusion[np.ix_(classes, classes)]
    shares = counts / np.maximum(confusion.sum(1)[classes], 1)[:, None]
    size = len(classes)
    few = size <= 12
    side = WIDTH if size <= 20 else 7.5
    figure = Figure(figsize=(side, side))
    axes = figure.subplots()
    axes.set_facecolor(PALE)
    right = np.eye(size, dtype=bool)
    worst = max(0.2, shares[~right].max(initial=0))
    for hidden, colours, top in ((~right, "Blues", 1.0), (right, "Reds", worst)):
        shown = np.ma.masked_where(hidden | (counts == 0), shares)
        axes.imshow(shown, cmap=colours, vmin=-0.15 * top, vmax=1.15 * top, interpolation="nearest")
    if few:
        for i, j in np.argwhere(counts):
            dark = shares[i, j] > 0.6 * (1 if i == j else worst)
            text = engineering(float(counts[i, j]))
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else INK)
    labels = [wrapped(names[int(c)], 16) for c in classes]
    font = 8 if size <= 20 else 7
    axes.set_xticks(range(size), labels, rotation=0 if few and max(map(len, labels)) < 4 else 90, fontsize=font)
    axes.set_yticks(range(size), labels, fontsize=font)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="true")
    return figure


@drawn
def comparison(rows: Sequence[Mapping[str, Any]], score: str = "accuracy", axis: str = "accuracy") -> Figure:
    """A score against trained parameters, a labelled point per method. `SCORE_std`, if there, as a bar."""
    figure = Figure(figsize=(WIDTH, 3.3))
    axes = figure.subplots()
    x = np.array([row["trained_parameters"] for row in rows], dtype=float)
    y = np.array([row[score] for row in rows], dtype=float)
    for row, a, b in zip(rows, x, y, strict=True):
        axes.errorbar(a, b, yerr=row.get(f"{score}_std") or None, fmt="o", color=BLUE, ecolor="#a9c1de", markersize=6)
    axes.set_xscale("log")
    axes.set_xlim(x.min() / 2, x.max() * 2)
    axes.margins(y=0.15)
    axes.set(xlabel="trained parameters (log axis)", ylabel=axis)
    axes.xaxis.set_major_formatter(FuncFormatter(engineering))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if "accuracy" in score:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid()
    _label_points(figure, axes, x, y, [shorten(str(row["method"]), 24) for row in rows])
    return figure


def _label_points(figure: Figure, axes: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> None:
    """A name beside each point, on the side and at the height nearest to it where it overlaps nothing."""
    figure.draw_without_rendering()  # settles the layout, so that positions are known
    to_points = 72 / figure.dpi
    dots = axes.transData.transform(np.column_stack([x, y])) * to_points
    (first, bottom), (last, _) = axes.get_window_extent().get_points() * to_points
    taken: list[tuple[float, float, float]] = [(px - 5, px + 5, py) for px, py in dots]  # left, right, height

    def free(left: float, right: float, height: float) -> bool:
        inside = first <= left and right <= last and height > bottom + 5
        return inside and not any(left < r and le < right and abs(height - h) < 10.5 for le, r, h in taken)

    for (px, py), a, b, name in zip(dots, x, y, names, strict=True):
        near, width = 9, 5.2 * len(name)
        moves = sorted(range(-120, 121, 4), key=abs)
        spots = [(move, side) for move in moves for side in (1, -1)]
        span = {1: (px + near, px + near + width), -1: (px - near - width, px - near)}
        move, side = next((s for s in spots if free(*span[s[1]], py + s[0])), (0, 1))
        taken.append((*span[side], py + move))
        line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "relpos": (side < 0, 0.5)}
        axes.annotate(
            name,
            (a, b),
            xytext=(near * side, move),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=8,
            arrowprops=line if abs(move) > 5 else None,
        )


def thumbnail(image: np.ndarray) -> str:
    """A test image, (h, w, 3) uint8, as a data URI; large ones are made smaller."""
    picture = Image.fromarray(image)
    kind = "png" if max(picture.size) <= 64 else "jpeg"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return data_uri(kind, buffer.getvalue())
