"""Labels of an image, any number of which may be there: a yes or no for each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multilabel_average_precision,
    multilabel_f1_score,
    multilabel_precision,
    multilabel_recall,
)

from uora_vision.predict.answers import CUTOFF

from ..data.loading import Images
from .evaluation import ImageTask, Measured


@dataclass
class LabelEvaluation(Measured):
    """Which labels are there (n, labels), 0 or 1, and the probability of each (n, labels)."""

    shares: np.ndarray

    def per_label(self, metric: Any, said: np.ndarray) -> np.ndarray:
        """A metric of torchmetrics of each label, (labels,)."""
        count, labels = self.shares.shape[1], torch.from_numpy(self.labels).long()
        with warnings.catch_warnings():  # of labels that no test image has, which are left out
            warnings.simplefilter("ignore")
            found = metric(torch.from_numpy(said), labels, count, average=None, validate_args=False)
        return np.atleast_1d(found.numpy())

    @property
    def scores(self) -> dict[str, float]:
        """Means over labels are of those that have test images; without any, they are not a number."""
        said, found = self.shares >= CUTOFF, self.parts
        both, all_of_them = (said * self.labels).sum(), said.sum() + self.labels.sum()
        return {
            "map": _mean(found["average_precision"]),
            "f1_macro": _mean(found["f1"]),
            "f1_micro": float(2 * both / all_of_them) if all_of_them else float("nan"),
            "label_accuracy": float((said == self.labels).mean()),
            "loss": self.loss,
        }

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """Of each label that has test images."""
        metrics = {"f1": multilabel_f1_score, "precision": multilabel_precision, "recall": multilabel_recall}
        found = {"average_precision": self.per_label(multilabel_average_precision, self.shares)}
        said = (self.shares >= CUTOFF).astype(np.int64)
        found |= {name: self.per_label(metric, said) for name, metric in metrics.items()}
        return {name: np.where(self.labels.any(0), values, np.nan) for name, values in found.items()}

    def images(self, names: tuple[str, ...]) -> dict[str, int]:
        return dict(zip(names, self.labels.sum(0).tolist(), strict=True))

    worst = "average_precision"
    caption = f"A label counts as there from a probability of {CUTOFF:g}; average precision asks for no such limit. "


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


class MultiLabel(ImageTask):
    """Telling which labels an image has, each by itself.

    Args:
        tests, batch, workers: see `ImageTask`.
        weights: in training, of the images that have a label against those that have not, (labels,).
    """

    measures = ("map", "f1_macro", "f1_micro", "label_accuracy", "loss")
    running = "label_accuracy"

    def __init__(self, tests: Images, batch: int = 64, workers: int = 0, weights: Tensor | None = None) -> None:
        super().__init__(tests, batch, workers)
        self.weights = weights

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights.to(logits.device)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights)

    def told(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits.sigmoid() >= CUTOFF) == (labels >= 0.5)).float().mean(1).sum()

    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return losses.mean(1).double(), labels.round().long(), logits.sigmoid()

    def made(self, columns: Sequence[np.ndarray]) -> LabelEvaluation:
        return LabelEvaluation(*columns)

    def words(self, evaluation: LabelEvaluation, index: int) -> tuple[str, str, float]:
        """How sure: of the label that is least so."""
        shares = evaluation.shares[index]
        there = (evaluation.labels[index] > 0, shares >= CUTOFF)
        true, said = (
            ", ".join(n for n, is_there in zip(self.tests.data.names, flags, strict=True) if is_there) or "no label"
            for flags in there
        )
        return true, said, float(np.maximum(shares, 1 - shares).min())

    def about(self) -> dict[str, Any]:
        return {"labels": self.tests.data.names, "cutoff": CUTOFF}
