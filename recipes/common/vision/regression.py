"""Numbers of an image, learned with mean 0 and deviation 1, and told in their own units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional import mean_absolute_error, mean_squared_error, r2_score

from ..data.loading import Images
from ..report.scatter import picture
from .evaluation import ImageTask, Measured

MOST_PICTURES = 6
"""In a report, one for a target."""


@dataclass
class NumberEvaluation(Measured):
    """True and predicted numbers, each (n, targets) float64 in their own units."""

    predicted: np.ndarray

    @property
    def scores(self) -> dict[str, float]:
        """Means over the targets."""
        return {name: float(self.parts[name].mean()) for name in ("mae", "rmse", "r2")} | {"loss": self.loss}

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """Of each target. R² is not a number where all test images have the same."""
        pairs = list(zip(torch.from_numpy(self.predicted).T, torch.from_numpy(self.labels).T, strict=True))
        return {
            "mae": np.array([float(mean_absolute_error(*pair)) for pair in pairs]),
            "rmse": np.array([float(mean_squared_error(*pair, squared=False)) for pair in pairs]),
            "r2": np.array([float(r2_score(p, t)) if len(t) > 1 and t.std() > 0 else np.nan for p, t in pairs]),
        }

    def images(self, names: tuple[str, ...]) -> dict[str, int]:
        return dict.fromkeys(names, len(self.labels))

    worst = None  # units may differ
    caption = "Errors are in the unit of each target. "


class Regression(ImageTask):
    """Telling numbers of an image.

    Args:
        tests, batch, workers: see `ImageTask`.
        scale: mean and deviation of each number, (targets,) both; the labels of `tests` are normalised by them.
    """

    running = "mae"

    def __init__(self, tests: Images, batch: int, workers: int, scale: tuple[np.ndarray, np.ndarray]) -> None:
        super().__init__(tests, batch, workers)
        self.mean, self.std = scale
        errors = ("mae", "rmse", "r2", "loss")
        self.measures = errors if len(self.mean) == 1 else ("r2", *(n for n in errors if n != "r2"))  # units may differ

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.mse_loss(logits, labels)

    def told(self, logits: Tensor, labels: Tensor) -> Tensor:
        std = torch.tensor(self.std, dtype=torch.float32, device=logits.device)
        return ((logits - labels).abs() * std).mean(1).sum()

    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        mean, std = torch.from_numpy(self.mean), torch.from_numpy(self.std)
        losses = (logits - labels).double().square().mean(1)
        return losses, labels.double() * std + mean, logits.double() * std + mean

    def made(self, columns: Sequence[np.ndarray]) -> NumberEvaluation:
        return NumberEvaluation(*columns)

    def words(self, evaluation: NumberEvaluation, index: int) -> tuple[str, str, None]:
        true, said = (
            ", ".join(f"{value:.4g}" for value in values[index]) for values in (evaluation.labels, evaluation.predicted)
        )
        return true, said, None

    def sections(self, evaluation: NumberEvaluation) -> dict[str, Any]:
        pairs = zip(self.tests.data.names, evaluation.labels.T, evaluation.predicted.T, strict=True)
        return super().sections(evaluation) | {"pictures": [picture(*pair) for pair in pairs][:MOST_PICTURES]}

    def about(self) -> dict[str, Any]:
        scale = {"target_mean": self.mean.tolist(), "target_std": self.std.tolist()}
        return {"labels": None, "targets": list(self.tests.data.names), **scale}
