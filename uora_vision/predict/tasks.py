"""What each task makes of an input, and of what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import DataError, StateError
from ..structure.heads import head_names

if TYPE_CHECKING:
    import numpy as np

    from .dual import Dual

IMAGES, CLIP = "image-classification", "zero-shot-image-classification"
LABELS, NUMBERS, RANKS = "image-multilabel-classification", "image-regression", "image-ordinal-regression"
TEXTS, VALUES, GENERATION = "text-classification", "text-regression", "text-generation"
"""Tasks, as the hub names them; it has no names for images of several labels, of numbers or of ranks, nor for texts
that are given a value."""
OF_IMAGES = (IMAGES, LABELS, NUMBERS, RANKS, CLIP)
TASKS = (*OF_IMAGES, TEXTS, VALUES, GENERATION)


@dataclass(frozen=True)
class Computed:
    """What came out for a batch of n inputs.

    Args:
        logits: (n, outputs) float32; None where texts are written.
        texts: what was written, (n).
        features: what the head was given, (n, width) float32, where asked for.
    """

    logits: Tensor | None = None
    texts: Sequence[str] = ()
    features: Tensor | None = None


class Task(Protocol):
    """One kind of input and of answer."""

    in_threads: bool
    """Whether `read` may be called in several threads at once."""

    def read(self, item: Any) -> Any:
        """An input, as the model reads it.

        Raises:
            DataError: it cannot be read.
        """

    def compute(self, inputs: Sequence[Any], features: bool, base: bool = False) -> Computed:
        """Of inputs that `read` gave.

        Args:
            base: that the model computes as its base now.
        """


class ImageClassification:
    """Images through a model with a head.

    Args:
        model: that takes (n, 3, H, W) and gives (n, classes), or as `logits` of what it gives.
        config: of timm, as `preprocessing` has it.
    """

    in_threads = True

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        from .images import preparation

        self.model, self.prepare = model, preparation(config)

    def read(self, item: Any) -> Tensor:
        return self.prepare(image_of(item))

    @torch.no_grad()
    def compute(self, inputs: Sequence[Tensor], features: bool, base: bool = False) -> Computed:
        images = torch.stack(list(inputs)).to(next(self.model.parameters()).device)
        with head_inputs(self.model, features) as seen:
            out = self.model(images)
        logits: Tensor = getattr(out, "logits", out)  # models of transformers give more than a tensor
        return Computed(logits.float().cpu(), features=seen() if features else None)


class ZeroShotClassification:
    """Images by the nearest of the classes' texts, as CLIP does it.

    Args:
        dual: the model.
        config: of its images, as `preprocessing` has it.
        prompts: the text of each class.
    """

    in_threads = True

    def __init__(self, dual: Dual, config: Mapping[str, Any], prompts: Sequence[str]) -> None:
        from .images import preparation

        self.dual, self.prepare = dual, preparation(config)
        self.tokens = dual.tokenize(prompts)
        self.texts: dict[bool, Tensor] = {}
        """Features of the texts, (classes, width): of the adapter (False) and of the base."""

    def read(self, item: Any) -> Tensor:
        return self.prepare(image_of(item))

    @torch.no_grad()
    def compute(self, inputs: Sequence[Tensor], features: bool, base: bool = False) -> Computed:
        from .dual import logits, text_features

        device = next(self.dual.parameters()).device
        if base not in self.texts:
            self.texts[base] = text_features(self.dual, self.tokens, device)
        image, _, scale, bias = self.dual(torch.stack(list(inputs)).to(device), None)
        scores = logits(image, self.texts[base], scale, bias).float().cpu()
        return Computed(scores, features=image.cpu() if features else None)


def image_of(item: Any) -> np.ndarray:
    """(h, w, 3) uint8 of a path, encoded bytes, an array, or an image of PIL.

    Raises:
        DataError: it is none of them, or cannot be read.
    """
    import numpy as np

    from .pixels import pixels

    if isinstance(item, str):
        item = Path(item)
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3:
            raise DataError(f"an array must be (h, w, 3) of uint8, got {item.shape} of {item.dtype}")
        return item
    if isinstance(item, Path | bytes):
        return pixels(item, "the image")
    if hasattr(item, "convert") and hasattr(item, "getexif"):  # of PIL, which need not be imported for that
        return pixels(lambda: item, "the image")
    raise DataError(f"an image is a path, bytes, an image of PIL or an array (h, w, 3), not {type(item).__name__}")


@contextmanager
def head_inputs(model: nn.Module, wanted: bool) -> Iterator[Callable[[], Tensor]]:
    """Inside, what the last linear layer of the head is given is kept; call what it yields to have it.

    Raises:
        StateError: the model has no head.
    """
    if not wanted:
        yield _no_head
        return
    heads = [model.get_submodule(name) for name in head_names(model)]
    linear = [m for head in heads for m in head.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise StateError(f"{type(model).__name__} has no head, so there are no features before it")
    seen: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for m in linear]

    def last() -> Tensor:
        if not seen or seen[-1].dim() != 2:
            raise StateError(f"the head of {type(model).__name__} is not given one vector for each input")
        return seen[-1].detach().float().cpu()

    try:
        yield last
    finally:
        for handle in handles:
            handle.remove()


def _no_head() -> Tensor:
    raise StateError("features were not asked for")
