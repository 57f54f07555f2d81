"""Images as people have them, and what a model reads of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class InputFormat:
    """What a model reads: (height, width) in pixels, and the mean and deviation of each channel in 0..1.

    `squash`: an image is made square by scaling alone, not by cutting what stands out.
    `crop`: share of an image's shorter side that is kept around its centre.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    squash: bool = False
    crop: float = 1.0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> InputFormat:
        """That of a data config of timm."""
        return cls(
            tuple(config["input_size"][1:]), tuple(config["mean"]), tuple(config["std"]),
            config.get("interpolation", "bicubic"), config.get("crop_mode") == "squash", config.get("crop_pct", 1.0),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """As an adapter's `preprocessing` holds it; `of` is the inverse."""
        return {
            "input_size": [3, *self.size], "mean": list(map(float, self.mean)), "std": list(map(float, self.std)),
            "interpolation": self.interpolation, "crop_mode": "squash" if self.squash else "center",
            "crop_pct": self.crop, "transform": "albumentations",
        }  # fmt: skip


def interpolation(form: InputFormat) -> int:
    """As OpenCV numbers it; bicubic where it is not known."""
    import cv2

    known = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "lanczos": cv2.INTER_LANCZOS4}
    return known.get(form.interpolation, cv2.INTER_CUBIC)


def fitting(form: InputFormat) -> list[Any]:
    """The transforms of albumentations that bring an image to the size that a model reads."""
    albumentations, mode = import_albumentations(), interpolation(form)
    height, width = form.size
    if height == width and not form.squash:  # keep the proportions, cut what stands out
        edge = max(height, int(height / form.crop))
        return [
            albumentations.SmallestMaxSize(edge, interpolation=mode),
            albumentations.CenterCrop(height, width),
        ]
    return [albumentations.Resize(height, width, interpolation=mode)]


def preparation(config: Mapping[str, Any]) -> Callable[[np.ndarray], Tensor]:
    """(h, w, 3) uint8 -> (3, H, W) float32, as the config says.

    Raises:
        ConfigError: albumentations is missing.
    """
    import torch

    if config.get("transform", "timm") == "timm":
        from PIL import Image
        from timm.data import create_transform

        known = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
        made: Any = create_transform(**{name: config[name] for name in known if name in config}, is_training=False)
        return lambda image: made(Image.fromarray(image))
    form = InputFormat.of(config)
    albumentations = import_albumentations()
    transform = albumentations.Compose([*fitting(form), albumentations.Normalize(form.mean, form.std)])
    lock = threading.Lock()  # of a transform that keeps notes of its last image

    def prepare(image: np.ndarray) -> Tensor:
        with lock:
            prepared = transform(image=image)["image"]
        return torch.from_numpy(prepared.transpose(2, 0, 1).copy())

    return prepare


def import_albumentations() -> Any:
    """The library, kept from asking the network for its newest version and from threads of its own.

    Raises:
        ConfigError: it is missing.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import albumentations
        import cv2
    except ImportError as error:
        raise ConfigError(
            "the images of this adapter are prepared by albumentations, which is missing: pip install albumentations"
        ) from error

    cv2.setNumThreads(0)  # the data loader's workers are the threads
    return albumentations


def visible(path: Path, root: Path) -> bool:
    """Neither hidden nor what macOS leaves beside files (`._cat.jpg`), nor inside of such a folder."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)


def find_images(inputs: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The images among files and in folders, at any depth, each once: by folder in the order given, then by name.

    Raises:
        DataError: one of them does not exist, or there is no image.
    """
    found: dict[Path, None] = {}
    others: list[Path] = []
    for given in map(Path, inputs):
        if not given.exists():
            raise DataError(f"{given} does not exist; give images, or folders of images")
        held = sorted(p for p in given.rglob("*") if p.is_file() and visible(p, given)) if given.is_dir() else [given]
        for path in held:
            if path.suffix.lower() in IMAGE_SUFFIXES:
                found[path] = None
            else:
                others.append(path)
    if not found:
        told = ", ".join(map(str, inputs)) or "nothing"
        held_there = f"; it holds {len(others)} other files, such as {others[0].name}" if others else ""
        raise DataError(f"no images in {told}{held_there}. Images end with {', '.join(sorted(IMAGE_SUFFIXES))}")
    return list(found)
