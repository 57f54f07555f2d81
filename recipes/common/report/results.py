"""What a finished run leaves in its folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from safetensors.torch import save as to_bytes

import uora_vision as uora
from uora_vision.cli.drawing import engineering

from ..command.choices import Method
from ..command.display import Display
from ..command.options import Defaults
from ..training.find_rate import Sweep
from ..training.folder import CHECKPOINT, CHECKPOINTS, METRICS, write_json
from ..training.methods import AdaptedModel
from ..training.parts import Outcome
from .page import Picture, RunReport, show, write_report
from .ran import ran
from .sweep import picture
from .usage import usage

LIBRARIES = (
    "uora-vision", "torch", "timm", "open_clip_torch", "transformers", "trl", "albumentations", "accelerate", "peft",
    "numpy",
)  # fmt: skip
COMPARED = {  # what stands beside the score in a comparison of methods, and its name on the terminal
    "trained_parameters": "trained",
    "trained_parameters_without_head": "without head",
    "adapter_bytes": "adapter",
    "seconds_per_step": "step",
    "firings": "redrawn",
}
OTHERS = "methods"
"""Folder of the other methods of a comparison, within that of the run."""
KEPT = {"other_accuracy": "other classes"}
"""What stands there besides, in the recipes that measure it."""


def finish(
    folder: Path,
    adapted: AdaptedModel,
    outcome: Outcome,
    scores: dict[str, Any],
    config: dict[str, Any],
    title: str,
    subtitle: str,
    *,
    score: str = "accuracy",
    comparison: list[dict[str, Any]] | None = None,
    sweep: Sweep | None = None,
    pictures: Sequence[Picture] = (),
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Write adapter, history, report and metrics; then the checkpoint may go.

    Args:
        scores: what was measured at the end, and other metrics of the recipe.
        score: the one of them to compare methods by.
        comparison: rows of other methods, as `compared` makes them; this run's own comes last.
        sweep: over learning rates, where one was made.
        pictures: beside the learning curves.
        labels, preprocessing: for the adapter; see `uora.save`.
        sections: parts of `RunReport`: `confusion` and `names`, `samples`, `tables`.

    Returns:
        The metrics.
    """
    save_trained(adapted, folder / "adapter", labels, preprocessing)
    metrics = scores | measures(adapted, outcome)
    if sweep is not None:
        metrics |= {"suggested_lr": sweep.suggested, "suggested_head_lr": sweep.head_suggested}
    if comparison is not None:
        comparison = [*comparison, compared(adapted.options.method.value, metrics, score)]
    metrics["adapter_folder_bytes"] = sum(file.stat().st_size for file in (folder / "adapter").iterdir())
    progress = outcome.progress
    write_json(folder / "history.json", progress.history)
    layers, b, d = vectors(adapted)
    report = RunReport(
        title=title,
        subtitle=subtitle,
        config=config,
        metrics=metrics,
        score=score,
        history=progress.history,
        layers=layers,
        firings=outcome.reinit.history() if outcome.reinit else np.zeros((0, 3), dtype=np.int64),
        rank=adapted.options.rank or 0,
        steps=progress.step,
        b=b,
        d=d,
        comparison=comparison,
        histories={adapted.options.method.value: progress.history, **histories(folder, comparison or [])},
        ran=ran(outcome.device) | {"versions": ", ".join(f"{name} {v}" for name, v in versions().items())},
        pictures=[*(() if sweep is None else (picture(sweep),)), *pictures],
        usage=usage(folder / "adapter", preprocessing or {}) if adapted.is_uora else [],
        **sections,
    )
    write_report(report, folder / "report.html")
    # Last, because this file is what says that a run is finished.
    told = metrics if comparison is None else {**metrics, "comparison": comparison}
    write_json(folder / METRICS, {**told, "config": config, "versions": versions()})
    (folder / CHECKPOINT).unlink(missing_ok=True)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return metrics


def histories(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A row per epoch of the other methods of a comparison, whose own comes last, as far as the folder has them."""
    files = {row["method"]: folder / OTHERS / row["method"] / "history.json" for row in rows[:-1]}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def measures(adapted: AdaptedModel, outcome: Outcome) -> dict[str, Any]:
    """What a run spent: sizes in parameters and bytes, times in seconds."""
    return {
        "trained_parameters": adapted.trained,
        "trained_parameters_without_head": adapted.trained_without_head,
        "total_parameters": sum(p.numel() for p in adapted.model.parameters()),
        "adapter_bytes": adapted.adapter_bytes,
        "model_bytes": sum(p.nbytes for p in adapted.base.parameters()),
        "seconds_per_step": outcome.seconds_per_step,
        "seconds": outcome.progress.seconds,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "firings": outcome.reinit.firings if outcome.reinit else 0,
        "steps": outcome.progress.step,
        "epochs": len(outcome.progress.history),
        "device": outcome.device,
        **({} if outcome.kept_epoch is None else {"kept_epoch": outcome.kept_epoch}),
    }


def compared(method: str, metrics: dict[str, Any], score: str = "accuracy") -> dict[str, Any]:
    """A method's row in a comparison."""
    kept = {key: metrics[key] for key in KEPT if key in metrics}
    return {"method": method, score: metrics[score], **kept, **{key: metrics[key] for key in COMPARED}}


def compare(
    run: Callable[..., dict[str, Any] | None],
    base: Any,
    rows: Mapping[Method, Defaults],
    folder: Path,
    display: Display,
    score: str = "accuracy",
) -> dict[str, Any] | None:
    """Run a recipe by several methods, UORA last: its results go to `folder`, with all of them side by side.

    Args:
        run: the recipe's; takes options, and `comparison` as `finish` does.
        base: options that all runs share.
        rows: rank and learning rates of each method.
        score: the metric to compare by.

    Returns:
        The metrics of the UORA run.
    """
    told: list[dict[str, Any]] = []
    metrics = None
    for method in sorted(rows, key=lambda m: m is Method.uora):
        own, last = rows[method], method is Method.uora
        chosen = {"method": method, "rank": own.rank, "lr": own.lr, "head_lr": own.head_lr}
        output = folder if last else folder / OTHERS / method.value
        metrics = run(dataclasses.replace(base, output=output, **chosen), comparison=told if last else None)
        assert metrics is not None
        told.append(compared(method.value, metrics, score))
        display.say(f"{method}: {score} {show(score, metrics[score])}")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for key in told[0]:
        justify: Literal["left", "right"] = "left" if key == "method" else "right"
        table.add_column((COMPARED | KEPT).get(key, key), justify=justify, overflow="fold")
    for row in told:
        table.add_row(*(_brief(key, value) for key, value in row.items()))
    display.say(table)
    display.say(f"Report: {folder / 'report.html'}")
    return metrics


def _brief(key: str, value: Any) -> str:
    """As in the report, large counts in few digits: 80 columns are to be enough."""
    many = isinstance(value, int) and value >= 1e6 and "bytes" not in key
    return engineering(value) if many else show(key, value)


def save_trained(
    adapted: AdaptedModel,
    folder: Path,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """UORA and VeRA in the package's form; of the other methods the trained parameters by name, for
    `model.load_state_dict(safetensors.torch.load_file(...), strict=False)` on a model prepared in the same way."""
    if adapted.is_uora:
        uora.save(adapted.base, folder, labels=labels, preprocessing=preprocessing)
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = to_bytes(adapted.trained_tensors(), metadata={"method": adapted.options.method.value})
    (folder / "trained.safetensors").write_bytes(content)


def vectors(adapted: AdaptedModel) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """Names, b and d of every adapted projection; empty for methods that have none."""
    names: list[str] = []
    b: list[np.ndarray] = []
    d: list[np.ndarray] = []
    if not adapted.is_uora:
        return names, b, d
    for name, adapter in uora.adapters(adapted.base).items():
        rows = adapter.b.detach().cpu().split([role.rows for role in adapter.roles])
        for role, role_b, role_d in zip(adapter.roles, rows, adapter.d.detach().cpu(), strict=True):
            names.append(name if name.endswith(f".{role.name}") else f"{name}.{role.name}")
            b.append(role_b.numpy())
            d.append(role_d.numpy())
    return names, b, d


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "uora-vision": uora.__version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
