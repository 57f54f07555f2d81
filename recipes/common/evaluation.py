"""What a model makes of every test image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader


@dataclass
class Evaluation:
    """Of every test image: true and predicted class, and the probability given to the prediction, each (n,)."""

    loss: float
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def accuracy(self) -> float:
        return float((self.labels == self.predicted).mean())


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> Evaluation:
    """Every test image once, in eval mode; the model is back in train mode afterwards."""
    model.eval()
    losses, labels_seen, predicted, confidence = [], [], [], []
    for inputs, labels in loader:
        logits = model(inputs.to(accelerator.device)).float().cpu()
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="none").double())
        best = logits.softmax(1).max(1)
        labels_seen.append(labels)
        predicted.append(best.indices)
        confidence.append(best.values)
    model.train()
    columns = [torch.cat(part).numpy() for part in (losses, labels_seen, predicted, confidence)]
    if accelerator.num_processes > 1:  # process p holds images p, p + processes, ...
        columns = [_interleave(gather_object([column])) for column in columns]
    return Evaluation(float(columns[0].mean()), *columns[1:])


def _interleave(parts: list[np.ndarray]) -> np.ndarray:
    whole = np.empty(sum(map(len, parts)), dtype=parts[0].dtype)
    for first, part in enumerate(parts):
        whole[first :: len(parts)] = part
    return whole
