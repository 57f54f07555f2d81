"""Images to train on and images to measure, as one data set: the same classes on both sides, and nothing unreadable."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from uora_vision.predict.pixels import inspect

from ..errors import DataError
from .images import ImageSet, load_images


@dataclass(frozen=True)
class Splits:
    """Images to train on and to measure.

    Args:
        train, test: with the same classes, in the same order.
        digest: of the content, class and order of every image.
        unreadable: images that were left out.
        notes: what a person should know, in sentences.
        held_out: whether those to measure were held out of those to train on.
        scale: mean and deviation of each number to be learned, which the labels are normalised by.
    """

    train: ImageSet
    test: ImageSet
    digest: str
    unreadable: int
    notes: tuple[str, ...]
    held_out: bool = False
    scale: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Readable:
    """The images that can be read, why others cannot, and a digest of all."""

    data: ImageSet
    reasons: Sequence[str]
    digest: str


def load_splits(
    source: str,
    classes: Sequence[int | str] | None = None,
    *,
    validation: float = 0,
    shots: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> Splits:
    """Load images to train on and to measure, and look at every one of them.

    Classes are those of the training images; test images belong to the class of the same name.

    Args:
        source: see `load_images`.
        classes: only these; numbers count the classes of the training images.
        validation: measure on this share of the training images; 0 for the test images.
        shots: at most so many training images of every class.
        seed: of what is held out and drawn.
        strict: stop at an image that cannot be read; otherwise it is left out and counted.

    Raises:
        DataError: see `load_images`; fewer than two classes; test images of a class that has no training image, or
            no test image at all; with `strict` an image that cannot be read.
    """
    train = load_images(source, "train", classes)
    held = None
    if validation:
        train, held = train.split(validation, seed)
    if shots:
        train = train.few_shot(shots, seed)
    seen = readable(train, strict)
    tests = match(train, load_images(source, "test"), source, classes is not None) if held is None else held
    return replace(join(seen, readable(tests, strict), source), held_out=held is not None)


def match(train: ImageSet, test: ImageSet, source: str, some: bool = False) -> ImageSet:
    """The test images, with the classes of the training images.

    Args:
        some: other classes are left out; otherwise they are an error.

    Raises:
        DataError: there are test images of a class that the training images do not have.
    """
    strange = [name for name in test.without(present=True) if name not in train.names]
    if strange and not some:
        raise DataError(
            f"{source} has test images of {told(strange)}, of which there are no training images; add some, or "
            "choose with --classes"
        )
    return test.as_classes(train.names)


def join(seen: Readable, measured: Readable, source: str) -> Splits:
    """Hold what can be read against the classes.

    Raises:
        DataError: as `load_splits`.
    """
    train, test = seen.data, measured.data
    reasons, digests = [*seen.reasons, *measured.reasons], (seen.digest, measured.digest)
    notes = [*train.notes, *test.notes]
    if reasons:
        notes.append(f"{counted(reasons, len(train) + len(test))}; they are left out")
    why = f"; {reasons[0]}" if reasons else ""
    if len(train.names) < 2:
        raise DataError(
            f"{source} has 1 class to train on, {train.names[0]!r}; at least 2 are needed, as a folder or a label each"
        )
    empty, unmeasured = train.without(), test.without()
    if impossible := [name for name in empty if name not in unmeasured]:
        raise DataError(f"{source} has no training image of {told(impossible)}, but test images of it{why}")
    if len(train) == 0 or len(test) == 0:
        raise DataError(f"{source} has no {'test' if len(train) else 'training'} image of the classes asked for{why}")
    if len(empty) > len(train.names) - 2:
        raise DataError(f"{source} has no training image of {told(empty)}; at least 2 classes are needed{why}")
    if empty:
        notes.append(f"{source} has no image of {told(empty)}")
    if unseen := [name for name in unmeasured if name not in empty]:
        notes.append(f"{source} has no test image of {told(unseen)}: how well it is known is not measured")
    digest = hashlib.sha256(f"{train.names} {digests}".encode()).hexdigest()
    return Splits(train, test, digest, len(reasons), tuple(dict.fromkeys(notes)))


def readable(data: ImageSet, strict: bool = False) -> Readable:
    """Read every image to its end.

    Raises:
        DataError: no image can be read, or with `strict` one of them cannot.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders work without Python's lock
        found = list(pool.map(inspect, data.items))
    digest = hashlib.sha256(repr([*zip(found, data.labels.tolist(), strict=True)]).encode()).hexdigest()
    wrong = {index: reason for index, (_, reason) in enumerate(found) if reason is not None}
    reasons = [f"cannot read {data.name(index)}: {reason}" for index, reason in wrong.items()]
    if reasons and (strict or len(reasons) == len(data)):
        raise DataError(f"{counted(reasons, len(data) - len(reasons))}. Remove or replace them.")
    kept = data.take([index for index in range(len(data)) if index not in wrong]) if wrong else data
    return Readable(kept, reasons, digest)


def counted(reasons: Sequence[str], others: int) -> str:
    return f"{len(reasons)} of {len(reasons) + others} images cannot be read; {reasons[0]}"


def told(names: Sequence[str], kind: str = "class") -> str:
    shown, many = ", ".join(map(repr, names[:5])), {"class": "classes"}.get(kind, f"{kind}s")
    return f"the {kind} {shown}" if len(names) == 1 else f"{len(names)} {many}, {shown}{', ...' * (len(names) > 5)}"
