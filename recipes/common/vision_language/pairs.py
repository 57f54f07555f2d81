"""Images with texts that describe them, from tables and from tar shards, as one small class."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from uora_vision.predict.dual import Tokens
from uora_vision.predict.frames import as_text
from uora_vision.predict.images import IMAGE_SUFFIXES
from uora_vision.predict.pixels import inspect, pixels

from ..data.augment import ModelInput
from ..data.loading import Key
from ..data.tables import load_table, need_columns
from ..errors import DataError

HELD_OUT = 0.1
"""Share of the images to measure on, where the data has no test split and nothing is said."""
FOLDER_SPLITS = {"train": ("train",), "test": ("test", "val", "dev")}
TEXT_ENDINGS = (".txt", ".caption")


@dataclass(frozen=True)
class TarPart:
    """A file inside of an uncompressed tar file: read where it lies, so that a shard may be larger than the memory."""

    path: Path
    start: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


Item = Path | bytes | TarPart


@dataclass(frozen=True)
class Pairs:
    """Images with texts.

    Args:
        items: the image of each pair.
        texts: the text of each pair.
        keys: (n, 2) int64, equal numbers for equal images and for equal texts.
        left_out: what could not be used, in words.
        digest: of all images and texts that were found.
    """

    items: Sequence[Item]
    texts: Sequence[str]
    keys: np.ndarray
    left_out: Sequence[str] = ()
    digest: str = ""

    def __len__(self) -> int:
        return len(self.texts)

    def picture(self, index: int) -> np.ndarray:
        """The image as (h, w, 3) uint8, RGB."""
        item = self.items[index]
        return pixels(item.read() if isinstance(item, TarPart) else item, f"the image of pair {index}")

    def take(self, indices: Iterable[int]) -> Pairs:
        chosen = np.array(list(indices), dtype=np.int64)
        return replace(
            self, items=[self.items[i] for i in chosen], texts=[self.texts[i] for i in chosen], keys=self.keys[chosen]
        )

    def split(self, share: float, seed: int) -> tuple[Pairs, Pairs]:
        """(rest, held out): `share` of the images, each with all its texts, is held out, drawn by `seed`.

        Raises:
            DataError: one of them would be empty.
        """
        images = np.unique(self.keys[:, 0])
        held = np.random.default_rng(seed).permutation(images)[: round(share * len(images))]
        inside = np.isin(self.keys[:, 0], held)
        if inside.all() or not inside.any():
            raise DataError(f"{len(images)} images are too few to hold out {share:g} of them; give a test file")
        return self.take(np.flatnonzero(~inside)), self.take(np.flatnonzero(inside))


class PairImages(Dataset):
    """(epoch, index) -> (image (3, H, W) float32, tokens of its text, numbers of the image and of the text)."""

    def __init__(self, data: Pairs, tokens: Tokens, prepare: ModelInput, seed: int = 0) -> None:
        self.data, self.tokens, self.prepare, self.seed = data, tokens, prepare, seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, Tokens, torch.Tensor]:
        epoch, index = key
        image = self.prepare(self.data.picture(index), (self.seed, epoch, index))
        tokens = {name: value[index] for name, value in self.tokens.items()}
        return image, tokens, torch.from_numpy(self.data.keys[index].copy())


def load_pairs(
    source: str, columns: tuple[str, str], share: float, seed: int, strict: bool = False, names: tuple[str, ...] = ()
) -> tuple[Pairs, Pairs, bool]:
    """(training pairs, test pairs, whether the test pairs were held out of one split).

    Args:
        source: a csv, tsv, json, jsonl or parquet file; a tar shard as webdataset writes it, or a pattern such as
            `shards/train-*.tar`; a folder with `train` and `test` files (or shards) of these kinds; a data set on the
            hub.
        columns: names of the columns that hold the image (a path, beside the file, or its bytes) and the text.
        share: of the images to hold out; 0 for only where there is no test split.
        seed: of what is held out.
        strict: stop at a pair without image or text; otherwise it is left out.
        names: of the columns of a file without header.

    Raises:
        DataError: nothing usable, a missing column, or with `strict` a pair that cannot be used.
    """
    train = _read(source, "train", columns, strict, names)
    test = None if share else _test(source, columns, strict, names)
    if test is not None:
        return train, test, False
    return *train.split(share or HELD_OUT, seed), True


def _test(source: str, columns: tuple[str, str], strict: bool, names: tuple[str, ...]) -> Pairs | None:
    """The test split; None where there is only one."""
    path = Path(source)
    if path.is_file() or "*" in source:
        return None
    if path.is_dir():
        return _read(source, "test", columns, strict, names) if any(_named(path, "test")) else None
    for split in ("test", "validation"):
        try:
            return _of_table(load_table(source, split), source, Path(), columns, strict)
        except DataError as error:
            if " split, only " not in str(error):
                raise
    return None


def _read(source: str, split: str, columns: tuple[str, str], strict: bool, names: tuple[str, ...]) -> Pairs:
    path = Path(source)
    shards = sorted(path.parent.glob(path.name)) if "*" in path.name else [path] if path.suffix == ".tar" else []
    if path.is_dir():
        shards = [file for file in _named(path, split) if file.suffix == ".tar"]
    if shards or "*" in path.name or path.suffix == ".tar":
        return _of_shards(shards, source, strict)
    if not path.is_dir():
        return _of_table(load_table(source, split, names=names), source, path.parent, columns, strict)
    file = next(_named(path, split), None)
    if file is None:
        held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise DataError(f"no {split} file in {path}, which holds {held}; expected {split}.csv, .parquet, -000.tar, ...")
    return _of_table(load_table(str(file), split, names=names), str(file), path, columns, strict)


def _named(folder: Path, split: str) -> Any:
    endings = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".tar")
    files = sorted(p for p in folder.iterdir() if p.suffix in endings and not p.name.startswith("."))
    return (p for name in FOLDER_SPLITS[split] for p in files if p.name.startswith(name))


def _of_table(table: Any, source: str, folder: Path, columns: tuple[str, str], strict: bool) -> Pairs:
    import datasets

    need_columns(table, columns, source)
    image, text = columns
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    rows = []
    for row in table.select_columns([image, text]):
        item = row[image]
        if isinstance(item, dict):  # as `datasets` writes images into parquet
            item = item.get("bytes") or item.get("path")
        rows.append((folder / item if isinstance(item, str) and item else item, row[text]))
    return _checked(rows, source, strict)


def _of_shards(shards: Sequence[Path], source: str, strict: bool) -> Pairs:
    """Files of one name without ending belong together: `0001.jpg` and `0001.txt`."""
    found: dict[tuple[Path, str], list[Any]] = {}
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    stem, dot, ending = member.name.rpartition(".")
                    if not member.isfile() or PurePosixPath(member.name).name.startswith("."):
                        continue
                    part = found.setdefault((shard, stem), [None, None])
                    if f".{ending.lower()}" in IMAGE_SUFFIXES:
                        part[0] = TarPart(shard, member.offset_data, member.size)
                    elif f"{dot}{ending.lower()}" in TEXT_ENDINGS:
                        part[1] = tar.extractfile(member).read().decode(errors="replace")  # type: ignore[union-attr]
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"cannot read {shard}, which must be an uncompressed tar file: {error}") from error
    return _checked(list(map(tuple, found.values())), source, strict)


def _checked(rows: Sequence[tuple[Any, Any]], source: str, strict: bool) -> Pairs:
    """Pairs of the rows that have an image that opens, and a text."""
    items, texts, left_out, whole = [], [], [], hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(_look, *zip(*rows, strict=True)) if rows else iter(())
        for number, ((item, text), (digest, reason)) in enumerate(zip(rows, found, strict=True), 1):
            whole.update(repr((digest, text)).encode(errors="replace"))
            if reason:
                left_out.append(f"pair {number}: {reason}")
                continue
            items.append(item)
            texts.append(as_text(text))
    if left_out and strict:
        raise DataError(f"{len(left_out)} of {len(rows)} pairs in {source} cannot be used; {left_out[0]}")
    if len(items) < 2:
        why = f"; {left_out[0]}" if left_out else ""
        raise DataError(f"{source} has {len(items)} usable pairs of {len(rows)}, at least 2 are needed{why}")
    numbers: tuple[dict[Any, int], dict[Any, int]] = ({}, {})
    keys = [[known.setdefault(v, len(known)) for known, v in zip(numbers, pair, strict=True)]
            for pair in zip(items, texts, strict=True)]  # fmt: skip
    return Pairs(items, texts, np.array(keys, dtype=np.int64), left_out, whole.hexdigest())


def _look(item: Any, text: Any) -> tuple[str, str | None]:
    """A digest of the image, and why the pair cannot be used."""
    if not as_text(text):
        return "", "it has no text"
    if item is None or item == "":
        return "", "it has no image"
    if isinstance(item, Path) and not item.is_file():
        return "", f"{item} does not exist"
    digest, reason = inspect(item.read() if isinstance(item, TarPart) else item)
    return digest, f"cannot read {item if isinstance(item, Path) else 'its image'}: {reason}" if reason else None
