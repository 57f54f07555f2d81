"""Which buffers of the base moved: statistics, centres and queues are written in training, tables are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import warn
from ..structure.survey import Survey
from ..tables import shortened
from ..weights.sharded import is_sharded, whole

LARGEST_COPY = 2**20
"""Numbers in a buffer above which a checksum of it is kept in place of a copy."""

_PART, _WORDS = 2**22, 64


class BaseBuffers:
    """The buffers of a base's state dict as they are without adapters.

    Args:
        survey: of a model that has none yet.
    """

    def __init__(self, survey: Survey) -> None:
        buffers = {name: t for name, t in survey.buffers.items() if t.key not in t.module._non_persistent_buffers_set}
        self.copies: dict[str, Tensor] = {}
        self.sums: dict[str, tuple[torch.dtype, int | None]] = {}
        for name, held in buffers.items():
            if held.tensor.numel() <= LARGEST_COPY:
                self.copies[name] = held.tensor.detach().clone()
            else:
                self.sums[name] = held.tensor.dtype, checksum(held.tensor)

    def moved(self, survey: Survey) -> dict[str, Tensor]:
        """Those that are not as they were, by name.

        Warns:
            UoraWarning: of large ones it cannot be told, since they were cast.
        """
        there = {name: held.tensor for name, held in survey.buffers.items()}
        found = {n: there[n] for n, kept in self.copies.items() if n in there and not _equal(there[n], kept)}
        unknown = []
        for name, (dtype, kept) in self.sums.items():
            if name in there and there[name].dtype != dtype:
                unknown.append(name)
            elif name in there and kept is not None and checksum(there[name]) not in (kept, None):
                found[name] = there[name]
        if unknown:
            warn(
                f"whether {len(unknown)} large buffers of the base ({shortened(unknown, 4)}) moved in training cannot "
                "be told, since they were cast after inject() or load(): they are taken for those of the base. Cast "
                "the model before, or save them beside the adapter."
            )
        return found


def checksum(t: Tensor) -> int | None:
    """Of the bits of a tensor, the same on every device; None of one without values."""
    if t.is_meta:
        return None
    total = 0
    for part in (whole(t) if is_sharded(t) else t).detach().reshape(-1).split(_PART):
        raw = part.clone().view(torch.uint8)
        words = nn.functional.pad(raw, (0, -len(raw) % (8 * _WORDS))).view(torch.int64).view(-1, _WORDS)
        total = hash((total, *words.sum(0).tolist()))
    return total


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.is_meta or two.is_meta:
        return one.shape == two.shape
    return torch.equal(one, two.to(one))
