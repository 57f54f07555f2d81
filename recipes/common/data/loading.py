"""Batches that depend only on the seed: what a run reads at step n is known without reading steps 0 to n - 1."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from .augment import DomainShift, ModelInput
from .images import ImageSet

Key = tuple[int, int]  # (epoch, index)


class Images(Dataset):
    """(epoch, index) -> (image (3, H, W) float32, label: a class, or a tensor of float32)."""

    def __init__(self, data: ImageSet, shift: DomainShift, prepare: ModelInput, seed: int = 0) -> None:
        self.data, self.shift, self.prepare, self.seed = data, shift, prepare, seed

    def __len__(self) -> int:
        return len(self.data)

    def picture(self, index: int) -> np.ndarray:
        """The image before it is fitted to the model, (h, w, 3) uint8."""
        return self.shift(self.data.read(index))

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, int | torch.Tensor]:
        epoch, index = key
        label = self.data.labels[index]
        image = self.prepare(self.picture(index), (self.seed, epoch, index))
        return image, torch.tensor(label, dtype=torch.float32) if label.ndim else int(label)


@dataclass(frozen=True)
class Batches:
    """The batches of a whole training run, from step `start` on, as lists of (epoch, index).

    An epoch is cut into batches of nearly equal size, none larger than `batch`, and none is dropped. With `chances` it
    has as many images, drawn anew, some more than once and some not at all. With several
    processes each takes its part of every batch, so `batch` counts the images of one optimizer step.

    Args:
        count: number of images.
        batch: images per step, over all processes.
        epochs: passes over the images.
        seed: of the order.
        start: first step to give, counted over the whole run.
        part, parts: number of this process and of all processes.
        chances: of each image to be drawn, which add up to 1; None for every image once in an epoch.
    """

    count: int
    batch: int
    epochs: int
    seed: int = 0
    start: int = 0
    part: int = 0
    parts: int = 1
    chances: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.count // self.per_epoch < self.parts:
            raise DataError(f"{self.count} examples in batches of {self.batch} are too few for {self.parts} processes")

    @property
    def per_epoch(self) -> int:
        return -(-self.count // self.batch)

    def __len__(self) -> int:
        return self.per_epoch * self.epochs - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        first, skip = divmod(self.start, self.per_epoch)
        for epoch in range(first, self.epochs):
            generator = np.random.default_rng((self.seed, epoch))
            if self.chances is None:
                order = generator.permutation(self.count)
            else:
                order = generator.choice(self.count, self.count, p=self.chances)
            for chunk in np.array_split(order, self.per_epoch)[skip if epoch == first else 0 :]:
                yield [(epoch, int(index)) for index in np.array_split(chunk, self.parts)[self.part]]


def train_loader(data: Dataset, batches: Batches, workers: int) -> DataLoader:
    """A loader over the rest of a run: one iteration of it crosses all epochs."""
    return _loader(data, batches, workers)


def eval_loader(images: Images, batch: int, workers: int, part: int = 0, parts: int = 1) -> DataLoader:
    """Every image once, in order; of several processes each takes every `parts`-th image."""
    mine = range(part, len(images), parts)
    return _loader(images, [[(0, i) for i in mine[k : k + batch]] for k in range(0, len(mine), batch)], workers)


def _loader(data: Dataset, batches: Batches | list[list[Key]], workers: int) -> DataLoader:
    return DataLoader(
        data,
        batch_sampler=batches,  # any sized iterable of lists of keys will do
        num_workers=workers,
        generator=torch.Generator(),  # else starting to iterate would draw from the run's own generator
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_interrupts_to_the_main_process,
    )


def _leave_interrupts_to_the_main_process(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
