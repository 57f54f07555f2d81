"""Learning something of images: the loss, and what a model makes of every test image. Here: their class."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_f1_score

from ..data.loading import Images, eval_loader
from ..report.trust import calibration, mistakes

SAMPLES = 36
Sample = tuple[np.ndarray, str, str, float | None]
"""A test image, what it is, what the model says, and how sure that is."""


@dataclass
class Measured:
    """What a model says of every test image, a row of each array for each: the loss, the truth, and more."""

    losses: np.ndarray
    labels: np.ndarray

    @property
    def loss(self) -> float:
        return float(self.losses.mean())

    @property
    @abstractmethod
    def scores(self) -> dict[str, float]:
        """What is measured, by name."""

    @property
    @abstractmethod
    def parts(self) -> dict[str, np.ndarray]:
        """What is measured of each class, label or target, by name (parts,); not a number where nothing tells it. There
        may be fewer, or more, than have names."""

    @abstractmethod
    def images(self, names: tuple[str, ...]) -> dict[str, int]:
        """How many test images tell of each of these classes, labels or targets."""

    worst: ClassVar[str | None] = "f1"
    """By what of `parts` one is worse than another: the less of it, the worse. None where nothing tells."""
    caption = ""
    """How to read `parts`."""

    def take(self, rows: np.ndarray) -> Self:
        """Of these images, some of them more than once."""
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(**{name: v[rows] if isinstance(v, np.ndarray) else v for name, v in held.items()})


@dataclass
class Evaluation(Measured):
    """The true and the predicted class, and the probability given to the prediction, each (n,).

    `classes` is how many there are; by default, as many as are there or predicted.
    """

    predicted: np.ndarray
    confidence: np.ndarray
    classes: int = 0

    def __post_init__(self) -> None:
        self.classes = self.classes or int(max(self.predicted.max(), self.labels.max())) + 1

    @property
    def scores(self) -> dict[str, float]:
        """F1 is a mean over the classes that are there or predicted."""
        right, present = self.labels == self.predicted, np.union1d(self.labels, self.predicted)
        return {"accuracy": float(right.mean()), "f1_macro": float(self.f1[present].mean()), "loss": self.loss}

    @property
    def parts(self) -> dict[str, np.ndarray]:
        return {"f1": np.where(np.bincount(self.labels, minlength=len(self.f1)) > 0, self.f1, np.nan)}

    def images(self, names: tuple[str, ...]) -> dict[str, int]:
        return dict(zip(names, np.bincount(self.labels, minlength=len(names)).tolist(), strict=True))

    @cached_property
    def f1(self) -> np.ndarray:
        """Of each class; 0 of one that is neither there nor predicted."""
        predicted, labels = torch.from_numpy(self.predicted), torch.from_numpy(self.labels)
        if self.classes < 2:
            return np.ones(1)
        return multiclass_f1_score(predicted, labels, self.classes, average=None, validate_args=False).numpy()


class ImageTask:
    """Something to learn of images.

    Args:
        tests: images to measure on.
        batch: images per evaluation step.
        workers: processes that read images.
    """

    measures: tuple[str, ...]
    running = "accuracy"

    def __init__(self, tests: Images, batch: int = 64, workers: int = 0) -> None:
        self.tests, self.batch, self.workers = tests, max(64, batch), workers

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, int]:
        inputs, labels = batch
        logits = model(inputs).float()
        return self.mean_loss(logits, labels), self.told(logits, labels), len(labels)

    @abstractmethod
    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """In training; a mean over images, so that parts of a batch add up to it."""

    @abstractmethod
    def told(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of `running` over images."""

    @abstractmethod
    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """What is kept of test images, in the order of the fields of `made`."""

    @abstractmethod
    def made(self, columns: Sequence[np.ndarray]) -> Measured:
        """What was kept of all of them."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Any:
        """Every test image once, in eval mode; the model is back in train mode afterwards."""
        model.eval()
        part, parts = accelerator.process_index, accelerator.num_processes
        seen = []
        for inputs, labels in eval_loader(self.tests, self.batch, self.workers, part, parts):
            seen.append(self.measured(model(inputs.to(accelerator.device)).float().cpu(), labels))
        model.train()
        columns = [torch.cat(column).numpy() for column in zip(*seen, strict=True)]
        if parts > 1:  # process p holds images p, p + processes, ...
            columns = [_interleave(gather_object([column])) for column in columns]
        return self.made(columns)

    def samples(self, evaluation: Any) -> list[Sample]:
        """Images spread evenly over the test set, with what they are and what the model says."""
        chosen = np.linspace(0, len(self.tests) - 1, min(SAMPLES, len(self.tests))).round().astype(int)
        return self.pictures(evaluation, chosen.tolist())

    def pictures(self, evaluation: Any, chosen: Sequence[int]) -> list[Sample]:
        """Some images, with what they are and what the model says."""
        return [(self.tests.picture(i), *self.words(evaluation, i)) for i in chosen]

    @abstractmethod
    def words(self, evaluation: Any, index: int) -> tuple[str, str, float | None]:
        """What a test image is, what the model says, and how sure that is."""

    def sections(self, evaluation: Any) -> dict[str, Any]:
        """The parts of a report that show test images."""
        return {"samples": self.samples(evaluation)}

    def about(self) -> dict[str, Any]:
        """What the adapter must say of it; see `described`."""
        return {"labels": self.tests.data.names}


class Classification(ImageTask):
    """Naming the class of an image.

    Args:
        tests, batch, workers: see `ImageTask`.
        smoothing: share of a label that is spread over all classes, in training.
        weights: of the classes in training, (classes,); their mean over the training images is 1.
    """

    measures = ("accuracy", "f1_macro", "loss")

    def __init__(
        self, tests: Images, batch: int = 64, workers: int = 0, smoothing: float = 0.0, weights: Tensor | None = None
    ) -> None:
        super().__init__(tests, batch, workers)
        self.smoothing, self.weights = smoothing, weights

    def mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Labels are classes (n,), or shares of classes (n, classes)."""
        smoothing = self.smoothing if labels.dim() == 1 else 0.0
        if self.weights is None:
            return nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        weights = torch.ones(logits.shape[1], device=logits.device)  # a kept head may have outputs without a class
        weights[: len(self.weights)] = self.weights.to(logits.device)
        return nn.functional.cross_entropy(logits, labels, weights, label_smoothing=smoothing, reduction="none").mean()

    def told(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of shares the largest counts as the right one."""
        return (logits.argmax(1) == (labels.argmax(1) if labels.dim() > 1 else labels)).sum()

    def measured(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        best = logits.softmax(1).max(1)
        return nn.functional.cross_entropy(logits, labels, reduction="none").double(), labels, best.indices, best.values

    def made(self, columns: Sequence[np.ndarray]) -> Evaluation:
        return Evaluation(*columns)

    def words(self, evaluation: Evaluation, index: int) -> tuple[str, str, float]:
        names, predicted = self.tests.data.names, int(evaluation.predicted[index])
        shown = names[predicted] if predicted < len(names) else f"output {predicted}"
        return names[evaluation.labels[index]], shown, float(evaluation.confidence[index])

    def sections(self, evaluation: Evaluation) -> dict[str, Any]:
        names = list(self.tests.data.names)
        right = evaluation.labels == evaluation.predicted
        return {
            "mistakes": self.pictures(evaluation, mistakes(evaluation.confidence, right)),
            "trusted": calibration(evaluation.confidence, right)[1],
            "confusion": confusion(evaluation, len(names)),
            "names": names,
            "samples": self.samples(evaluation),
        }


def sections(images: Images, evaluation: Evaluation) -> dict[str, Any]:
    """The parts of a report that show classified images."""
    return Classification(images).sections(evaluation)


def confusion(evaluation: Evaluation, classes: int) -> np.ndarray:
    """(classes, classes): how many images of each true class (row) got each prediction (column)."""
    counts = np.zeros((classes, max(classes, int(evaluation.predicted.max()) + 1)), dtype=np.int64)
    np.add.at(counts, (evaluation.labels, evaluation.predicted), 1)
    return counts[:, :classes]  # a kept head may have outputs that the data has no class for


def _interleave(parts: list[np.ndarray]) -> np.ndarray:
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    for first, part in enumerate(parts):
        whole[first :: len(parts)] = part
    return whole
