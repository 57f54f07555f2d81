"""Tables of text from a file, a folder or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader

from uora_vision.predict.frames import SUFFIXES, read_frame
from uora_vision.predict.network import failing_fast

from ..errors import DataError

SPLITS = {  # E2E's testset.csv is its testset_w_refs.csv without the references
    "train": ("train",), "validation": ("validation", "dev", "valid"), "test": ("testset_w_refs", "test"),
}  # fmt: skip


def load_table(source: str, split: str, *, config: str | None = None, names: Sequence[str] = ()) -> Dataset:
    """Rows of a split of some data.

    Args:
        source: a file; a folder with a file per split (`train.csv`, `dev.tsv`, `validation.parquet`, ...); or the name
            of a data set on the hub.
        split: `train`, `validation` or `test`; a single file stands for whichever is asked for.
        config: of the data set on the hub.
        names: of the columns of a csv or tsv file that has no header.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    path = Path(source)
    if path.is_dir():
        return read_table(_in_folder(path, split), names)
    if path.is_file():
        return read_table(path, names)
    if path.suffix.lower() in SUFFIXES or (path.parent != Path() and path.parent.is_dir()):
        raise DataError(f"{source} does not exist")
    try:
        with failing_fast():
            found: Any = load_dataset(source, config)
    except Exception as error:  # the hub's client raises many types of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"no data set {source!r}: {reason} Check the name and the network; without a network, give a file or a "
            "folder with --data, or try the embedded example with --demo."
        ) from error
    name = next((n for n in found if n.startswith(SPLITS[split])), None)
    if name is None:
        raise DataError(f"{source} has no {split} split, only {', '.join(found)}")
    return found[name]


def read_table(path: Path, names: Sequence[str] = ()) -> Dataset:
    """Rows of one file; see `read_frame`.

    Raises:
        DataError: it cannot be read, or has no rows.
    """
    frame = read_frame(path, names)
    try:
        return Dataset.from_pandas(frame, preserve_index=False)
    except (ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {(str(error).splitlines() or [''])[0]}") from error


def need_columns(table: Dataset, wanted: Sequence[str], source: str) -> None:
    """Raise a DataError if a column is missing; it names those that are there."""
    if missing := [name for name in wanted if name not in table.column_names]:
        held = ", ".join(map(repr, table.column_names))
        raise DataError(
            f"{source} has no column {', '.join(map(repr, missing))}; it has {held}. Columns of a file without header "
            "are named with --columns."
        )


def hold_out(table: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a share of the rows, drawn by `seed`: (the others, those).

    Raises:
        DataError: one of the two would be empty.
    """
    count = round(share * len(table))
    if not 0 < count < len(table):
        raise DataError(
            f"--validation {share} of {len(table)} example{'s' * (len(table) != 1)} leaves nothing to "
            f"{'measure' if count == 0 else 'train on'}; give more data or another share"
        )
    split = table.train_test_split(count, seed=seed)
    return split["train"], split["test"]


def shuffled(rows: Dataset, collate: Callable[[list[Any]], Mapping[str, Any]], batch: int, seed: int) -> DataLoader:
    """Batches of rows in an order drawn by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(rows, batch, shuffle=True, generator=generator, collate_fn=lambda some: dict(collate(some)))  # type: ignore[arg-type]


def _in_folder(path: Path, split: str) -> Path:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    found = [file for name in SPLITS[split] for file in files if file.name.lower().startswith(name)]
    if not found:
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise DataError(f"no {split} file in {path}, which holds {held}; expected {split}.csv, .tsv, .json, ...")
    return found[0]
