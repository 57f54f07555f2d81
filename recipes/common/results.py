"""What a finished run leaves in its folder, and the rule that no run overwrites another."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save as to_bytes

import uora_vision as uora

from .checkpoint import read_checkpoint
from .evaluation import Evaluation
from .loading import Images
from .methods import Adapted
from .report import RunReport, write_report
from .training import Outcome

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.json"
LIBRARIES = ("uora-vision", "torch", "timm", "albumentations", "accelerate", "peft", "numpy")
SAMPLES = 36


class OutputError(ValueError):
    """The output folder cannot be used; the message says what it holds and what to do."""


def prepare_folder(folder: Path | None, resume: bool, name: str) -> Path:
    """Name and check the folder of a run: a new one, or with `resume` the one that holds its checkpoint.

    Args:
        folder: as asked for; None for the first free one of `runs/NAME`, `runs/NAME-2`, ...

    Raises:
        OutputError: it holds a run already, or nothing to resume.
    """
    if folder is None:
        if resume:
            raise OutputError("--resume needs --output FOLDER, the folder of the run to go on with")
        numbered = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10**6))
        folder = next(path for path in numbered if not path.exists())
    if resume:
        if (folder / METRICS).exists():
            raise OutputError(f"the run in {folder} is finished; there is nothing to resume")
        read_checkpoint(folder / CHECKPOINT)
    elif folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a folder; give another --output")
    else:
        for held, what in ((METRICS, "a finished run"), (CHECKPOINT, "an unfinished run (--resume continues it)")):
            if (folder / held).exists():
                raise OutputError(f"{folder} holds {what}; give another --output, or delete it first")
    return folder


def finish(
    folder: Path,
    adapted: Adapted,
    outcome: Outcome,
    images: Images,
    config: dict[str, Any],
    title: str,
    subtitle: str,
    extra: dict[str, Any] | None = None,
    comparison: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write adapter, history, report and metrics; then the checkpoint may go.

    Args:
        images: those that `outcome.evaluation` is of.
        extra: more metrics.
        comparison: a row per method; see `RunReport`.

    Returns:
        The metrics.
    """
    assert outcome.evaluation is not None
    save_trained(adapted, folder / "adapter")
    metrics = measures(adapted, outcome) | (extra or {})
    metrics["adapter_folder_bytes"] = sum(file.stat().st_size for file in (folder / "adapter").iterdir())
    progress = outcome.progress
    _write_json(folder / "history.json", progress.history)
    layers, b, d = vectors(adapted)
    report = RunReport(
        title=title,
        subtitle=subtitle,
        config=config,
        metrics=metrics,
        history=progress.history,
        layers=layers,
        firings=outcome.reinit.history() if outcome.reinit else np.zeros((0, 3), dtype=np.int64),
        rank=adapted.options.rank or 0,
        steps=progress.step,
        b=b,
        d=d,
        confusion=confusion(outcome.evaluation, len(images.data.names)),
        names=list(images.data.names),
        samples=samples(images, outcome.evaluation),
        comparison=comparison,
    )
    write_report(report, folder / "report.html")
    # Last, because this file is what says that a run is finished.
    told = metrics if comparison is None else {**metrics, "comparison": comparison}
    _write_json(folder / METRICS, {**told, "config": config, "versions": versions()})
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return metrics


def measures(adapted: Adapted, outcome: Outcome) -> dict[str, Any]:
    """The numbers of a run: accuracy as a share, loss, sizes in parameters and bytes, times in seconds."""
    assert outcome.evaluation is not None
    return {
        "accuracy": outcome.evaluation.accuracy,
        "loss": outcome.evaluation.loss,
        "trained_parameters": adapted.trained,
        "trained_parameters_without_head": adapted.trained_without_head,
        "total_parameters": sum(p.numel() for p in adapted.model.parameters()),
        "adapter_bytes": adapted.adapter_bytes,
        "seconds_per_step": outcome.seconds_per_step,
        "seconds": outcome.progress.seconds,
        "peak_memory_bytes": outcome.peak_memory_bytes,
        "firings": outcome.reinit.firings if outcome.reinit else 0,
        "steps": outcome.progress.step,
        "epochs": len(outcome.progress.history),
        "device": outcome.device,
    }


def save_trained(adapted: Adapted, folder: Path) -> None:
    """UORA and VeRA in the package's form; of the other methods the trained parameters by name, for
    `model.load_state_dict(safetensors.torch.load_file(...), strict=False)` on a model prepared in the same way."""
    if adapted.is_uora:
        uora.save(adapted.base, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = to_bytes(adapted.trained_tensors(), metadata={"method": adapted.options.method.value})
    (folder / "trained.safetensors").write_bytes(content)


def vectors(adapted: Adapted) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """Names, b and d of every adapted projection; empty for methods that have none."""
    names: list[str] = []
    b: list[np.ndarray] = []
    d: list[np.ndarray] = []
    if not adapted.is_uora:
        return names, b, d
    for name, adapter in uora.adapters(adapted.base).items():
        rows = adapter.b.detach().cpu().split([role.rows for role in adapter.roles])
        for role, role_b, role_d in zip(adapter.roles, rows, adapter.d.detach().cpu(), strict=True):
            names.append(f"{name}.{role.name}")
            b.append(role_b.numpy())
            d.append(role_d.numpy())
    return names, b, d


def confusion(evaluation: Evaluation, classes: int) -> np.ndarray:
    """(classes, classes): how many images of each true class (row) got each prediction (column)."""
    counts = np.zeros((classes, max(classes, int(evaluation.predicted.max()) + 1)), dtype=np.int64)
    np.add.at(counts, (evaluation.labels, evaluation.predicted), 1)
    return counts[:, :classes]  # a kept head may have outputs that the data has no class for


def samples(images: Images, evaluation: Evaluation) -> list[tuple[np.ndarray, str, str, float]]:
    """Images spread evenly over the test set, with what they are and what the model says."""
    names = images.data.names
    chosen = np.linspace(0, len(images) - 1, min(SAMPLES, len(images))).round().astype(int)
    return [
        (
            images.picture(i),
            names[evaluation.labels[i]],
            names[p] if (p := int(evaluation.predicted[i])) < len(names) else f"output {p}",
            float(evaluation.confidence[i]),
        )
        for i in chosen.tolist()
    ]


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "uora-vision": uora.__version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write_json(path: Path, value: Any) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
