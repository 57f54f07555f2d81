"""Tensors made inside torch.inference_mode can never take part in training; adapters must."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import StateError
from ..private import tree_map_only
from ..structure.survey import Survey

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run as outside of torch.inference_mode where it is called inside."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, (args, kwargs))
            return function(*args, **kwargs)

    return call


def check_normal(survey: Survey) -> None:
    """Whether the tensors of a model can be adapted.

    Raises:
        StateError: they were made inside torch.inference_mode.
    """
    made = [name for name, held in survey.tensors.items() if held.tensor.is_inference()]
    if made:
        raise StateError(
            f"{made[0]} was made inside torch.inference_mode, so nothing that it is part of can be trained. Make the "
            "model outside of it; its forward can run inside."
        )
