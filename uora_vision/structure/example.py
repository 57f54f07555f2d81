"""An example input of a model: how it is passed, how the model is run on it, and what is compared of what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError


def call(model: nn.Module, example_input: Any) -> Any:
    if isinstance(example_input, Mapping):
        return model(**example_input)
    if isinstance(example_input, tuple | list):
        return model(*example_input)
    return model(example_input)


def check_devices(parameters: Iterable[Tensor], example_input: Any) -> None:
    """Whether a model on the meta device is given an input there, and no other model is.

    Args:
        parameters: of the model.

    Raises:
        StateError: it is not so.
    """
    tensors = list(_tensors(example_input))
    meta = any(p.is_meta for p in parameters)
    if meta and not all(t.is_meta for t in tensors):
        raise StateError(
            "the model is on the meta device and the example input is not; give an input there, as torch.randn(..., "
            "device='meta') makes it, or load the weights first"
        )
    if not meta and any(t.is_meta for t in tensors):
        raise StateError("the example input is on the meta device and the model is not; give an input with values")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode. Its training flags and the random state are as before afterwards."""
    flags = [(module, module.training) for _, module in model.named_modules()]
    parameters = (p for module, _ in flags for p in module._parameters.values() if p is not None)
    try:
        with torch.random.fork_rng(sorted({p.device.index for p in parameters if p.is_cuda})):
            model.train()  # models that keep things between eval forwards (timm's LeViT) drop them here
            model.eval()
            yield
    finally:
        model.train()  # whatever its flag, as above
        for module, training in flags:  # parents come first
            if module.training != training:
                module.train(training)


def float_tensors(output: Any) -> Iterator[Tensor]:
    return (t for t in _tensors(output) if t.is_floating_point())
