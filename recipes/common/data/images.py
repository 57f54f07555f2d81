"""Labelled images from wherever people keep them, as one small class.

`load_images(source, split)` takes, in this order of trial (hidden files and folders are none, wherever they lie):

- `digits`: scikit-learn's handwritten digits, which come with the package (no network);
- a folder of parquet files, or anything `datasets.load_dataset` reads from disk;
- a folder with torchvision's `cifar-100-python` inside;
- a folder of images: `train/CLASS/*.png` and `test/CLASS/*.png` (or `val`);
- `cifar100`, `food101`, `flowers102`: through torchvision, which downloads them once; `resisc45`: from the hub;
- `timm:NAME`: what `timm.data.create_dataset` takes, such as `timm:torch/places365` or `timm:hfds/OWNER/NAME`;
- anything else: the name of a data set on the Hugging Face hub.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uora_vision.predict.images import IMAGE_SUFFIXES, visible
from uora_vision.predict.network import failing_fast
from uora_vision.predict.pixels import Item, pixels

from ..errors import DataError

TORCHVISION = {"cifar100": "CIFAR100", "food101": "Food101", "flowers102": "Flowers102"}
HUB = {"resisc45": "timm/resisc45"}
SPLITS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}


@dataclass(frozen=True)
class ImageSet:
    """Images with labels.

    Args:
        items: one entry per image.
        labels: (n,) int64, indices into `names`; of several labels (n, labels) 0 or 1, of numbers (n, targets), both
            float64.
        names: what each class, label or target is called.
        notes: what a person should know of them, in sentences.
    """

    items: Sequence[Item]
    labels: np.ndarray
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """The image as (h, w, 3) uint8, RGB."""
        return pixels(self.items[index], self.name(index))

    def name(self, index: int) -> str:
        """What to call an image when talking of it."""
        item = self.items[index]
        return str(item) if isinstance(item, Path) else f"image {index} of the data set"

    @property
    def images(self) -> np.ndarray:
        """Every image in one array, (n, h, w, 3) uint8; all must have one size."""
        return np.stack([self.read(index) for index in range(len(self))])

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        indices = np.asarray(indices, dtype=np.int64)
        return replace(self, items=[self.items[i] for i in indices], labels=self.labels[indices])

    def keep_classes(self, classes: Sequence[int | str]) -> ImageSet:
        """Only these classes (numbers or names), renumbered from 0 in the order given. A number that is the name of a
        class is that class."""
        numbers = []
        for name in classes:
            number = self.names.index(str(name)) if str(name) in self.names else name
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

    def as_classes(self, names: tuple[str, ...]) -> ImageSet:
        """Only the images of the classes of these names, numbered as there; a class may be left without images."""
        places = {name: number for number, name in enumerate(names)}
        renumber = np.array([places.get(name, -1) for name in self.names], dtype=np.int64)
        kept = self.take(np.flatnonzero(renumber[self.labels] >= 0))
        return replace(kept, labels=renumber[kept.labels], names=names)

    def without(self, present: bool = False) -> tuple[str, ...]:
        """Names of the classes that have no image; with `present`, of those that have one."""
        counts = np.bincount(self.labels, minlength=len(self.names))
        return tuple(name for name, count in zip(self.names, counts, strict=True) if bool(count) is present)

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

    Classes have the names that this split gives them; `splits.load_splits` makes those of two splits the same.

    Raises:
        DataError: nothing usable was found there, or a label is no class.
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
    if strange := Counter(data.labels[(data.labels < 0) | (data.labels >= len(data.names))].tolist()):
        raise DataError(
            f"{strange.total()} of {len(data)} {split} images of {source} have a label that is none of its "
            f"{len(data.names)} classes, such as {next(iter(strange))}; numbers from 0 are expected"
        )
    return data if classes is None else data.keep_classes(classes)


def _digits(split: str) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.repeat((digits.images * (255 / 16)).astype(np.uint8)[..., None], 3, axis=-1)
    order = np.random.default_rng(0).permutation(len(grey))
    order = order[: len(order) * 2 // 3] if split == "train" else order[len(order) * 2 // 3 :]
    return ImageSet(grey[order], digits.target[order].astype(np.int64), tuple("0123456789"))


def _folder(path: Path, split: str) -> ImageSet:
    if any(visible(file, path) for file in path.rglob("*.parquet")) or (path / "dataset_dict.json").exists():
        return _hub(str(path), split)
    if (path / "cifar-100-python").is_dir():
        return _torchvision("cifar100", path, split, download=False)
    for name in SPLITS[split]:
        if (path / name).is_dir():
            return _image_folder(path / name)
    held = ", ".join(sorted(p.name for p in path.iterdir() if visible(p, path))[:8]) or "nothing"
    raise DataError(
        f"no {split} images in {path}, which holds {held}. Expected parquet files, cifar-100-python/, or "
        f"{split}/CLASS/*.png. To try the recipe without data, use --demo."
    )


def _image_folder(path: Path) -> ImageSet:
    folders = {unicodedata.normalize("NFC", p.name): p for p in path.iterdir() if p.is_dir() and visible(p, path)}
    names = sorted(folders)
    items: list[Path] = []
    labels: list[int] = []
    others = [p for p in path.iterdir() if p.is_file() and visible(p, path)]
    for label, name in enumerate(names):
        held = sorted(p for p in folders[name].rglob("*") if p.is_file() and visible(p, path))
        files = [p for p in held if p.suffix.lower() in IMAGE_SUFFIXES]
        others += [p for p in held if p.suffix.lower() not in IMAGE_SUFFIXES]
        items += files
        labels += [label] * len(files)
    if not items:
        raise DataError(
            f"no images in {path}; expected one folder per class with {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    note = f"{len(others)} files in {path} are not read, such as {others[0].relative_to(path)}" if others else ""
    return ImageSet(items, np.array(labels, dtype=np.int64), tuple(names), (note,) if note else ())


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
    for part in SPLITS[split]:
        try:
            with failing_fast():
                found = timm.data.create_dataset(name, root=str(root), split=part, download=True, input_img_mode="")
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
    names = _timm_names(found) or [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
    items = [partial(_first, found, i) for i in range(len(found))]
    return ImageSet(items, labels, tuple(names))


def _timm_names(found: Any) -> Sequence[str]:
    """Names of the classes, in the order of their numbers; of a folder timm numbers what it finds in that split."""
    numbers = getattr(getattr(found, "reader", None), "class_to_idx", None)
    return sorted(numbers, key=numbers.__getitem__) if numbers else getattr(found, "classes", ())


def _first(examples: Any, index: int) -> Image.Image:
    return examples[index][0]


def _hub(name: str, split: str) -> ImageSet:
    import datasets

    try:
        with failing_fast(not Path(name).exists()):
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
