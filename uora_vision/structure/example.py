"""An example input of a model: how it is passed, how the model is run on it, and what is compared of what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def call(model: nn.Module, example_input: Any) -> Any:
    if isinstance(example_input, Mapping):
        return model(**example_input)
    if isinstance(example_input, tuple | list):
        return model(*example_input)
    return model(example_input)


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
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from float_tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from float_tensors(value)
