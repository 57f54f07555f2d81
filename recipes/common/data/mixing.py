"""Images and labels of a batch mixed with one another, by timm's Mixup."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch.utils.data import Dataset

from .augment import chance
from .loading import Images, Key

Example = tuple[torch.Tensor, torch.Tensor]


class Mixed(Dataset):
    """(epoch, index) -> (image (3, H, W) float32, shares of the classes, or means of labels or numbers, (outputs,)),
    mixed within a batch.

    What is drawn follows from the seed, the epoch and the first image of the batch. In a batch of odd size the last
    image stays as it is.

    Args:
        images: what is mixed.
        mixup, cutmix: alpha of each; of two that are above 0, chance takes one for every batch.
        smoothing: share of a label that is spread over all classes.
        classes: outputs of the model.
    """

    def __init__(self, images: Images, mixup: float, cutmix: float, smoothing: float, classes: int) -> None:
        self.images, self.classes, self.smoothing = images, classes, smoothing
        self.alphas = mixup, cutmix

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Example:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Example]:
        """A batch, as torch's DataLoader asks for it."""
        pictures, labels = zip(*(self.images[key] for key in keys), strict=True)
        x, even = torch.stack(pictures), len(keys) // 2 * 2
        if isinstance(labels[0], torch.Tensor):
            shares = torch.stack(labels)
        else:
            shares = mixup_target(torch.tensor(labels), self.classes, 1.0, self.smoothing)
        if even:
            mix = Mixup(*self.alphas, label_smoothing=0.0, num_classes=even)  # of the images as classes of their own
            with chance(self.images.seed, *keys[0]):
                x[:even], images = mix(x[:even].clone(), torch.arange(even))
            shares[:even] = images @ shares[:even]
        return list(zip(x, shares, strict=True))
