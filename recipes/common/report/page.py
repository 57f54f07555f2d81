"""The report that ends a run: one HTML file that needs nothing else, to be opened in any browser."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uora_vision.cli.drawing import overlay
from uora_vision.cli.page import LOWER, label, show, templates, write_page

from ..command.choices import METHODS
from . import figures

MOST_CLASSES = 40  # in the picture of the confusion matrix
MOST_PAIRS = 10
MOST_SAMPLES = 48
CAPTIONS = {  # how to read the curves of a quantity
    "accuracy": "A widening gap between the lines means that the model learns its training data by heart.",
    "loss": "Lower is better. A test line that turns upwards says that training went on for too long.",
    "perplexity": "Lower is better: among how many tokens the model wavers, on average.",
    "lr": "What the schedule gave the optimizer in each epoch.",
}
SPLITS = {"test_": "test", "train_": "training"}


@dataclass
class Sheet:
    """A table of a report. A value is shown by the name of its column, as metrics are."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    caption: str = ""


@dataclass
class RunReport:
    """What a run leaves to be read. Accuracies are shares (0..1); keys are written with underscores.

    Args:
        title: a few words.
        subtitle: one plain sentence of what happened.
        config: the resolved options; `method`, `d_init`, `threshold` and `relative` help to word the report.
        metrics: any numbers; of note `accuracy`, `loss`, `trained_parameters`, `trained_parameters_without_head`,
            `total_parameters`, `adapter_bytes`, `seconds_per_step`, `peak_memory_bytes`, `firings`. A key with "bytes"
            or "memory" in it counts bytes, one with "seconds" seconds. None means: does not apply.
        history: per epoch `epoch`, `train_loss`, `train_accuracy`, `test_loss`, `test_accuracy` or other names that
            begin so, `lr`, `firings` (so far), `seconds`; all but `epoch` may be missing or None.
        layers: names such as `blocks.0.attn.q`, in the order of the model.
        firings: (n, 3) int: step, layer number, index.
        rank: directions per layer.
        steps: optimizer steps of the run.
        b, d: the learned vectors, one per layer, or empty where the method has none.
        confusion: (k, k) counts of test images, a row per true class.
        names: what the k classes are called.
        samples: test images: (h, w, 3) uint8, true name, predicted name, confidence 0..1; None for it where they are
            numbers, of which none is simply right.
        comparison: a row per method: `method`, `accuracy`, `trained_parameters`, and what else there is;
            `accuracy_std` draws a bar.
        score: the metric by which methods are compared, in the place of `accuracy`.
        tables: more tables, such as what a model wrote before and after.
        usage: how to use what was trained: pairs of a sentence and lines of code.
        pictures: more pictures beside the learning curves.
        histories: of each method of the comparison, as `history`.
        mistakes: as `samples`: those that are wrong, the most confident first.
        trusted: how far the confidences can be trusted.
        ran: when and how the run was made, in words.
    """

    title: str
    subtitle: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    layers: list[str] = field(default_factory=list)
    firings: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    rank: int = 0
    steps: int = 0
    b: list[np.ndarray] = field(default_factory=list)
    d: list[np.ndarray] = field(default_factory=list)
    confusion: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    names: list[str] = field(default_factory=list)
    samples: list[tuple[np.ndarray, str, str, float | None]] = field(default_factory=list)
    comparison: list[dict[str, Any]] | None = None
    score: str = "accuracy"
    tables: list[Sheet] = field(default_factory=list)
    usage: list[tuple[str, str]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    mistakes: list[tuple[np.ndarray, str, str, float]] = field(default_factory=list)
    trusted: Picture | None = None
    ran: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A figure with its words: `caption` says how to read it, `alt` what it shows to who cannot see it."""

    title: str
    uri: str
    caption: str
    alt: str
    large: bool = False


def write_report(report: RunReport, path: Path) -> None:
    """Write the report to `path`; what stood there before stays until the new one is complete.

    Raises:
        ValueError: parts of the report do not fit each other.
    """
    _check(report)
    write_page(render(report), path)


def render(report: RunReport) -> str:
    """The page as a string."""
    environment = templates(Path(__file__).parent)
    environment.filters["method"] = _method
    return environment.get_template("report.html.j2").render(
        report=report,
        tiles=_tiles(report),
        compared=_compared(report),
        curves=[*_curves(report), *report.pictures],
        adapted=len(report.d) > 0 or len(report.firings) > 0,
        smallest=_smallest(report.d),
        redrawn=_redrawn(report),
        learned=_learned(report),
        confused=_confused(report),
        pairs=_pairs(report),
        samples=_thumbnails(report.samples[:MOST_SAMPLES]),
        mistakes=_thumbnails(report.mistakes),
    )


def _thumbnails(samples: list[tuple[np.ndarray, str, str, float]]) -> list[dict[str, Any]]:
    return [
        {"uri": figures.thumbnail(image), "true": true, "predicted": predicted, "confidence": confidence}
        for image, true, predicted, confidence in samples
    ]


def _method(name: Any) -> str:
    return METHODS.get(str(name), str(name))


def _axis(key: str) -> str:
    """A label in the middle of things: `BLEU` stays, `Learning rate` begins small."""
    words = label(key)
    return words if words[1:2].isupper() else words[:1].lower() + words[1:]


def _check(report: RunReport) -> None:
    layers, classes = len(report.layers), len(report.names)
    for name, vectors in (("b", report.b), ("d", report.d)):
        if len(vectors) not in (0, layers):
            raise ValueError(f"{len(vectors)} vectors in {name} for {layers} layers; give one for each layer, or none")
    if report.confusion.shape != (classes, classes):
        raise ValueError(f"confusion has shape {report.confusion.shape}, names {classes}; give (k, k) counts, k names")
    if len(report.firings):
        if report.firings.ndim != 2 or report.firings.shape[1] != 3:
            raise ValueError(f"firings has shape {report.firings.shape}; give (n, 3): step, layer number, index")
        _, layer, index = report.firings.max(0)
        if layer >= layers or index >= report.rank or report.firings.min() < 0:
            raise ValueError(
                f"firings name layers up to {layer} and indices up to {index}, least entry {report.firings.min()}; "
                f"there are {layers} layers of rank {report.rank}, counted from 0"
            )


def _tiles(report: RunReport) -> list[dict[str, str]]:
    """The figures at the top of the page, those that the run has."""
    metrics, tested = report.metrics, int(report.confusion.sum())
    trained, total = metrics.get("trained_parameters"), metrics.get("total_parameters")
    alone = metrics.get("trained_parameters_without_head")
    spent = [f"{alone:,} without the head"] if alone not in (None, trained) else []
    spent += [f"{100 * trained / total:.2g}% of the model"] if trained and total else []
    on_gpu = str(metrics.get("device", "cuda")).startswith("cuda")
    held = "on the GPU" if on_gpu else "of the whole process"
    if metrics.get("model_bytes"):
        held += f"; {show('model_bytes', metrics['model_bytes'])} are weights"
    notes = {
        report.score: f"{tested:,} test images" if tested else "",
        "loss": "mean over test images" if tested else "mean over the test set",
        "trained_parameters": ", ".join(spent),
        "adapter_bytes": "to save and share",
        "seconds_per_step": f"{report.steps:,} steps in all" if report.steps else "",
        "peak_memory": held,
        "peak_memory_bytes": held,
        "firings": f"{len(report.layers) * report.rank:,} directions in {len(report.layers)} layers"
        if report.rank
        else "",
    }

    def brief(key: str) -> str:
        value = metrics[key]
        shown = show(key, value)
        long = len(shown) > 9 and isinstance(value, int | float | np.number)
        return figures.engineering(float(value)) if long else shown  # all digits are further down

    return [
        {"label": label(key), "value": brief(key), "note": note}
        for key, note in notes.items()
        if metrics.get(key) is not None
    ]


def _compared(report: RunReport) -> dict[str, Any] | None:
    """Columns of the table of methods, and the picture where two methods have what it needs."""
    if not report.comparison:
        return None
    score, columns = report.score, list(dict.fromkeys(key for row in report.comparison for key in row))
    alone = "trained_parameters_without_head"
    if all(row.get(alone) == row.get("trained_parameters") for row in report.comparison):
        columns = [key for key in columns if key != alone]  # there is no head
    rows = [r for r in report.comparison if r.get("trained_parameters") and math.isfinite(r.get(score) or math.nan)]
    picture = None
    if len(rows) > 1:
        picture = Picture(
            f"{label(score)} for the parameters spent",
            figures.comparison([{**row, "method": _method(row["method"])} for row in rows], score, _axis(score)),
            f"Further {'down' if score in LOWER else 'up'} is better, further left is cheaper. Trained parameters, "
            "head included, grow tenfold from one labelled step of the axis to the next.",
            f"{label(score)} and trained parameters: "
            + "; ".join(
                f"{_method(r['method'])} {show(score, r[score])} with {show('', r['trained_parameters'])}" for r in rows
            ),
        )
    numeric = {
        c for c in columns if all(isinstance(r.get(c), int | float | np.number | None) for r in report.comparison)
    }
    pictures = [one for one in (picture, _overlaid(report)) if one is not None]
    return {"columns": columns, "numeric": numeric, "pictures": pictures}


def _overlaid(report: RunReport) -> Picture | None:
    """The score of every method over the epochs; None where there is only one."""
    key = f"test_{report.score}"
    lines = [
        (_method(name), [(row["epoch"], float(row[key])) for row in rows if row.get(key) is not None])
        for name, rows in report.histories.items()
    ]
    lines = [(name, points) for name, points in lines if points]
    if len(lines) < 2:
        return None
    ends = "; ".join(f"{name} {show(key, points[-1][1])}" for name, points in lines)
    return Picture(
        f"{label(report.score)} of every method over the epochs",
        overlay(lines, _axis(report.score), percent="accuracy" in key),
        "On the test set, whenever it was measured.",
        f"{label(report.score)} on the test set over the epochs, at the end: {ends}.",
    )


def _curves(report: RunReport) -> list[Picture]:
    history, pictures = report.history, []
    keys = dict.fromkeys(key for row in history for key, value in row.items() if value is not None)
    for quantity in dict.fromkeys(
        ["accuracy", *(_quantity(key) for key in keys if key.startswith("test_")), "loss", "lr"]
    ):
        known = {split + quantity: name for split, name in SPLITS.items() if split + quantity in keys}
        known |= {quantity: _axis(quantity)} if quantity in keys else {}
        if known:
            title = label(quantity)
            ends = [
                f"{name} {show(k, history[0].get(k))} to {show(k, history[-1].get(k))}" for k, name in known.items()
            ]
            alt = f"{title} over {len(history)} epochs, first to last: {', '.join(ends)}."
            uri = figures.curves(history, known, _axis(quantity), percent="accuracy" in quantity)
            caption = "" if quantity == "accuracy" and len(known) == 1 else CAPTIONS.get(quantity, "")
            pictures.append(Picture(title, uri, caption, alt))
    return pictures


def _quantity(key: str) -> str:
    return key.removeprefix("test_").removeprefix("train_")


def _redrawn(report: RunReport) -> list[Picture]:
    firings, layers = report.firings, report.layers
    if not len(firings):
        return []
    counts = np.bincount(firings[:, 1], minlength=len(layers))
    most = int(counts.argmax())
    told = f"{len(firings):,} redraws; most ({counts[most]:,}) in {layers[most]}"
    return [
        Picture(
            "Where",
            figures.firings_where(firings, layers, report.rank),
            "A row per layer, first layer on top; a column per direction. The darker, the more often; grey, never.",
            f"Heat map of layer by direction: {told}.",
        ),
        Picture(
            "When",
            figures.firings_when(firings, layers, report.steps),
            "The same rows against training time. The bars on top are the sum over all layers.",
            f"Heat map of layer by step: {told}; from step {firings[:, 0].min():,} to {firings[:, 0].max():,}.",
        ),
    ]


def _sizes(vectors: list[np.ndarray]) -> list[np.ndarray]:
    """|v| of each vector without what is not finite; a run that diverged deserves a report too."""
    return [np.abs(v[np.isfinite(v)]) for v in vectors]


def _smallest(vectors: list[np.ndarray]) -> float | None:
    return min((float(v.min()) for v in _sizes(vectors) if v.size), default=None)


def _learned(report: RunReport) -> list[Picture]:
    start = report.config.get("d_init")
    start = float(start) if isinstance(start, int | float) else None
    starts = "." if start is None else f" and starts at {start:g} (dashed line)."
    pictures = []
    for symbol, vectors, meaning, line in (
        ("b", report.b, "scales the outputs and starts at 0: tall bars are layers that changed much.", None),
        ("d", report.d, f"scales the directions{starts}", start),
    ):
        if vectors:
            sizes = _sizes(vectors)
            medians = [float(np.median(v)) if v.size else 0.0 for v in sizes]
            largest = int(np.argmax(medians))
            uri = figures.magnitudes(sizes, report.layers, symbol, line)
            bars = "Dot: median of a layer; thick bar: the middle half; thin bar: the middle 90%."
            told = f"the largest median, {medians[largest]:.3g}, is in {report.layers[largest]}"
            alt = f"|{symbol}| by role and block; {told}."
            pictures.append(Picture(f"|{symbol}|", uri, f"{symbol} {meaning} {bars}", alt))
    return pictures


def _confused(report: RunReport) -> Picture | None:
    if not report.names:
        return None
    shown = figures.most_confused(report.confusion, MOST_CLASSES)
    part = f"the {len(shown)} most confused of {len(report.names):,} classes" if len(shown) < len(report.names) else ""
    share = np.trace(report.confusion) / max(1, report.confusion.sum())
    return Picture(
        "Confusion matrix" + (f", {part}" if part else ""),
        figures.confusion_matrix(report.confusion, report.names, shown),
        "A row is a true class, a column what the model said; each row is coloured by its shares"
        + (" and lettered by its counts" if len(shown) <= 12 else "")
        + ". Blue on the diagonal is right, red is wrong.",
        f"Confusion matrix of {part or f'{len(shown)} classes'}; {100 * share:.1f}% of the images are on the diagonal.",
        large=len(shown) > 20,
    )


def _pairs(report: RunReport) -> list[dict[str, Any]]:
    sizes = report.confusion.sum(1)
    return [
        {"true": report.names[i], "predicted": report.names[j], "count": count, "share": count / sizes[i]}
        for i, j, count in figures.confused_pairs(report.confusion, MOST_PAIRS)
    ]
