"""What all pages have in common that tell of runs: templates, and how a number is shown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jinja2 import Environment

LOWER = ("loss", "perplexity", "mae", "rmse")
"""Measures of which less is better."""
LABELS = {
    "accuracy": "Accuracy",
    "accuracy_std": "± std",
    "adapter_bytes": "Adapter size",
    "bleu": "BLEU",
    "cider": "CIDEr",
    "f1_macro": "Macro F1",
    "f1_micro": "Micro F1",
    "firings": "Redraws",
    "kappa": "Quadratic kappa",
    "loss": "Loss",
    "lr": "Learning rate",
    "mae": "Mean absolute error",
    "map": "mAP",
    "meteor_stem": "METEOR, no synonyms",
    "model_bytes": "Weights of the model",
    "nist": "NIST",
    "peak_memory": "Peak memory",
    "peak_memory_bytes": "Peak memory",
    "r2": "R²",
    "rmse": "Root mean square error",
    "rouge_l": "ROUGE-L",
    "seconds": "Time",
    "seconds_per_step": "Time per step",
    "trained_parameters_without_head": "Trained, without head",
}


def templates(*folders: Path) -> Environment:
    """Templates of some folders, and of this one: `page.html.j2` is what each of them extends."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"label": label}
    environment.globals |= {"show": show}
    return environment


def write_page(page: str, path: Path) -> None:
    """Write a page to `path`; what stood there before stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(page, encoding="utf-8", errors="replace")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def label(key: str) -> str:
    """`peak_memory_bytes` as `Peak memory`."""
    words = key.replace("_", " ")
    return LABELS.get(key, words[:1].upper() + words[1:])


def show(key: str, value: Any) -> str:
    """A value with the unit that its key implies: `show("adapter_bytes", 98304)` is `98.3 kB`."""
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str, ensure_ascii=False)
    if not isinstance(value, int | float | np.number):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if "accuracy" in key:
        return f"{100 * value:.1f}%"
    if "bytes" in key or "memory" in key:
        return _scaled(float(value), ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")))
    if "seconds" in key:
        return _scaled(float(value), ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")))
    return f"{value:,}" if isinstance(value, int | np.integer) else f"{value:.4g}"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    size, unit = next((pair for pair in units if abs(value) >= pair[0]), units[-1])
    return f"{value / size:,.3g} {unit}" if abs(value) < 999.5 * size else f"{value / size:,.0f} {unit}"
