"""The embedded example: a tiny ViT learns half of the handwritten digits, and every method adapts it to the others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import timm
import torch
from rich.table import Table
from torch import nn

from .augment import Domain, DomainShift, InputFormat, ModelInput
from .data import load_images
from .display import Display
from .loading import Images
from .methods import Adapted, Defaults, Method, MethodOptions, apply_method
from .results import finish, measures
from .training import Outcome, TrainOptions, train

FORM = InputFormat((8, 8), (0.3, 0.3, 0.3), (0.35, 0.35, 0.35))
MODEL = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
}
OLD, NEW = range(5), range(5, 10)
SHOTS = 20
ROWS = {  # rank and learning rates, chosen on training images of the digits 5 to 9 that the runs below never see
    Method.linear: Defaults(None, 0.05, 0.05),
    Method.bitfit: Defaults(None, 0.03, 0.05),
    Method.lora: Defaults(4, 0.01, 0.01),
    Method.vera: Defaults(64, 0.05, 0.01),
    Method.uora: Defaults(64, 0.05, 0.01),
    Method.full: Defaults(None, 0.002, 0.01),
}
PRETRAINING = TrainOptions(epochs=24, batch=32, eval_every=8)
ADAPTATION = TrainOptions(epochs=30, batch=25, eval_every=5)


def run_demo(folder: Path, seed: int, display: Display) -> None:
    """Pretrain, adapt with every method, and write the report of the UORA run with all of them side by side."""
    display.say(f"Pretraining a tiny ViT on the digits {OLD[0]} to {OLD[-1]} (8 x 8 pixels, from scikit-learn).")
    backbone = pretrain(seed, display)
    save_backbone(backbone, folder / "backbone")
    runs: dict[Method, tuple[Adapted, Outcome, Images]] = {}
    for method in ROWS:
        runs[method] = adapt(backbone, method, seed, Display(display.console, quiet=True))
        accuracy = measures(*runs[method][:2])["accuracy"]
        display.say(f"adapted to the digits {NEW[0]} to {NEW[-1]} with {method}: {accuracy:.1%}")
    comparison = [{"method": method.value, **_columns(*run[:2])} for method, run in runs.items()]
    adapted, outcome, tests = runs[Method.uora]
    chosen = {key: getattr(adapted.options, key) for key in ("rank", "targets", "lr", "head_lr", "threshold", "alpha")}
    config = {
        "data": "digits",
        "pretrained_on": f"{OLD[0]}-{OLD[-1]}",
        "classes": f"{NEW[0]}-{NEW[-1]}",
        "shots": SHOTS,
        "method": Method.uora.value,
        **chosen,
        "reinit": adapted.options.scope.value,
        "epochs": ADAPTATION.epochs,
        "batch": ADAPTATION.batch,
        "seed": seed,
    }
    about = (
        f"A ViT of {sum(p.numel() for p in backbone.parameters()):,} parameters was pretrained on the digits 0 to 4 "
        f"and adapted to 5 to 9 with {SHOTS} images of each; measured on {len(tests)} others, which leaves about "
        f"{50 / len(tests) ** 0.5:.0f} points of chance in every accuracy."
    )
    finish(folder, adapted, outcome, tests, config, "UORA on handwritten digits", about, comparison=comparison)
    display.say(_table(comparison))
    display.say(f"Report: {folder / 'report.html'}")


def pretrain(seed: int, display: Display) -> nn.Module:
    """A ViT trained from nothing on the digits 0 to 4."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(OLD), **MODEL)
    adapted = apply_method(model, MethodOptions(Method.full, None, lr=5e-3, head_lr=5e-3, weight_decay=0.05))
    images = [_images(split, OLD, None, seed) for split in ("train", "test")]
    train(adapted, *images, PRETRAINING, display=Display(display.console, display.quiet, "pretraining, epoch"))
    return model.eval()


def adapt(backbone: nn.Module, method: Method, seed: int, display: Display) -> tuple[Adapted, Outcome, Images]:
    """A copy of the backbone with a new head, adapted to the digits 5 to 9."""
    torch.manual_seed(seed)
    model = copy.deepcopy(backbone)
    model.reset_classifier(len(NEW))
    row = ROWS[method]
    options = MethodOptions(method, row.rank, lr=row.lr, head_lr=row.head_lr, seed=seed)
    adapted = apply_method(model, options)
    tests = _images("test", NEW, None, seed)
    return adapted, train(adapted, _images("train", NEW, SHOTS, seed), tests, ADAPTATION, display=display), tests


def save_backbone(model: nn.Module, folder: Path) -> None:
    """In timm's form, for `--model local-dir:FOLDER`."""
    model.pretrained_cfg.update(mean=FORM.mean, std=FORM.std, input_size=(3, *FORM.size))
    timm.models.save_for_hf(model, folder, model_config={"model_args": MODEL}, safe_serialization=True)


def _images(split: str, classes: range, shots: int | None, seed: int) -> Images:
    data = load_images("digits", split, list(classes))
    data = data if shots is None else data.few_shot(shots, seed)
    return Images(data, DomainShift(Domain.none), ModelInput(FORM), seed)


def _columns(adapted: Adapted, outcome: Outcome) -> dict[str, Any]:
    numbers = measures(adapted, outcome)
    keys = (
        "accuracy",
        "trained_parameters",
        "trained_parameters_without_head",
        "adapter_bytes",
        "seconds_per_step",
        "firings",
    )
    return {key: numbers[key] for key in keys}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("method", title=f"digits {NEW[0]} to {NEW[-1]}, {SHOTS} images each")
    for name in ("accuracy", "trained", "without head", "adapter kB", "ms per step", "re-drawn"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['accuracy']:.1%}",
            f"{row['trained_parameters']:,}",
            f"{row['trained_parameters_without_head']:,}",
            f"{row['adapter_bytes'] / 1000:.1f}",
            f"{1000 * row['seconds_per_step']:.1f}",
            f"{row['firings']:,}",
        )
    return table
