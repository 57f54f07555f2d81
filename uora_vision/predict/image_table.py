"""A table of images: a column of paths, beside columns of what is known of each, and one of splits. Needs pandas."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .frames import SUFFIXES, as_text, read_frame

if TYPE_CHECKING:
    import pandas as pd

PATHS = ("path", "file_name", "filename", "file", "image", "image_path", "filepath")
LABELS = ("label", "labels", "target", "targets", "class", "classes", "tags", "value", "y")
SPLIT = "split"
"""Columns that are taken where none are named: the first of these that is there."""
TRAINING, TEST = ("train", "training"), ("test", "val", "valid", "validation", "dev")
"""What a split may be called; of several for tests, the first that is there is the one to measure on."""


@dataclass(frozen=True)
class ImageTable:
    """Rows of a table, one for each image.

    Args:
        source: the file.
        items: the images, which exist.
        columns: all others by name, each with a value per image.
        split: what each image is for, in small letters; None where no column says it.
    """

    source: Path
    items: list[Path]
    columns: dict[str, list[Any]]
    split: list[str] | None

    def named(self, asked: str | None, option: str = "--target-column") -> str:
        """A column of targets: the one asked for, else the first of `LABELS` that is there.

        Raises:
            DataError: it is not there.
        """
        return choose(list(self.columns), asked, LABELS, f"{self.source} has no column", option)

    def sides(self) -> tuple[list[int], list[int], list[str]] | None:
        """Numbers of the images to train on and of those to measure, and notes; None where no column says it.

        Raises:
            DataError: a split is none, or one of both has no image.
        """
        if self.split is None:
            return None
        counts = Counter(self.split)
        if strange := next((name for name in counts if name not in (*TRAINING, *TEST)), None):
            raise DataError(
                f"{self.source} has the split {strange!r}, of {self.items[self.split.index(strange)].name}; "
                f"{', '.join((*TRAINING, *TEST))} are known"
            )
        measured = next((name for name in TEST if name in counts), None)
        train = [place for place, name in enumerate(self.split) if name in TRAINING]
        if measured is None or not train:
            raise DataError(
                f"{self.source} has no {'test' if train else 'training'} image in its column of splits; there are "
                f"only {', '.join(counts)}"
            )
        others = [name for name in TEST if name in counts and name != measured]
        notes = [f"{counts[name]} images of the split {name!r} of {self.source} are not used" for name in others]
        return train, [place for place, name in enumerate(self.split) if name == measured], notes


def is_table(source: str | os.PathLike[str]) -> bool:
    """Whether that is the name of a table, and not of a folder or a data set."""
    path = Path(source)
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def read_image_table(path: Path, path_column: str | None = None, split_column: str | None = None) -> ImageTable:
    """Read a table of images. Paths are relative to its folder.

    Args:
        path: a file of csv, tsv, json, jsonl or parquet.
        path_column: that holds the paths; by default the first of `PATHS`.
        split_column: that says what an image is for; by default `split`, where there is one.

    Raises:
        DataError: it cannot be read, lacks a column, names an image that does not exist, or one twice.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    frame: pd.DataFrame = read_frame(path)
    names = [str(name) for name in frame.columns]
    told = f"{path} has no column"
    images = choose(names, path_column, PATHS, told, "--path-column")
    split = None
    if split_column is not None or SPLIT in names:
        split = choose(names, split_column, (SPLIT,), told, "--split-column")
    items = []
    for row, value in enumerate(frame[images], 1):
        if not isinstance(value, str) or not value.strip():
            what = "no path" if as_text(value) == "" else f"a {type(value).__name__}"
            raise DataError(f"row {row} of {path} has {what} in the column {images!r}, where paths are expected")
        items.append(Path(os.path.normpath(path.parent / value.strip())))
    if missing := [item for item in items if not item.is_file()]:
        raise DataError(
            f"{len(missing)} of {len(items)} images of {path} do not exist, such as {missing[0]}; paths are relative "
            f"to {path.parent.resolve()}"
        )
    if twice := next((item for item, count in Counter(items).items() if count > 1), None):
        raise DataError(f"{path} has {twice} in more than one row; give each image one")
    columns = {name: list(frame[name]) for name in names if name not in (images, split)}
    sides = None if split is None else [as_text(value).lower() for value in frame[split]]
    return ImageTable(path, items, columns, sides)


def choose(names: Sequence[str], asked: str | None, known: Sequence[str], told: str, option: str) -> str:
    """The column asked for, else the first of the known ones that is there, whatever its letters' case.

    Raises:
        DataError: it is not there.
    """
    if asked is not None:
        if asked in names:
            return asked
        near = difflib.get_close_matches(asked, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{told} {asked!r}{hint or f'; it has {shown(names)}'}")
    lower = {name.lower(): name for name in reversed(names)}
    if (found := next((lower[name] for name in known if name in lower), None)) is None:
        raise DataError(f"{told} {known[0]!r}; it has {shown(names)}. {option} names another")
    return found


def shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + ", ..." * (len(names) > 8)
