"""From an image to what a model reads. How an image is fitted to it without chance is in `uora_vision.predict.images`.

Every random choice is keyed by (seed, epoch, index), never by how many images were read before or by which worker:
a resumed run, or one with another number of workers, sees exactly the same pictures.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing

from uora_vision.predict.images import InputFormat, fitting, import_albumentations, interpolation

from ..command.choices import Augment, Domain
from ..errors import DataError

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
    """(h, w, 3) uint8 -> (3, H, W) float32, normalised; with random changes when a key is given.

    Args:
        form: what the model reads.
        augment: how place, side and size vary.
        policy: AutoAugment, RandAugment or AugMix, in the words of timm.
        erase: share of the images of which timm's RandomErasing makes a part zero.
    """

    def __init__(
        self, form: InputFormat, augment: Augment = Augment.none, policy: str | None = None, erase: float = 0.0
    ) -> None:
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
        if policy is not None:
            vary.append(A.Lambda(image=partial(_changed, _policy(policy, form)), name=policy, p=1))
        self.transform = A.Compose([*fit, *vary, A.Normalize(form.mean, form.std)])
        self.erase = RandomErasing(erase, device="cpu") if erase else None
        self.by_timm = policy is not None or erase > 0

    def __call__(self, image: np.ndarray, key: tuple[int, ...] = ()) -> torch.Tensor:
        if not self.by_timm:
            return self._prepare(image, key)
        with chance(*key):
            prepared = self._prepare(image, key)
            return prepared if self.erase is None else self.erase(prepared)

    def _prepare(self, image: np.ndarray, key: tuple[int, ...]) -> torch.Tensor:
        _set_random_state(self.transform, *key)
        return torch.from_numpy(self.transform(image=image)["image"].transpose(2, 0, 1).copy())


@contextmanager
def chance(*key: int) -> Iterator[None]:
    """Draws from the generators of python, numpy and torch within the block follow from the key; the generators are
    as before after it. What timm changes images with has none of its own."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.default_rng((*key, 1)).integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _policy(words: str, form: InputFormat) -> Any:
    """As timm makes it for its own training.

    Raises:
        DataError: timm knows no such policy.
    """
    made = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    colour = tuple(min(255, round(255 * mean)) for mean in form.mean)
    known = {"translate_const": int(0.45 * min(form.size)), "img_mean": colour}
    try:
        return made.get(words.partition("-")[0], auto_augment_transform)(words, known)
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(f"timm cannot augment images by {words!r}: {error or 'it does not know it'}") from error


def _changed(policy: Any, image: np.ndarray, **_: Any) -> np.ndarray:
    return np.asarray(policy(Image.fromarray(image)))


def _set_random_state(transform: Any, *key: int) -> None:
    generator = np.random.default_rng(key)
    transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
