"""Classes in an order: of each step whether an image is above it, as in CORN (arXiv 2111.08851)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_cohen_kappa

from uora_vision.predict.answers import middle, rank_shares

from ..data.loading import Images
from .evaluation import Classification, Evaluation


@dataclass
class RankEvaluation(Evaluation):
    """As of classes; `predicted` is the class in the middle of the probabilities."""

    @property
    def scores(self) -> dict[str, float]:
        """The error counts ranks; kappa weighs them by their square, and is not a number where there is one rank."""
        predicted, labels = torch.from_numpy(self.predicted), torch.from_numpy(self.labels)
        classes = int(max(predicted.max(), labels.max())) + 1
        kappa = float("nan")
        if classes > 1:
            kappa = float(multiclass_cohen_kappa(predicted, labels, classes, weights="quadratic", validate_args=False))
        mae = float(np.abs(self.predicted - self.labels).mean())
        return {"mae": mae, "kappa": kappa} | super().scores


class Ordinal(Classification):
    """Telling the rank of an image, by K - 1 outputs for K ranks.

    Output k is the logit of "above rank k, given above rank k - 1", and the loss the negative logarithm of the
    probability of the true rank, which is the cross-entropy of those of these questions that arise.

    Args:
        tests, batch, workers: see `ImageTask`.
        weights: of the ranks in training, (ranks,); their mean over the training images is 1.
    """

    measures = ("mae", "kappa", "accuracy", "f1_macro", "loss")

    def __init__(self, tests: Images, batch: int = 64, workers: int = 0, weights: Tensor | None = None) -> None:
        super().__init__(tests, batch, workers, 0.0, weights)

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = rank_losses(logits, labels)
        return (losses if self.weights is None else losses * self.weights.to(logits.device)[labels]).mean()

    def told(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (middle(rank_shares(logits)) == labels).sum()

    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        shares = rank_shares(logits)
        predicted = middle(shares)
        confidence = shares.gather(1, predicted[:, None])[:, 0]
        return rank_losses(logits, labels).double(), labels, predicted, confidence

    def made(self, columns: Sequence[np.ndarray]) -> RankEvaluation:
        return RankEvaluation(*columns)


def rank_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits (n, K - 1) and ranks (n,) from 0: (n,)."""
    steps, ranks = torch.arange(logits.shape[1], device=logits.device), labels[:, None]
    each = nn.functional.binary_cross_entropy_with_logits(logits, (ranks > steps).float(), reduction="none")
    return (each * (ranks >= steps)).sum(1)
