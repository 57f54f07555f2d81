"""A base and its adapter together, as one function from inputs to predictions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import StateError
from ..lifecycle.library import adapters
from ..lifecycle.merging import merge as merge_in
from ..storage.folder import read_folder
from ..storage.hub import is_repository, there
from ..storage.save_load import load
from .answers import Prediction, answers
from .making import labels_of, make_task, task_of
from .tasks import Computed, Task


class Predictor:
    """A base and its adapter together: call it on inputs. `load_predictor` makes it.

    Args:
        model: with the adapter, or the adapter merged into it.
        task: makes inputs of what people have, and runs the model.
        name: of the task, as the hub has it.
        classes: their names, in the order of the outputs; empty where the task has none.
        merged: whether the adapter is merged, so that the model cannot compute as its base.
        about: what the adapter says besides, as its `preprocessing`: names and units of numbers.

    Example:
        >>> import uora_vision as uora
        >>> predictor = uora.load_predictor("runs/photos/adapter")  # doctest: +SKIP
        >>> predictor.classes  # doctest: +SKIP
        ('cat', 'dog')
        >>> predictor("cat.jpg").answer  # doctest: +SKIP
        'cat'
    """

    def __init__(
        self, model: nn.Module, task: Task, name: str, classes: Sequence[str], merged: bool,
        about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.task, self.name, self.merged, self.about = model, task, name, merged, about or {}
        self.classes = tuple(classes)

    def __call__(self, inputs: Any, *, batch: int = 32, embeddings: bool = False) -> Any:
        """Predict.

        Args:
            inputs: one input, or a list of them: of images a path, bytes, an image of PIL or an array (h, w, 3) of
                uint8; of texts a text, or a tuple of texts where the task compares several.
            batch: inputs at a time.
            embeddings: whether predictions carry what the head was given.

        Returns:
            A `Prediction`, or a list of them.

        Raises:
            DataError: an input cannot be read.
            FormatError: there are more names of classes than the model has outputs.
        """
        several = isinstance(inputs, list)
        items = inputs if several else [inputs]
        found: list[Prediction] = []
        for start in range(0, len(items), batch):
            found += self.predict([self.task.read(item) for item in items[start : start + batch]], embeddings)
        return found if several else found[0]

    def predict(self, inputs: Sequence[Any], embeddings: bool = False, base: bool = False) -> list[Prediction]:
        """Of one batch of what `task.read` gave.

        Args:
            base: by the base, with the trained head and without dW.

        Raises:
            StateError: of the base, and the adapter is merged.
        """
        if not inputs:
            return []
        if not base:
            return self._answers(self.task.compute(inputs, embeddings))
        if self.merged:
            raise StateError("the adapter is merged, so there is no base to compare with; load with merge=False")
        with without_update(self.model):
            return self._answers(self.task.compute(inputs, embeddings, base=True))

    def _answers(self, computed: Computed) -> list[Prediction]:
        return answers(computed, self.name, self.classes, self.about)


def load_predictor(
    adapter: str | os.PathLike[str],
    *,
    model: str | nn.Module | None = None,
    checkpoint: str | None = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    merge: bool = True,
    revision: str | None = None,
) -> Predictor:
    """A base and its adapter in one call: from timm, open_clip, transformers or a folder, by the name in the adapter.

    Args:
        adapter: the folder that `save` wrote; or a repository on the Hugging Face hub, `user/name`.
        model: the base, where the adapter does not say it or it is not there: `timm/NAME`, `timm/local-dir:FOLDER`,
            `open_clip/NAME`, `transformers/NAME_OR_FOLDER`; or a model.
        checkpoint: weights of the base, from a file; for open_clip also a tag of published ones.
        classes: names for those that the adapter does not have, in the order of the outputs. With CLIP any others, told
            apart by their prompts.
        device: where to compute; a GPU if there is one, by default.
        merge: whether dW is added to the weights, which is fastest; otherwise the model can also compute as its base.
        revision: of the repository.

    Raises:
        FormatError: the adapter is damaged, or of another base.
        ConfigError: the base is not to be had, or the adapter does not say what it is for.
        HubError: the repository cannot be had.

    Example:
        >>> import uora_vision as uora
        >>> predictor = uora.load_predictor("runs/photos/adapter")  # doctest: +SKIP
        >>> [p.answer for p in predictor(["a.jpg", "b.jpg"])]  # doctest: +SKIP
        ['cat', 'dog']
        >>> uora.load_predictor("nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        uora_vision.errors.FormatError: nowhere/adapter_model.safetensors does not exist; ...
    """
    folder, here = Path(adapter), True
    if is_repository(adapter):
        folder, here = there(adapter, revision), False
    stored = read_folder(folder)
    task, names = task_of(stored), labels_of(stored, classes)
    made, running = make_task(stored, folder if here else None, names, model, checkpoint)
    load(made, folder)
    if merge:
        merge_in(made)
    made.to(device or default_device()).eval()
    return Predictor(made, running, task, names, merge, stored.about.get("preprocessing"))


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def without_update(model: nn.Module) -> Iterator[None]:
    """Inside, dW is 0, and all else as it is."""
    found = [adapter.b for adapter in adapters(model).values()]
    kept = [b.data for b in found]
    try:
        for b in found:
            b.data = torch.zeros_like(b.data)
        yield
    finally:
        for b, value in zip(found, kept, strict=True):
            b.data = value
