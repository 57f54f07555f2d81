"""From an image to what a model reads. How an image is fitted to it without chance is in `uora_vision.predict.images`.

Every random choice is keyed by (seed, epoch, index), never by how many images were read before or by which worker:
a resumed run, or one with another number of workers, sees exactly the same pictures.
"""

from __future__ import annotations

import random
import zlib
from typing import Any

import cv2
import numpy as np
import torch

from uora_vision.predict.images import InputFormat, fitting, import_albumentations, interpolation

from ..command.choices import Augment, Domain

A = import_albumentations()


class DomainShift:
    """(h, w, 3) uint8 -> the same image in another domain. The same image always gives the same result."""

    def __init__(self, domain: Domain) -> None:
        steps: dict[Domain, list[Any]] = {
            Domain.none: [],
            Domain.invert: [A.InvertImg(p=1)],
            Domain.rotate: [A.Rotate(limit=(90, 90), p=1)],
            Domain.noise: [A.GaussNoise(std_range=(0.2, 0.2), p=1)],
        }
        self.transform = A.Compose(steps[domain]) if steps[domain] else None

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if self.transform is None:
            return image
        _set_random_state(self.transform, zlib.crc32(np.ascontiguousarray(image)))
        return self.transform(image=image)["image"]


class ModelInput:
    """(h, w, 3) uint8 -> (3, H, W) float32, normalised; with random changes when a key is given."""

    def __init__(self, form: InputFormat, augment: Augment = Augment.none) -> None:
        self.form = form
        (height, width), fit = form.size, fitting(form)
        vary: list[Any] = []
        if augment is Augment.resized:  # 8% to all of the area, as timm does for ImageNet
            fit = [A.RandomResizedCrop(form.size, interpolation=interpolation(form))]
        elif augment is not Augment.none:
            edge = max(1, height // 8)
            vary = [A.Pad(padding=edge, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(height, width)]
        if augment in (Augment.flip, Augment.resized):
            vary.append(A.HorizontalFlip(p=0.5))
        self.transform = A.Compose([*fit, *vary, A.Normalize(form.mean, form.std)])

    def __call__(self, image: np.ndarray, key: tuple[int, ...] = ()) -> torch.Tensor:
        _set_random_state(self.transform, *key)
        return torch.from_numpy(self.transform(image=image)["image"].transpose(2, 0, 1).copy())


def _set_random_state(transform: Any, *key: int) -> None:
    generator = np.random.default_rng(key)
    transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
