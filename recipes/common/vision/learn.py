"""What an image recipe learns, by the word of `--task`."""

from __future__ import annotations

from ..command.choices import Target
from ..command.options import ImageChoice
from ..data.loading import Images
from ..data.splits import Splits
from .balance import class_weights, label_weights
from .evaluation import Classification, ImageTask
from .multilabel import MultiLabel
from .ordinal import Ordinal
from .regression import Regression


def outputs(task: Target, names: tuple[str, ...]) -> int:
    """How many outputs the model needs for these classes, labels or numbers."""
    return len(names) - (task is Target.ordinal)


def make_task(options: ImageChoice, splits: Splits, tests: Images) -> ImageTask:
    """The loss and the measures of what is learned.

    Args:
        splits: what the model learns.
        tests: the images to measure, as the model reads them.
    """
    labels, names = splits.train.labels, splits.train.names
    how, weigh = (tests, options.batch, options.workers), options.class_weights == "balanced"
    match options.task:
        case Target.multilabel:
            return MultiLabel(*how, label_weights(labels) if weigh else None)
        case Target.regression:
            assert splits.scale is not None
            return Regression(*how, splits.scale)
        case Target.ordinal:
            return Ordinal(*how, class_weights(labels, len(names)) if weigh else None)
        case Target.classification:
            return Classification(*how, options.smoothing, class_weights(labels, len(names)) if weigh else None)
