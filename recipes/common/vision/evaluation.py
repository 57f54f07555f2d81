"""Classifying images: the loss, and what a model makes of every test image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..data.loading import Images, eval_loader
from ..report.trust import calibration, mistakes

SAMPLES = 36


@dataclass
class Evaluation:
    """Of every test image: true and predicted class, and the probability given to the prediction, each (n,)."""

    loss: float
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def scores(self) -> dict[str, float]:
        return {"accuracy": float((self.labels == self.predicted).mean()), "loss": self.loss}


class Classification:
    """The task of naming what is in an image.

    Args:
        tests: images to measure on.
        batch: images per evaluation step.
        workers: processes that read images.
        smoothing: share of a label that is spread over all classes, in training.
    """

    measures = ("accuracy", "loss")

    def __init__(self, tests: Images, batch: int = 64, workers: int = 0, smoothing: float = 0.0) -> None:
        self.tests, self.batch, self.workers, self.smoothing = tests, max(64, batch), workers, smoothing

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, int]:
        """Labels are classes (n,), or shares of classes (n, classes), of which the largest counts as the right one."""
        inputs, labels = batch
        logits = model(inputs).float()
        if labels.dim() > 1:
            loss, right = nn.functional.cross_entropy(logits, labels), labels.argmax(1)
        else:
            loss, right = nn.functional.cross_entropy(logits, labels, label_smoothing=self.smoothing), labels
        return loss, (logits.argmax(1) == right).sum(), len(labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Evaluation:
        """Every test image once, in eval mode; the model is back in train mode afterwards."""
        model.eval()
        part, parts = accelerator.process_index, accelerator.num_processes
        losses, labels_seen, predicted, confidence = [], [], [], []
        for inputs, labels in eval_loader(self.tests, self.batch, self.workers, part, parts):
            logits = model(inputs.to(accelerator.device)).float().cpu()
            losses.append(nn.functional.cross_entropy(logits, labels, reduction="none").double())
            best = logits.softmax(1).max(1)
            labels_seen.append(labels)
            predicted.append(best.indices)
            confidence.append(best.values)
        model.train()
        columns = [torch.cat(part).numpy() for part in (losses, labels_seen, predicted, confidence)]
        if parts > 1:  # process p holds images p, p + processes, ...
            columns = [_interleave(gather_object([column])) for column in columns]
        return Evaluation(float(columns[0].mean()), *columns[1:])


def _interleave(parts: list[np.ndarray]) -> np.ndarray:
    whole = np.empty(sum(map(len, parts)), dtype=parts[0].dtype)
    for first, part in enumerate(parts):
        whole[first :: len(parts)] = part
    return whole


def sections(images: Images, evaluation: Evaluation) -> dict[str, Any]:
    """The parts of a report that show classified images."""
    names = list(images.data.names)
    right = evaluation.labels == evaluation.predicted
    return {
        "mistakes": pictures(images, evaluation, mistakes(evaluation.confidence, right)),
        "trusted": calibration(evaluation.confidence, right)[1],
        "confusion": confusion(evaluation, len(names)),
        "names": names,
        "samples": samples(images, evaluation),
    }


def confusion(evaluation: Evaluation, classes: int) -> np.ndarray:
    """(classes, classes): how many images of each true class (row) got each prediction (column)."""
    counts = np.zeros((classes, max(classes, int(evaluation.predicted.max()) + 1)), dtype=np.int64)
    np.add.at(counts, (evaluation.labels, evaluation.predicted), 1)
    return counts[:, :classes]  # a kept head may have outputs that the data has no class for


def samples(images: Images, evaluation: Evaluation) -> list[tuple[np.ndarray, str, str, float]]:
    """Images spread evenly over the test set, with what they are and what the model says."""
    chosen = np.linspace(0, len(images) - 1, min(SAMPLES, len(images))).round().astype(int)
    return pictures(images, evaluation, chosen.tolist())


def pictures(images: Images, evaluation: Evaluation, chosen: Sequence[int]) -> list[tuple[np.ndarray, str, str, float]]:
    """Some images, with what they are and what the model says."""
    names = images.data.names
    return [
        (
            images.picture(i),
            names[evaluation.labels[i]],
            names[p] if (p := int(evaluation.predicted[i])) < len(names) else f"output {p}",
            float(evaluation.confidence[i]),
        )
        for i in chosen
    ]
