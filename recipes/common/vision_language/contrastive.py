"""What a model of images and texts learns, and how it is measured: naming classes, and finding one by the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from uora_vision.predict.dual import CHUNK, Dual, Tokens, fill, logits, text_features

from ..data.loading import Images, eval_loader
from ..errors import RecipeError
from ..vision.evaluation import Classification, Evaluation
from .pairs import PairImages


def prompts(template: str, names: Sequence[str]) -> list[str]:
    """The text of each class; an underscore in a name is a space.

    Raises:
        RecipeError: the template has no place for the name.
    """
    if template.count("{}") != 1:
        raise RecipeError(f"--template must have one {{}} for the name of the class, got {template!r}")
    return fill(template, names)


def pair_loss(scores: Tensor, same: Tensor, sigmoid: bool) -> Tensor:
    """Of scores (n, m) where `same` says which belong together: SigLIP's sum over pairs, or cross-entropy by row.

    A row with several right columns shares its weight among them.
    """
    if sigmoid:
        return -logsigmoid(torch.where(same, scores, -scores)).sum(1).mean()
    return nn.functional.cross_entropy(scores, same.float() / same.sum(1, keepdim=True))


class ZeroShot(nn.Module):
    """A classifier made of a model and the features of the classes' texts."""

    def __init__(self, dual: Dual, text: Tensor) -> None:
        super().__init__()
        self.dual, self.text = dual, text

    def forward(self, images: Tensor) -> Tensor:
        image, _, scale, bias = self.dual(images, None)
        return logits(image, self.text, scale, bias)


def zero_shot(dual: Dual, tests: Images, tokens: Tokens, accelerator: Accelerator, batch: int, workers: int) -> Any:
    """Name what is in every test image by the nearest text. The loss is cross-entropy, for SigLIP too."""
    training = dual.training
    dual.to(accelerator.device).eval()
    with accelerator.autocast():
        text = text_features(dual, tokens, accelerator.device)
        found = Classification(tests, batch, workers).evaluate(ZeroShot(dual, text), accelerator)
    dual.train(training)
    return found


class Naming:
    """The task of naming what is in an image by the text of its class.

    Args:
        dual: the model.
        tests: images to measure on.
        tokens: of the text of each class.
        cached: the texts' features stay as they are, since their tower is frozen.
    """

    measures, running = Classification.measures, "accuracy"

    def __init__(self, dual: Dual, tests: Images, tokens: Tokens, cached: bool, batch: int, workers: int) -> None:
        self.dual, self.tests, self.tokens, self.cached = dual, tests, tokens, cached
        self.batch, self.workers = batch, workers
        self.text: Tensor | None = None

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, int]:
        images, labels = batch
        if self.cached and self.text is None:
            self.text = text_features(self.dual, self.tokens, images.device)
        given = None if self.cached else send_to_device(self.tokens, images.device)
        image, text, scale, bias = model(images, given)
        scores = logits(image, self.text if text is None else text, scale, bias)
        same = labels[:, None] == torch.arange(scores.shape[1], device=labels.device)
        return pair_loss(scores, same, self.dual.sigmoid), (scores.argmax(1) == labels).sum(), len(labels)

    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Evaluation:
        found = zero_shot(self.dual, self.tests, self.tokens, accelerator, self.batch, self.workers)
        model.train()
        return found


@dataclass
class Retrieval:
    """Shares of images that have a text of theirs among the first 1 or 5, of texts likewise, and the means of both."""

    scores: dict[str, float]


class Matching:
    """The task of telling which image and text belong together, among those of a batch.

    Images that are the same, and texts that are, count as belonging together. With several processes each compares
    within its own part of a batch.
    """

    measures = (
        "recall_1", "recall_5", "image_to_text_recall_1", "image_to_text_recall_5", "text_to_image_recall_1",
        "text_to_image_recall_5", "loss",
    )  # fmt: skip
    running = "accuracy"

    def __init__(self, dual: Dual, tests: PairImages, batch: int, workers: int) -> None:
        self.dual, self.tests, self.batch, self.workers = dual, tests, max(64, batch), workers

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, int]:
        images, tokens, keys = batch
        image, text, scale, bias = model(images, tokens)
        scores, same = logits(image, text, scale, bias), _same(keys)
        loss = pair_loss(scores, same, self.dual.sigmoid)
        if not self.dual.sigmoid:
            loss = (loss + pair_loss(scores.T, same.T, False)) / 2
        return loss, same.gather(1, scores.argmax(1, keepdim=True)).sum(), len(images)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, accelerator: Accelerator) -> Retrieval:
        """Every test pair once, by every process."""
        dual, parts, losses = self.dual.to(accelerator.device).eval(), [], []
        with accelerator.autocast():
            for batch in eval_loader(self.tests, self.batch, self.workers):
                images, tokens, keys = send_to_device(batch, accelerator.device)
                image, text, scale, bias = dual(images, tokens)
                scores = logits(image, text, scale, bias).float()
                losses.append((pair_loss(scores, _same(keys), dual.sigmoid).item(), len(images)))
                parts.append((image.float().cpu(), text.float().cpu(), keys.cpu()))
        model.train()
        image, text, keys = (torch.cat(column) for column in zip(*parts, strict=True))
        found = {
            **{f"image_to_text_recall_{k}": value for k, value in recalls(image, text, keys[:, 0], keys[:, 1]).items()},
            **{f"text_to_image_recall_{k}": value for k, value in recalls(text, image, keys[:, 1], keys[:, 0]).items()},
        }
        means = {
            f"recall_{k}": (found[f"image_to_text_recall_{k}"] + found[f"text_to_image_recall_{k}"]) / 2 for k in (1, 5)
        }
        loss = sum(value * count for value, count in losses) / sum(count for _, count in losses)
        return Retrieval({**means, **found, "loss": loss})


def recalls(asked: Tensor, found: Tensor, asked_keys: Tensor, found_keys: Tensor) -> dict[int, float]:
    """Of distinct things asked for, the share that has something of its own among the nearest 1 and 5 distinct finds.

    Args:
        asked, found: features of either side of each pair, (n, width).
        asked_keys, found_keys: equal numbers for equal things, (n,).
    """
    rows, columns = _first(asked_keys), _first(found_keys)
    pairs = set(zip(asked_keys.tolist(), found_keys.tolist(), strict=True))
    hits = {1: 0, 5: 0}
    for chunk in rows.split(CHUNK):
        nearest = (asked[chunk] @ found[columns].T).topk(min(5, len(columns)), 1).indices
        for row, order in zip(chunk.tolist(), nearest.tolist(), strict=True):
            right = [(int(asked_keys[row]), int(found_keys[columns[k]])) in pairs for k in order]
            hits[1] += right[0]
            hits[5] += any(right)
    return {k: count / len(rows) for k, count in hits.items()}


def _first(keys: Tensor) -> Tensor:
    """Where each number stands first."""
    places: dict[int, int] = {}
    for place, key in enumerate(keys.tolist()):
        places.setdefault(key, place)
    return torch.tensor(list(places.values()))


def _same(keys: Tensor) -> Tensor:
    """(n, n): whether two pairs share their image (first number) or their text (second)."""
    return (keys[:, None] == keys[None]).any(-1)
