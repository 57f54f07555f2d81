"""Images of a table, to train on and to measure: of one class each, of ranks, of several labels, or of numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from uora_vision.predict.frames import as_text
from uora_vision.predict.image_table import ImageTable, read_image_table, shown

from ..command.choices import Target
from ..command.options import ImageChoice
from ..errors import DataError
from .images import ImageSet, parse_classes
from .labels import number as as_number
from .splits import Splits, counted, join, readable, told

HELD_OUT = 0.2
"""Share of the images to measure, where no column says which."""
SEPARATORS = ("|", ";", ",")
NONE = "that there is none, columns of 0 and 1 can say, or an empty list in json and parquet"
YES, NO = {"1", "1.0", "true"}, {"0", "0.0", "false"}


def load_labelled(options: ImageChoice) -> Splits:
    """Images of a table, each looked at.

    Raises:
        DataError: a column, an image or a label cannot be used, or there is too little of something.
    """
    source = options.data
    table = read_image_table(Path(source), options.path_column, options.split_column)
    data = _targets(table, options)
    sides, share, seed = table.sides(), options.validation, options.seed
    held = sides is None or bool(share)
    notes: list[str] = []
    if sides is not None:
        train, tests, notes = data.take(sides[0]), data.take(sides[1]), sides[2]
    else:
        train = tests = data
        notes.append(f"{source} has no column of splits: {share or HELD_OUT:.0%} of its images are held out to measure")
    if options.task.one_class and options.classes is not None:
        asked, before = parse_classes(options.classes) or [], len(data)
        data, train, tests = (some.keep_classes(asked) for some in (data, train, tests))
        if len(data) < before:
            notes.append(f"{before - len(data)} images of {source} are of other classes, and left out")
    if held:
        train, tests = train.split(share or HELD_OUT, seed) if options.task.one_class else _split(train, options)
    if options.shots:
        train = train.few_shot(options.shots, seed)
    if not len(train) or not len(tests):
        raise DataError(f"{len(data)} images of {source} leave none to {'measure' if len(train) else 'train on'}")
    seen, measured = readable(train, options.strict), readable(tests, options.strict)
    if options.task.one_class:
        splits = join(seen, measured, source)
        splits = replace(splits, notes=(*notes, *splits.notes), held_out=held)
        return in_order(splits, source, options.classes) if options.task is Target.ordinal else splits
    reasons = [*seen.reasons, *measured.reasons]
    if reasons:
        notes.append(f"{counted(reasons, len(seen.data) + len(measured.data))}; they are left out")
    digest = hashlib.sha256(f"{data.names} {(seen.digest, measured.digest)}".encode()).hexdigest()
    splits = Splits(seen.data, measured.data, digest, len(reasons), tuple(notes), held)
    return _normalised(splits, source) if options.task is Target.regression else _known(splits, source)


def in_order(splits: Splits, source: str, classes: str | None) -> Splits:
    """Images of ordered classes: in the order asked for, else by their numbers.

    Raises:
        DataError: the classes are words, and no order was asked for.
    """
    names = splits.train.names
    if classes is None:
        numbers = [as_number(name) for name in names]
        if words := [name for name, number in zip(names, numbers, strict=True) if number is None]:
            raise DataError(
                f"the classes of {source} are words, {shown(words)}, whose order nobody knows; give it with "
                f"--classes {','.join(names[:3])}{',...' * (len(names) > 3)}"
            )
        names = tuple(sorted(names, key=float))
    train, test = splits.train.as_classes(names), splits.test.as_classes(names)
    digest = hashlib.sha256(f"{names} {splits.digest}".encode()).hexdigest()
    return replace(splits, train=train, test=test, digest=digest)


def _targets(table: ImageTable, options: ImageChoice) -> ImageSet:
    """All images of a table, with their targets."""
    asked = options.target_names
    match options.task:
        case Target.multilabel:
            labels, names = _labels(table, asked, options.separator)
            if options.classes is not None:
                names, labels = _some(labels, names, options.classes, table.source)
        case Target.regression:
            names = tuple(table.named(name, "--target-columns") for name in asked or (None,))
            labels = np.array([_numbers(table, name) for name in names]).T
        case _:
            column = table.named(asked[0] if asked else None, "--target-columns")
            texts = [as_text(value) for value in table.columns[column]]
            _need(table, column, [text == "" for text in texts], "has no label")
            if options.task is Target.ordinal:
                texts = [_plain(text) for text in texts]
            names = _sorted(texts)
            places = {name: place for place, name in enumerate(names)}
            labels = np.array([places[text] for text in texts], dtype=np.int64)
    return ImageSet(table.items, labels, names)


def _labels(table: ImageTable, asked: Sequence[str], separator: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """(images, labels) of 0 and 1, and the names: of columns of 0 and 1, or of one column that has the labels."""
    names = tuple(table.named(name, "--target-columns") for name in asked)
    if not names:
        try:
            names = (table.named(None),)
        except DataError:
            names = tuple(table.columns)
            if not names or not all(_flags(table, name).count(None) == 0 for name in names):
                raise DataError(
                    f"{table.source} has no column 'label', and not only 0 and 1 in its others, {shown(names)}; "
                    "--target-columns names those to learn"
                ) from None
    if len(names) > 1 or None not in _flags(table, names[0]):
        flags = {name: _flags(table, name) for name in names}
        for name, column in flags.items():
            _need(table, name, [flag is None for flag in column], "needs 0 or 1")
        return np.array(list(flags.values()), dtype=np.float64).T, names
    cells = table.columns[names[0]]
    texts = [cell for cell in cells if isinstance(cell, str)]
    mark = separator or next((s for s in SEPARATORS if any(s in text for text in texts)), SEPARATORS[0])
    found = []
    for cell in cells:
        several = isinstance(cell, list | np.ndarray)  # an empty list says that there is none, an empty text nothing
        labels = {as_text(part) for part in (list(cell) if several else as_text(cell).split(mark))} - {""}
        found.append(labels if labels or several else None)
    _need(table, names[0], [labels is None for labels in found], f"has no label ({NONE})")
    known = _sorted([label for labels in found for label in labels or ()])
    return np.array([[label in (labels or ()) for label in known] for labels in found], dtype=np.float64), known


def _flags(table: ImageTable, name: str) -> list[bool | None]:
    """Of each image whether a label is there; None where that is not what stands there."""
    texts = [as_text(value).lower() for value in table.columns[name]]
    return [True if text in YES else False if text in NO else None for text in texts]


def _numbers(table: ImageTable, name: str) -> list[float]:
    found = [as_number(as_text(value)) for value in table.columns[name]]
    _need(table, name, [number is None for number in found], "needs a finite number")
    return [number for number in found if number is not None]


def _need(table: ImageTable, column: str, wrong: Sequence[bool], what: str) -> None:
    """Raise a DataError where something is wrong with an image's target."""
    if any(wrong):
        first = list(wrong).index(True)
        value = as_text(table.columns[column][first])
        raise DataError(
            f"{table.items[first].name} of {table.source} {what}; its column {column!r} holds {value[:40]!r}"
            + (f", and {sum(wrong) - 1} more are wrong" if sum(wrong) > 1 else "")
        )


def _some(labels: np.ndarray, names: tuple[str, ...], asked: str, source: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Only the labels asked for."""
    chosen = parse_classes(asked) or []
    places = [names.index(str(n)) if str(n) in names else n for n in chosen]
    if odd := [n for n, p in zip(chosen, places, strict=True) if not isinstance(p, int) or not 0 <= p < len(names)]:
        raise DataError(f"{source} has no label {odd[0]!r}; there are {shown(names)}")
    numbers = [int(place) for place in places]
    return tuple(names[n] for n in numbers), labels[:, numbers]


def _split(data: ImageSet, options: ImageChoice) -> tuple[ImageSet, ImageSet]:
    """(rest, held out): a share of the images, drawn by the seed, so that every label keeps an image to train on."""
    labels = data.labels if options.task is Target.multilabel else np.zeros((len(data), 0))
    left, held, most = labels.sum(0), list[int](), round((options.validation or HELD_OUT) * len(data))
    for index in np.random.default_rng(options.seed).permutation(len(data)).tolist():
        if len(held) < most and (left[labels[index] > 0] > 1).all():
            left = left - labels[index]
            held.append(index)
    return data.take(np.setdiff1d(np.arange(len(data)), held)), data.take(np.sort(held))


def _known(splits: Splits, source: str) -> Splits:
    """With notes on labels that cannot be learned or measured.

    Raises:
        DataError: test images have a label that no training image has.
    """
    names = splits.train.names
    seen, measured = splits.train.labels.sum(0), splits.test.labels.sum(0)
    if strange := [name for name, a, b in zip(names, seen, measured, strict=True) if not a and b]:
        raise DataError(f"{source} has test images of {told(strange, 'label')}, but no training images of it")
    notes = list(splits.notes)
    for counts, what in ((seen, "training"), (measured, "test")):
        if absent := [name for name, count in zip(names, counts, strict=True) if not count]:
            notes.append(f"{source} has no {what} image of {told(absent, 'label')}")
    if always := [n for n, count in zip(names, seen, strict=True) if count == len(splits.train)]:
        notes.append(f"all training images of {source} have {told(always, 'label')}: nothing tells it")
    return replace(splits, notes=tuple(notes))


def _normalised(splits: Splits, source: str) -> Splits:
    """With targets of mean 0 and deviation 1 among the training images.

    Raises:
        DataError: all training images have the same number.
    """
    train, test = splits.train, splits.test
    with np.errstate(over="ignore"):  # told below
        mean, std = train.labels.mean(0), train.labels.std(0)
    for name, m, s in zip(train.names, mean, std, strict=True):
        if not math.isfinite(s):
            raise DataError(f"the {name} of {source} is too large to be learned; give it in another unit")
        if s <= 1e-12 * max(1e-300, abs(m)):
            raise DataError(f"all training images of {source} have nearly the same {name}, {m:g}; nothing tells it")
    return replace(
        splits, scale=(mean, std), train=replace(train, labels=(train.labels - mean) / std),
        test=replace(test, labels=(test.labels - mean) / std),
    )  # fmt: skip


def _sorted(texts: Sequence[str]) -> tuple[str, ...]:
    """Each once, by their numbers if all are numbers, else by the alphabet."""
    names = sorted(set(texts))
    return tuple(names if any(as_number(name) is None for name in names) else sorted(names, key=float))


def _plain(text: str) -> str:
    """A number in one way of writing, whatever it was written like."""
    number = as_number(text)
    return text if number is None else str(int(number)) if number.is_integer() else repr(number)
