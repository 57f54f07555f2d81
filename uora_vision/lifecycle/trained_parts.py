"""What trains: the vectors of the adapter, and the parts of the base that train beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from torch import Tensor

from ..config import BasePart
from ..structure.heads import matching
from ..structure.paths import lies_within
from ..structure.survey import Survey
from .library import LIBRARY, adapters_in, library_of


def trained_tensors(survey: Survey) -> dict[str, Tensor]:
    """The parts of the base that train, or move with training, by name."""
    vectors = {id(p) for adapter in adapters_in(survey).values() for p in adapter.parameters()}
    base = {name: held.tensor for name, held in survey.parameters.items()}
    base = {name: p for name, p in base.items() if p.requires_grad and id(p) not in vectors}
    # A frozen BatchNorm in training mode still moves its statistics, and the adapter was trained with them.
    base |= {name: held.tensor for name, held in survey.buffers.items() if name.endswith(STATISTICS)}
    return base | moved_buffers(survey)


def moved_buffers(survey: Survey) -> dict[str, Tensor]:
    """Buffers of the base, by name, that are part of its state dict and are not as they were without adapters."""
    return library_of(survey.model).buffers.moved(survey)


def base_parameters(survey: Survey, parts: Iterable[str]) -> list[str]:
    """Names of the base's parameters that train: those of heads, norms and biases, and of paths and patterns, as asked;
    of a tied one the first.

    A part of a wrapper or around a base model, which only its place makes a head, is left where it was frozen beside
    others that train: that was done on purpose.
    """
    terms = [part for part in parts if part not in get_args(BasePart)]
    paths = [path for found in matching(terms, [*survey.modules, *survey.weights]).values() for path in found]
    library = survey.model.__dict__.get(LIBRARY)
    flags = library.flags if library else {n: held.tensor.requires_grad for n, held in survey.parameters.items()}
    kept = {name for name, flag in flags.items() if not flag} if any(flags.values()) else set()
    first = {id(held.tensor): name for name, held in survey.parameters.items()}
    chosen = []
    for name, (module, key) in survey.weights.items():
        full = first[id(module._parameters[key])]
        in_head = any(lies_within(one, survey.parts.heads) for one in (name, full))
        head = in_head and (full not in kept or any(lies_within(one, survey.heads) for one in (name, full)))
        norm = "norm" in type(module).__name__.lower()
        bias = key == "bias" or key.endswith("_bias")
        if (
            lies_within(name, paths)
            or ("head" in parts and head)
            or ("norm" in parts and norm)
            or ("bias" in parts and bias)
        ):
            chosen.append(full)
    return list(dict.fromkeys(chosen))


STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
"""Ends of the names of buffers that training moves even in a frozen base."""
