"""One walk over a model: every weight that could be adapted, and what the rules say of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..weights.role import CONV, OTHER, Role
from .candidates import Candidate, Unit, units
from .paths import lies_within
from .rules import POSITION, ROUTERS, TALKING_HEADS, apply_rules

UNKNOWN = "no rule knows it"


@dataclass(frozen=True)
class Finding:
    """What the walk says of one weight: its roles, or why it has none.

    Args:
        candidate: where it is.
        roles: the projections in it, empty if it is never adapted.
        rule: name of the rule that decided, or the reason for leaving it.
        block: number of its block through the model, None outside of blocks.
    """

    candidate: Candidate
    roles: tuple[Role, ...]
    rule: str
    block: int | None


def walk(
    candidates: Sequence[Candidate], modules: Mapping[str, nn.Module], heads: Sequence[str], outputs: Sequence[str]
) -> Iterator[Finding]:
    """Every weight that could be adapted, in the model's order, with what the rules say of it.

    Args:
        candidates: these weights.
        modules: of the model, by path.
        heads: paths of the modules that make predictions.
        outputs: paths of the modules that make logits over a vocabulary.
    """
    decided: dict[str, tuple[Unit, str, tuple[Role, ...]]] = {}
    for unit in units(candidates, modules):
        known = apply_rules(unit)
        for name, candidate in unit.members.items():
            if lies_within(candidate.path, heads):
                decided[candidate.path] = unit, "part of the head", ()
            elif lies_within(candidate.path, outputs):
                decided[candidate.path] = unit, "output embedding", ()
            else:
                decided[candidate.path] = unit, *known.get(name, _left(candidate))
    blocks: dict[str, int] = {}
    for candidate in candidates:
        unit, rule, roles = decided[candidate.path]
        projects = any(role.group not in (CONV, OTHER) for role in roles)
        path = _block(f"{unit.path}.") if projects else None
        yield Finding(candidate, roles, rule, None if path is None else blocks.setdefault(path, len(blocks)))


def _left(candidate: Candidate) -> tuple[str, tuple[Role, ...]]:
    """Of a weight that no rule knows: adapted on request only, or never."""
    if ROUTERS.search(candidate.module_path):
        return "routes to experts", ()
    if POSITION.search(candidate.path):
        return "position bias", ()
    if TALKING_HEADS.search(candidate.module_path):
        return "mixes heads", ()
    kernel = candidate.form == "kernel"
    name, rows = (
        re.sub(r"\W", "_", candidate.module_path.rpartition(".")[2]) or "weight",
        candidate.shape[0] // candidate.groups,
    )
    group = CONV if kernel else OTHER
    if candidate.groups == 1:
        return UNKNOWN, (Role(name, group, 0, rows),)
    return UNKNOWN, tuple(Role(f"{name}_{g}", group, g * rows, rows) for g in range(candidate.groups))


def _block(path: str) -> str | None:
    """The innermost numbered module: `blocks.3.attn.` lies in `blocks.3`."""
    match = re.match(r"(.*\.\d+|\d+)\.", path)
    return match[1] if match else None
