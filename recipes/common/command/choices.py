"""What an option of a recipe can be, without what takes seconds to import."""

from __future__ import annotations

from enum import StrEnum


class Method(StrEnum):
    uora = "uora"
    vera = "vera"
    vera_peft = "vera-peft"
    lora = "lora"
    linear = "linear"
    full = "full"
    bitfit = "bitfit"

    @property
    def shown(self) -> str:
        """Its name as people write it."""
        return METHODS[self.value]


METHODS = {
    "uora": "UORA", "vera": "VeRA", "vera-peft": "PEFT's VeRA", "lora": "LoRA", "linear": "Linear head",
    "full": "Full fine-tuning", "bitfit": "BitFit",
}  # fmt: skip


class Scope(StrEnum):
    """Which layers a redrawn direction changes. `never` redraws none; `informed` takes rows of A from the gradient of
    the first batches, before training, and redraws none."""

    never = "never"
    informed = "informed"
    shared = "shared"
    quorum = "quorum"
    layer = "layer"


class Augment(StrEnum):
    """What varies in the training images: nothing, the position, the position and left-right, or also the size."""

    none = "none"
    crop = "crop"
    flip = "crop+flip"
    resized = "resized-crop+flip"


class Domain(StrEnum):
    """A fixed change of every image, training and test, that makes another domain of a data set."""

    none = "none"
    invert = "invert"
    rotate = "rotate"
    noise = "noise"


class Target(StrEnum):
    """What is told of an image: its class, labels of which any number may be there, numbers, or one of ordered
    classes."""

    classification = "classification"
    multilabel = "multilabel"
    regression = "regression"
    ordinal = "ordinal"

    @property
    def one_class(self) -> bool:
        """Whether every image has one class."""
        return self in (Target.classification, Target.ordinal)


class Tower(StrEnum):
    frozen = "frozen"
    uora = "uora"
    full = "full"
