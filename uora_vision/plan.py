"""What would be adapted, decided before anything is touched."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from .config import UoraConfig
from .errors import ConfigError, TargetError
from .layers import Role
from .tables import render
from .walker import ATTENTION, MLP, Finding, walk

GROUPS = {"attention": ATTENTION, "mlp": MLP}


@dataclass(frozen=True)
class Projection:
    """One weight to adapt.

    Args:
        path: of its module.
        shape: (out, in) of the weight.
        roles: the adapted roles, by ascending first row.
        rule: which rule knew it.
        block: number of its block, None outside of blocks.
        weight_is_read: whether its parent may take the weight itself rather than call the module.
    """

    path: str
    shape: tuple[int, int]
    roles: tuple[Role, ...]
    rule: str
    block: int | None
    weight_is_read: bool = False

    def parameters(self, rank: int) -> int:
        return sum(role.rows + rank for role in self.roles)


@dataclass(frozen=True)
class Skipped:
    """A Linear that is left as it is, and why."""

    path: str
    shape: tuple[int, int]
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """What `inject` would adapt, and what it would leave. `print(plan)` shows a table."""

    config: UoraConfig
    projections: tuple[Projection, ...]
    skipped: tuple[Skipped, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters that the adapters would train."""
        return sum(p.parameters(self.config.rank) for p in self.projections)

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "parameters": self.parameters,
            "projections": [asdict(p) for p in self.projections],
            "skipped": [asdict(s) for s in self.skipped],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __repr__(self) -> str:
        rank = self.config.rank
        rows: Counter[tuple[str, str, str, str]] = Counter()
        counts: Counter[tuple[str, str, str, str]] = Counter()
        for p in self.projections:
            for role in p.roles:
                reach = "adapted, weight read" if p.weight_is_read else "adapted"
                key = (role.label, f"{role.rows} x {p.shape[1]}", reach, p.rule)
                rows[key] += 1
                counts[key] += role.rows + rank
        for s in self.skipped:
            rows["", f"{s.shape[0]} x {s.shape[1]}", "left", s.reason] += 1
        table = [(label, n, shape, what, why, f"{counts[key]:,}" if counts[key] else "")
                 for key, n in rows.items() for label, shape, what, why in [key]]  # fmt: skip
        title = f"{len(self.projections)} weights to adapt at rank {rank}: {self.parameters:,} parameters"
        return render(title, ("role", "count", "out x in", "", "rule or reason", "parameters"), table)


def plan(model: nn.Module, config: UoraConfig | None = None, **options: Any) -> Plan:
    """What `inject` would do with the same arguments. Touches nothing.

    Raises:
        ConfigError, OptionError: an option is wrong.
        TargetError: nothing in the model matches a term.
    """
    config = (config or UoraConfig()).replace(**options)
    findings = list(walk(model))
    found = [(f, role) for f in findings for role in f.roles]
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no attention or MLP projection that the rules know (of {len(findings)} Linear "
            "layers). UORA adapts transformers; a convolutional network has nothing to adapt."
        )
    chosen = _match(found, config.targets) - _match(found, config.exclude)
    chosen &= _in_blocks(found, config.blocks)
    if not chosen:
        raise TargetError(
            f"targets {'+'.join(config.targets)!r}, exclude {'+'.join(config.exclude)!r} and blocks {config.blocks} "
            f"together leave nothing; this model has: {_inventory(found)}"
        )
    projections, skipped, number = [], [], 0
    for finding in findings:
        mine = range(number, number := number + len(finding.roles))
        roles = tuple(role for i, role in zip(mine, finding.roles, strict=True) if i in chosen)
        if roles:
            site = finding.site
            projections.append(
                Projection(site.path, site.shape, roles, finding.rule, finding.block, site.weight_is_read)
            )
        else:
            skipped.append(
                Skipped(finding.site.path, finding.site.shape, "not asked for" if finding.roles else finding.rule)
            )
    return Plan(config, tuple(projections), tuple(skipped))


def _match(found: list[tuple[Finding, Role]], terms: Any) -> set[int]:
    chosen: set[int] = set()
    for term in terms:
        parts = ("q", "v") if term == "qv" else (term,)
        for part in parts:
            hits = {i for i, (finding, role) in enumerate(found) if _is(part, finding, role)}
            if not hits and part not in GROUPS:
                raise TargetError(f"no projection matched {part!r}; this model has: {_inventory(found)}")
            chosen |= hits
    return chosen


def _is(term: str, finding: Finding, role: Role) -> bool:
    if term == "all" or GROUPS.get(term) == role.group:
        return True
    path = finding.site.path
    return term in (role.name, role.label, path) or any(
        fnmatch.fnmatchcase(p, term) for p in (path, f"{path}.{role.name}")
    )


def _in_blocks(found: list[tuple[Finding, Role]], blocks: Any) -> set[int]:
    if blocks is None:
        return set(range(len(found)))
    total = 1 + max((f.block for f, _ in found if f.block is not None), default=-1)
    if wrong := [b for b in blocks if not -total <= b < total]:
        raise ConfigError(f"blocks {wrong} do not exist; this model has {total}, numbered 0 to {total - 1}")
    wanted = {b % total for b in blocks}
    return {i for i, (finding, _) in enumerate(found) if finding.block in wanted}


def _inventory(found: list[tuple[Finding, Role]]) -> str:
    return ", ".join(f"{label} ({n})" for label, n in Counter(role.label for _, role in found).items())
