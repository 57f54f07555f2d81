"""How well the frozen features of a model tell classes apart: by nearest neighbours, and by a linear probe."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, FormatError
from .frames import as_text
from .image_table import TEST, TRAINING, is_table, read_image_table
from .images import IMAGE_SUFFIXES, visible

if TYPE_CHECKING:
    from .predictor import Predictor

DRAWS = 1000
"""Test sets drawn for an interval."""
LEVEL = 0.95


@dataclass(frozen=True)
class Labelled:
    """Images with a class each.

    Args:
        paths, labels: of each image.
        test: (n,) bool: whether it is to be measured.
        notes: what a person should know, in sentences.
    """

    paths: Sequence[Path]
    labels: np.ndarray
    test: np.ndarray
    notes: tuple[str, ...] = ()

    def take(self, rows: np.ndarray) -> Labelled:
        return Labelled([self.paths[i] for i in rows], self.labels[rows], self.test[rows], self.notes)

    def check(self, source: Path) -> None:
        """Raise a DataError where they cannot be measured."""
        train, test = (Counter(self.labels[self.test == side].tolist()) for side in (False, True))
        if strange := sorted(test.keys() - train.keys()):
            raise DataError(f"{source} has test images of {strange[0]!r}, but no training images of it")
        if len(train) < 2 or not test:
            what = "no test image" if len(train) > 1 else f"{len(train)} class to train on; at least 2 are needed"
            raise DataError(f"{source} has {what}")


def labelled_images(
    source: Path, *, path_column: str | None = None, target_column: str | None = None, split_column: str | None = None,
    held_out: float = 0.2, seed: int = 0,
) -> Labelled:  # fmt: skip
    """Images and their classes, from `train/CLASS/` and `test/CLASS/`, from `CLASS/`, or from a table.

    Args:
        path_column, target_column, split_column: of a table; see `read_image_table`.
        held_out: the share of each class to measure, where nothing says which images are for that.
        seed: of what is held out.

    Raises:
        DataError: there are no images, fewer than two classes, or one with test images alone.
    """
    if is_table(source):
        table = read_image_table(source, path_column, split_column)
        labels = [as_text(value) for value in table.columns[table.named(target_column)]]
        if "" in labels:
            raise DataError(f"{table.items[labels.index('')].name} of {source} has no label")
        sides = table.sides()
        if sides is None:
            found = _held_out(table.items, labels, held_out, seed)
        else:
            train, test, notes = sides
            whole = Labelled(table.items, np.array(labels), np.isin(np.arange(len(labels)), test), tuple(notes))
            found = whole.take(np.sort([*train, *test]))
    else:
        named = {"path_column": path_column, "target_column": target_column, "split_column": split_column}
        if given := next((name for name, value in named.items() if value is not None), None):
            raise DataError(f"--{given.replace('_', '-')} names a column of a table, and {source} is none")
        if not source.is_dir():
            raise DataError(f"{source} does not exist; give a folder with one folder per class, or a table")
        train_at = next((source / name for name in TRAINING if (source / name).is_dir()), None)
        test_at = next((source / name for name in TEST if (source / name).is_dir()), None)
        if train_at is not None and test_at is not None:
            pairs = [(*pair, at is test_at) for at in (train_at, test_at) for pair in _in_classes(at)]
            paths, labels, test = map(list, zip(*pairs, strict=True))
            found = Labelled(paths, np.array(labels), np.array(test))
        else:
            paths, labels = map(list, zip(*_in_classes(train_at or source), strict=True))
            found = _held_out(paths, labels, held_out, seed)
    found.check(source)
    return found


def _in_classes(folder: Path) -> list[tuple[Path, str]]:
    """Images, and the folder of the class that each lies in."""
    found = [
        (path, unicodedata.normalize("NFC", path.relative_to(folder).parts[0]))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file() and visible(path, folder) and path.parent != folder
    ]
    if not found:
        raise DataError(f"{folder} has no images in folders, one per class, such as {folder / 'cat' / '1.jpg'}")
    return found


def _held_out(paths: Sequence[Path], labels: Sequence[str], share: float, seed: int) -> Labelled:
    names, test = np.array(labels), np.zeros(len(labels), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(names))
    for name in sorted(set(labels)):
        mine = order[names[order] == name]
        test[mine[: min(round(share * len(mine)), len(mine) - 1)]] = True
    return Labelled(paths, names, test, (f"{share:.0%} of each class are held out to measure",))


def extract(
    predictor: Predictor, paths: Sequence[Path], *, batch: int = 32, base: bool = True, strict: bool = False,
    seen: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[str]]:  # fmt: skip
    """What the head is given for each image that can be read.

    Args:
        base: whether to compute them without dW too, by an adapter that is not merged.
        strict: whether to stop at an image that cannot be read.
        seen: told how many images are done.

    Returns:
        Numbers of the images that could be read, (m,); their features, (m, width) float32; those without dW; and why
        the others could not be read.

    Raises:
        DataError: no image can be read, or with `strict` one cannot.
        FormatError: features are not finite.
    """
    from .predictor import without_update
    from .results import file_item, read_items

    kept: list[int] = []
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    skipped: list[str] = []
    for start in range(0, len(paths), batch):
        items = [file_item(path) for path in paths[start : start + batch]]
        inputs = []
        for number, value in enumerate(read_items(predictor.task, items), start):
            if isinstance(value, DataError):
                skipped.append(str(value))
                if strict:
                    raise DataError(f"{value}. Without --strict it is left out") from value
                continue
            kept.append(number)
            inputs.append(value)
        for side, without in enumerate((False, True)[: 1 + base] if inputs else ()):
            with without_update(predictor.model) if without else nullcontext():
                computed = predictor.task.compute(inputs, features=True, base=without)
            assert computed.features is not None
            found[side].append(computed.features.numpy())
        seen(min(start + batch, len(paths)))
    if not kept:
        raise DataError(f"none of {len(paths)} images can be read; {skipped[0]}")
    arrays = [np.concatenate(rows) for rows in found if rows]
    if not all(np.isfinite(rows).all() for rows in arrays):
        raise FormatError("the features are NaN or infinite")
    return np.array(kept), arrays[0], arrays[1] if base else None, skipped


def probe(features: np.ndarray, data: Labelled, neighbors: int = 5) -> dict[str, np.ndarray]:
    """Which test images are named rightly, by method, each (tests,) bool.

    `knn`: the nearest training images by cosine, each weighed by its nearness. `linear`: logistic regression on
    standardised features.

    Args:
        features: (n, width).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = features[~data.test].astype(np.float64), features[data.test].astype(np.float64)
    names, true = data.labels[~data.test], data.labels[data.test]
    models: dict[str, Any] = {
        "knn": KNeighborsClassifier(min(neighbors, len(train)), weights="distance", metric="cosine"),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }
    return {name: model.fit(train, names).predict(test) == true for name, model in models.items()}


def measured(right: dict[str, np.ndarray], seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean of each column of numbers, with the middle 95% of it over test sets drawn from these images.

    Args:
        right: columns of the same images, so that differences between them can be columns too.
    """
    table = np.stack([values.astype(np.float64) for values in right.values()], 1)
    generator, count = np.random.default_rng(seed), len(table)
    means = np.stack([table[generator.integers(0, count, count)].mean(0) for _ in range(DRAWS)])
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    return {
        name: {"value": float(table[:, k].mean()), "low": float(low[k]), "high": float(high[k])}
        for k, name in enumerate(right)
    }
