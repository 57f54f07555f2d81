"""What trains: the vectors of the adapter, and the parts of the base that train beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from torch import Tensor, nn

from ..config import BasePart
from ..structure.heads import matching
from ..structure.paths import lies_within
from ..structure.survey import Survey
from .library import LIBRARY, active_entry, adapters_in


def trained_tensors(survey: Survey) -> dict[str, Tensor]:
    """The parts of the base that train, or move with training, by name."""
    vectors = {id(p) for adapter in adapters_in(survey).values() for p in adapter.parameters()}
    base = {name: held.tensor for name, held in survey.parameters.items()}
    base = {name: p for name, p in base.items() if p.requires_grad and id(p) not in vectors}
    # A frozen BatchNorm in training mode still moves its statistics, and the adapter was trained with them.
    return base | {name: held.tensor for name, held in survey.buffers.items() if name.endswith(STATISTICS)}


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


def param_groups(
    model: nn.Module, lr: float, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What an injected model trains, in groups for an optimizer.

    Args:
        lr: learning rate of b and d, and of norms and biases that train.
        head_lr: of heads and of what `train` named by its path; `lr` if None.
        weight_decay: of the head's matrices. Vectors never decay: a decaying d would fire by itself.

    Returns:
        Groups named `adapter`, `base`, `head` and `head_vectors`, those that are not empty.

    Raises:
        StateError: the model is not injected.
    """
    survey = Survey(model)
    vectors = {id(p) for adapter in adapters_in(survey).values() for p in adapter.parameters()}
    asked = [term for term in active_entry(model).config.train if term not in ("norm", "bias")]
    heads = {id(survey.tensors[name].tensor) for name in base_parameters(survey, asked)} | {
        id(held.tensor) for name, held in survey.parameters.items() if lies_within(name, survey.parts.heads)
    }
    groups: dict[str, list[nn.Parameter]] = {"adapter": [], "base": [], "head": [], "head_vectors": []}
    for module, key in survey.parameters.values():
        p = module._parameters[key]
        assert p is not None
        if id(p) in vectors:
            groups["adapter"].append(p)
        elif p.requires_grad:
            in_head = id(p) in heads
            groups[("head" if p.dim() > 1 else "head_vectors") if in_head else "base"].append(p)
    rates = {"adapter": lr, "base": lr}
    return [
        {
            "name": name,
            "params": params,
            "lr": rates.get(name, lr if head_lr is None else head_lr),
            "weight_decay": weight_decay if name == "head" else 0.0,
        }
        for name, params in groups.items()
        if params
    ]
