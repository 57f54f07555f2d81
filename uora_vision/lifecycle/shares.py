"""Shares of what adapters have learnt: weights that lie between those of the base and theirs."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import ConfigError, StateError
from ..structure.survey import Survey
from .entry import Entry, Learnt
from .inference_mode import outside_inference_mode
from .library import Library, active_entry, check_movable, check_outside, known_name, library_of, strangers


@outside_inference_mode
@torch.no_grad()
def strength(model: nn.Module, share: float, name: str | None = None) -> float:
    """Set how much of an adapter the model takes: 0 is the base, 1 what was learnt, and between them lies the trade of
    new skill against what is forgotten.

    Every weight W + dW becomes W + share * dW, and what the adapter trained of the base (a head, norms) becomes
    base + share * (trained - base): WiSE-FT's interpolation, with no copy of a weight, and at no cost in a forward, as
    b is what is scaled. `route`, `save`, `merge` and `export` take the adapter as it is then; 1 brings it back to the
    bit. If it has been trained at another strength than 1, what it has become is its full strength from then on.

    Args:
        share: any finite number; above 1 goes further than training did, below 0 away from it.
        name: of the adapter; the active one by default.

    Returns:
        The strength that it had before.

    Raises:
        StateError: the model is not injected, is merged, is spread over processes or has a mixed batch; there is no
            such adapter; it has a head of another shape than the base; or something trains that is no part of it.
        ConfigError: `share` is not finite.

    Source:
        Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), CVPR 2022, https://arxiv.org/abs/2109.01903

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), rank=4)
        >>> _ = uora.adapters(model)["linear1"].b.data.normal_()
        >>> uora.strength(model, 0.6)
        1.0
        >>> uora.strength(model, 1)
        0.6
    """
    check_share("the strength", share)
    library, survey = library_of(model), Survey(model)
    check_outside(library)
    entry = active_entry(model) if name is None else known_name(library, name)
    check_movable(survey, library)
    if entry is library.entries.get(library.active or "") and (strange := strangers(survey, library)):
        raise StateError(
            f"{strange[0]} trains, but not as a part of the adapter, so what the base has there is not known. Freeze "
            "it, or name it in train= of inject()."
        )
    learnt = _learnt(library, entry)
    if share == learnt.share:
        return learnt.share
    vectors = [share * b for b in learnt.b]
    parts = {part: towards(part, library.base_parts[part], [(share, t)]) for part, t in learnt.parts.items()}
    with library.undo(model, name) as undo:
        for target, value in zip(_vectors(entry), vectors, strict=True):
            undo.write(target, value)
        for part, value in parts.items():
            undo.write(entry.parts[part], learnt.parts[part] if share == 1 else value)
        entry.learnt = None if share == 1 else Learnt(learnt.b, learnt.parts, float(share))
    return learnt.share


def _vectors(entry: Entry) -> list[Tensor]:
    """The b of each weight, as views of what the adapter holds."""
    if entry.vector is not None:
        return list(entry.vector.split(entry.placement.sizes)[::2])
    return [module.b for module in entry.modules or ()]


def _learnt(library: Library, entry: Entry) -> Learnt:
    """What the adapter is at full strength: what was kept, unless it has been trained since."""
    there = [*_vectors(entry), *(entry.parts[part] for part in _between(library, entry))]
    kept = entry.learnt
    if kept is not None and kept.parts.keys() == set(_between(library, entry)):
        parts = [towards(part, library.base_parts[part], [(kept.share, t)]) for part, t in kept.parts.items()]
        expected = [*(kept.share * b for b in kept.b), *parts]
        if all(e.shape == t.shape and torch.equal(e.to(t), t) for e, t in zip(expected, there, strict=True)):
            return kept
    b = tuple(t.detach().clone() for t in _vectors(entry))
    return Learnt(b, {part: entry.parts[part].detach().clone() for part in _between(library, entry)}, 1.0)


def _between(library: Library, entry: Entry) -> list[str]:
    """The parts of the base that have values between the base's and the adapter's."""
    return [part for part, t in entry.parts.items() if t.is_floating_point() and part in library.base_parts]


def check_share(what: str, share: float) -> None:
    """Whether a share of an adapter is a finite number.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(share, int | float) or not abs(share) <= sys.float_info.max:
        raise ConfigError(f"{what} must be a finite number, got {share!r}")


def towards(name: str, own: Tensor, shares: Iterable[tuple[float, Tensor]]) -> Tensor:
    """base + sum(share * (trained - base)) of a part of the base, in float32 or wider.

    Args:
        own: the base's value.
        shares: each with what an adapter has there.

    Raises:
        StateError: an adapter has a head of another shape.
    """
    changes = list(shares)
    if odd := [t for _, t in changes if t.shape != own.shape]:
        raise StateError(
            f"{name} has shape {tuple(odd[0].shape)} in an adapter and {tuple(own.shape)} in the base; only heads of "
            "one shape can be mixed"
        )
    wide = own.to(torch.promote_types(own.dtype, torch.float32))
    return wide + sum(share * (t.to(wide) - wide) for share, t in changes)
