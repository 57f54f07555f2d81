"""Classes that are rare: how much their images count, and how often they are drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def class_weights(labels: np.ndarray, classes: int) -> Tensor:
    """(classes,) float32 for images of classes (n,): as one over their number, with a mean of 1 over the images."""
    counts = np.bincount(labels, minlength=classes)
    return torch.tensor(len(labels) / np.count_nonzero(counts) / np.maximum(counts, 1), dtype=torch.float32)


def label_weights(labels: np.ndarray) -> Tensor:
    """(labels,) float32 for labels that are there or not (n, labels): images without it for each image with it."""
    with_it = labels.sum(0)
    return torch.tensor(np.maximum(len(labels) - with_it, 1) / np.maximum(with_it, 1), dtype=torch.float32)


def balanced_chances(labels: np.ndarray) -> np.ndarray:
    """(n,): how likely each image is drawn, so that all classes come equally often.

    Of images with several labels (n, labels) the rarest counts; those without any count as a class of their own.
    """
    if labels.ndim == 1:
        labels = np.eye(int(labels.max()) + 1)[labels]
    counts, none = labels.sum(0), ~labels.any(1)
    weights = (labels / np.maximum(counts, 1)).max(1)
    weights[none] = 1 / max(1, none.sum())
    return weights / weights.sum()
