"""One walk over a model: every weight that could be adapted, and what the rules say of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..weights.role import ATTENTION, CONV, MLP, OTHER, Role
from .candidates import Candidate, Unit, units
from .general import UNKNOWN, claim_rest, heads_within, reason_against, reason_left, stands_apart, why_on_request
from .heads import Parts, find_parts
from .paths import lies_within
from .rules import apply_rules
from .shared_rules import load_shared_rules
from .unused import find_unused


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
    model: nn.Module, candidates: Sequence[Candidate], modules: Mapping[str, nn.Module]
) -> tuple[tuple[Finding, ...], Parts]:
    """Every weight that could be adapted, in the model's order, with what the rules say of it, and the heads.

    Args:
        candidates: these weights.
        modules: of the model, by path.
    """
    load_shared_rules()
    decided: dict[str, tuple[Unit, str, tuple[Role, ...]]] = {}
    left = []
    for unit in units(candidates, modules):
        known, free = apply_rules(unit), {}
        for name, candidate in unit.members.items():
            against = reason_against(unit, name, candidate)
            if not known.get(name, ("",))[0].startswith("registered"):
                if against:
                    known[name] = against, ()
                elif stands_apart(candidate.path):
                    known.pop(name, None)
            decided[candidate.path] = unit, *known.get(name, _left(unit, name, candidate))
            if decided[candidate.path][1] == UNKNOWN:
                free[name] = candidate
        left.append((unit, free))
    grouped = {
        path: roles[0].group
        for path, (_, rule, roles) in decided.items()
        if roles and roles[0].group not in (CONV, OTHER)
    }
    for path, (rule, roles) in claim_rest(left, grouped).items():
        decided[path] = decided[path][0], rule, roles
    decided = {candidate.path: decided[candidate.path] for candidate in candidates}
    kinds = {
        path: roles[0].group for path, (_, _, roles) in decided.items() if roles and roles[0].group in (ATTENTION, MLP)
    }
    blocks = _blocks({path: (decided[path][0].path, kind) for path, kind in kinds.items()})
    parts = find_parts(model, modules, kinds, {path: blocks.get(path) for path in decided})
    attending = [path for path, kind in kinds.items() if kind == ATTENTION]
    plain = [new for new in parts.new if not any(lies_within(path, (new,)) for path in attending)]
    claimed = {path: decided[path][2] for path in kinds}
    unused = find_unused(modules, claimed)
    numbers: dict[str, int] = {}
    findings = []
    for candidate in candidates:
        _, rule, roles = decided[candidate.path]
        block = blocks.get(candidate.path)
        if lies_within(candidate.path, parts.heads):
            rule, roles = "part of the head", ()
        elif lies_within(candidate.path, parts.outputs):
            rule, roles = "output embedding", ()
        elif kinds.get(candidate.path) == MLP and lies_within(candidate.path, plain):
            rule, roles = _on_request(
                decided[candidate.path][0], candidate
            )  # two layers behind the last block are a head, and no MLP of the base
        elif kinds.get(candidate.path) and heads_within(candidate.path, claimed):
            rule, roles = "head inside of the model", ()
        elif candidate.path in unused and not rule.startswith("registered"):
            rule, roles = unused[candidate.path], ()
        projects = block is not None and any(role.group not in (CONV, OTHER) for role in roles)
        number = numbers.setdefault(block, len(numbers)) if projects and block is not None else None
        findings.append(Finding(candidate, roles, rule, number))
    return tuple(findings), parts


def _left(unit: Unit, name: str, candidate: Candidate) -> tuple[str, tuple[Role, ...]]:
    """Of a weight that no rule knows: adapted on request only, or never."""
    reason = reason_left(unit, name, candidate)
    return (reason, ()) if reason else _on_request(unit, candidate)


def _on_request(unit: Unit, candidate: Candidate) -> tuple[str, tuple[Role, ...]]:
    why = why_on_request(unit, candidate)
    kernel = candidate.form == "kernel" and candidate.tensor == "weight"
    name, rows = (
        re.sub(r"\W", "_", candidate.module_path.rpartition(".")[2]) or "weight",
        candidate.shape[0] // candidate.groups,
    )
    group = CONV if kernel else OTHER
    if candidate.groups == 1:
        return why, (Role(name, group, 0, rows),)
    return why, tuple(Role(f"{name}_{g}", group, g * rows, rows) for g in range(candidate.groups))


def _blocks(owners: Mapping[str, tuple[str, str]]) -> dict[str, str | None]:
    """The path of the block around each weight: of the innermost numbered module, or of one further out if that first
    brings attention and MLP together, as where several of each stand beside each other in a block.

    Args:
        owners: path of the unit and group of each weight, by its path.
    """
    levels = {path: [unit[: m.end() - 1] for m in _NUMBERED.finditer(f"{unit}.")] for path, (unit, _) in owners.items()}
    held: dict[str, set[str]] = {}
    for path, tops in levels.items():
        for top in tops:
            held.setdefault(top, set()).add(owners[path][1])
    whole = {top for top, kinds in held.items() if len(kinds) > 1}
    stages = {top for top in whole if any(other.startswith(f"{top}.") for other in whole)}
    found: dict[str, str | None] = {}
    for path, tops in levels.items():
        own = [top for top in reversed(tops) if top in whole - stages]
        found[path] = own[0] if own else tops[-1] if tops else None
    return found


_NUMBERED = re.compile(r"(?:(?<=\.)|^)(?:\w*_)?\d+\.")
"""A numbered module in a path: `3`, or `encoder_layer_3`."""
