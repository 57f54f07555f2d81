"""What trains: the vectors of the adapter, and the parts of the base that train beside them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..structure.paths import lies_within
from ..structure.survey import Survey
from .library import adapters_in


def trained_base(survey: Survey) -> dict[str, Tensor]:
    """The parts of the base that train, or move with training, by name."""
    vectors = {id(p) for adapter in adapters_in(survey).values() for p in adapter.parameters()}
    base = {name: held.tensor for name, held in survey.parameters.items()}
    base = {name: p for name, p in base.items() if p.requires_grad and id(p) not in vectors}
    # A frozen BatchNorm in training mode still moves its statistics, and the adapter was trained with them.
    return base | {name: held.tensor for name, held in survey.buffers.items() if name.endswith(STATISTICS)}


def base_parameters(survey: Survey, parts: Iterable[str]) -> list[str]:
    """Names of the base's parameters that belong to `head`, `norm` or `bias`; of a tied one the first."""
    first = {id(held.tensor): name for name, held in survey.parameters.items()}
    chosen = []
    for name, (module, key) in survey.weights.items():
        head = lies_within(name, survey.heads)
        norm = "norm" in type(module).__name__.lower()
        bias = key == "bias" or key.endswith("_bias")
        if ("head" in parts and head) or ("norm" in parts and norm) or ("bias" in parts and bias):
            chosen.append(first[id(module._parameters[key])])
    return list(dict.fromkeys(chosen))


STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
"""Ends of the names of buffers that training moves even in a frozen base."""
