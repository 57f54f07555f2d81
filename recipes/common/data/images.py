"""Labelled images from wherever people keep them, as one small class.

`load_images(source, split)` takes, in this order of trial:

- `digits`: scikit-learn's handwritten digits, which come with the package (no network);
- a folder of parquet files, or anything `datasets.load_dataset` reads from disk;
- a folder with torchvision's `cifar-100-python` inside;
- a folder of images: `train/CLASS/*.png` and `test/CLASS/*.png` (or `val`);
- `cifar100`, `food101`, `flowers102`: through torchvision, which downloads them once; `resisc45`: from the hub;
- `timm:NAME`: what `timm.data.create_dataset` takes, such as `timm:torch/places365` or `timm:hfds/OWNER/NAME`;
- anything else: the name of a data set on the Hugging Face hub.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from .network import fail_fast_without_network

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TORCHVISION = {"cifar100": "CIFAR100", "food101": "Food101", "flowers102": "Flowers102"}
HUB = {"resisc45": "timm/resisc45"}
SPLITS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}


@dataclass(frozen=True)
class ImageSet:
    """Images with labels.

    Args:
        items: one entry per image: an array (h, w, 3) of uint8, a path, the encoded bytes, or what gives a PIL image
            when called.
        labels: (n,) int64, indices into `names`.
        names: what each class is called.
    """

    items: Sequence[np.ndarray | Path | bytes | Callable[[], Image.Image]]
    labels: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """The image as (h, w, 3) uint8, RGB."""
        item = self.items[index]
        if isinstance(item, np.ndarray):
            return item
        if callable(item):
            return np.asarray(item().convert("RGB"))
        source = io.BytesIO(item) if isinstance(item, bytes) else item
        try:
            with Image.open(source) as image:
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            where = item if isinstance(item, Path) else f"image {index} of the data set"
            raise DataError(f"cannot read {where}: {error}. Remove or replace it.") from error

    @property
    def images(self) -> np.ndarray:
        """Every image in one array, (n, h, w, 3) uint8; all must have one size."""
        return np.stack([self.read(index) for index in range(len(self))])

    def take(self, indices: np.ndarray) -> ImageSet:
        return replace(self, items=[self.items[i] for i in indices], labels=self.labels[indices])

    def keep_classes(self, classes: Sequence[int | str]) -> ImageSet:
        """Only these classes (numbers or names), renumbered from 0 in the order given."""
        numbers = []
        for name in classes:
            number = self.names.index(name) if isinstance(name, str) and name in self.names else name
            if not isinstance(number, int) or not 0 <= number < len(self.names):
                shown = ", ".join(self.names[:8])
                raise DataError(f"no class {name!r}; there are {len(self.names)}, numbered from 0: {shown}, ...")
            numbers.append(number)
        if len(set(numbers)) != len(numbers):
            raise DataError(f"a class is named twice in {list(classes)}")
        renumber = np.full(len(self.names), -1)
        renumber[numbers] = np.arange(len(numbers))
        kept = self.take(np.flatnonzero(renumber[self.labels] >= 0))
        return replace(kept, labels=renumber[kept.labels], names=tuple(self.names[i] for i in numbers))

    def few_shot(self, shots: int, seed: int) -> ImageSet:
        """At most `shots` images of every class, drawn by `seed`."""
        if shots < 1:
            raise DataError(f"shots must be at least 1, got {shots}")
        order = np.random.default_rng(seed).permutation(len(self))
        chosen = [order[self.labels[order] == c][:shots] for c in range(len(self.names))]
        return self.take(np.sort(np.concatenate(chosen)))

    def split(self, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """(rest, held out): `share` of every class is held out, drawn by `seed`."""
        order = np.random.default_rng(seed).permutation(len(self))
        by_class = [order[self.labels[order] == c] for c in range(len(self.names))]
        held = np.concatenate([index[: round(share * len(index))] for index in by_class])
        return self.take(np.setdiff1d(np.arange(len(self)), held)), self.take(np.sort(held))


def parse_classes(text: str | None) -> list[int | str] | None:
    """`"60-99"`, `"0-4,8"` or `"apple,bear"` as a list; None for all classes."""
    if text is None:
        return None
    out: list[int | str] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if match := re.fullmatch(r"(\d+)-(\d+)", part):
            out.extend(range(int(match[1]), int(match[2]) + 1))
        else:
            out.append(int(part) if part.isdigit() else part)
    if not out:
        raise DataError(f"no class in {text!r}; write numbers or names, such as 60-99 or apple,bear")
    return out


def load_images(source: str, split: str, classes: Sequence[int | str] | None = None) -> ImageSet:
    """Load a split, `"train"` or `"test"`, of a source (see the top of this file).

    Raises:
        DataError: nothing usable was found there, or an image cannot be read.
    """
    path = Path(source)
    if source == "digits":
        data = _digits(split)
    elif path.is_dir():
        data = _folder(path, split)
    elif path.exists() or (":" not in source and "/" in source.removeprefix("./") and path.parent.is_dir()):
        raise DataError(f"{source} is not a folder; give a folder of parquet files or of images")
    elif source in TORCHVISION:
        data = _torchvision(source, Path.home() / ".cache" / "uora_vision", split, download=True)
    elif source.startswith("timm:"):
        data = _timm(source.removeprefix("timm:"), split)
    else:
        data = _hub(HUB.get(source, source), split)
    if len(data) == 0:
        raise DataError(f"{source} holds no {split} image")
    return data if classes is None else data.keep_classes(classes)


def _digits(split: str) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.repeat((digits.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    order = np.random.default_rng(0).permutation(len(grey))
    order = order[: len(order) * 2 // 3] if split == "train" else order[len(order) * 2 // 3 :]
    return ImageSet(grey[order], digits.target[order].astype(np.int64), tuple("0123456789"))


def _folder(path: Path, split: str) -> ImageSet:
    if any(path.rglob("*.parquet")) or (path / "dataset_dict.json").exists():
        return _hub(str(path), split)
    if (path / "cifar-100-python").is_dir():
        return _torchvision("cifar100", path, split, download=False)
    for name in SPLITS[split]:
        if (path / name).is_dir():
            return _image_folder(path / name)
    held = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise DataError(
        f"no {split} images in {path}, which holds {held}. Expected parquet files, cifar-100-python/, or "
        f"{split}/CLASS/*.png. To try the recipe without data, use --demo."
    )


def _image_folder(path: Path) -> ImageSet:
    names = sorted(p.name for p in path.iterdir() if p.is_dir())
    items, labels = [], []
    for label, name in enumerate(names):
        files = sorted(p for p in (path / name).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        items += files
        labels += [label] * len(files)
    for file in items:
        try:
            Image.open(file).close()
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"cannot read {file}: {error}. Remove or replace it.") from error
    if not items:
        raise DataError(
            f"no images in {path}; expected one folder per class with {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    return ImageSet(items, np.array(labels, dtype=np.int64), tuple(names))


def _torchvision(name: str, root: Path, split: str, download: bool) -> ImageSet:
    from torchvision import datasets

    kind = TORCHVISION[name]
    chosen: dict[str, Any] = {"train": split == "train"} if name == "cifar100" else {"split": split}
    try:
        data = getattr(datasets, kind)(str(root), **chosen, download=download)
    except Exception as error:  # torchvision raises URLError, RuntimeError or OSError, depending on what broke
        told = "CIFAR-100" if name == "cifar100" else kind
        raise DataError(
            f"{told} could not be loaded from {root}: {error}. Without a network, give a copy with --data FOLDER, "
            "or try the embedded example with --demo."
        ) from error
    if name == "cifar100":
        return ImageSet(data.data, np.array(data.targets, dtype=np.int64), tuple(data.classes))
    return ImageSet(data._image_files, np.array(data._labels, dtype=np.int64), tuple(data.classes))


def _timm(name: str, split: str) -> ImageSet:
    import timm.data

    found, reasons, root = None, [], Path.home() / ".cache" / "uora_vision"
    root.mkdir(parents=True, exist_ok=True)
    fail_fast_without_network()
    for part in SPLITS[split]:
        try:
            found = timm.data.create_dataset(name, root=str(root), split=part, download=True)
            break
        except Exception as error:  # each kind of data set raises types of its own
            reasons.append((str(error).strip().splitlines() or [type(error).__name__])[0])
    if found is None:
        raise DataError(
            f"timm cannot give the {split} split of {name!r}: {reasons[0]}. Check the name and the network; without a "
            "network, give a folder with --data, or try the embedded example with --demo."
        )
    if not hasattr(found, "__getitem__") or not hasattr(found, "__len__"):
        raise DataError(f"timm reads {name!r} only from front to back; give a data set whose images can be picked")
    labels = np.array([found[i][1] for i in range(len(found))], dtype=np.int64)  # once, through every image
    names = getattr(found, "classes", None) or [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
    items = [partial(_first, found, i) for i in range(len(found))]
    return ImageSet(items, labels, tuple(names))


def _first(examples: Any, index: int) -> Image.Image:
    return examples[index][0]


def _hub(name: str, split: str) -> ImageSet:
    import datasets

    if not Path(name).exists():
        fail_fast_without_network()
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the hub's client raises many types of its own
        raise DataError(
            f"no data set {name!r}: {str(error).splitlines()[0]}. Check the name and the network; without a network, "
            "give a folder with --data, or try the embedded example with --demo."
        ) from error
    table = next((found[n] for n in SPLITS[split] if n in found), None)
    if table is None:
        raise DataError(f"{name} has no {split} split, only {', '.join(found)}")
    image = next((k for k, f in table.features.items() if isinstance(f, datasets.Image)), None)
    label = next((k for k, f in table.features.items() if isinstance(f, datasets.ClassLabel)), None)
    if image is None or label is None:
        raise DataError(f"{name} needs an image column and a class-label column; it has {dict(table.features)}")
    column = table.cast_column(image, datasets.Image(decode=False))[image]
    items = [row["bytes"] if row["bytes"] is not None else Path(row["path"]) for row in column]
    return ImageSet(items, np.array(table[label], dtype=np.int64), tuple(table.features[label].names))
