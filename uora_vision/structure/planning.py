"""What would be adapted, decided before anything is touched."""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import nn

from ..config import TOWER, BasePart, Init, Layout, UoraConfig, chosen
from ..errors import ConfigError, TargetError
from ..options import UNSET, hinting
from ..tables import render, shortened
from ..weights.quantised import is_quantised
from ..weights.role import ATTENTION, CONV, MLP, OTHER, Role
from .checks import check_model, check_weights
from .corrections import Difference, corrected, differences, followed, uses_of
from .example import check_devices
from .heads import matching
from .paths import lies_within
from .survey import Survey
from .targets import GROUPS, Projection, Skipped
from .towers import CONNECTOR, Tower, check_tower, counted, near_towers, tower_named, tower_table
from .trace import trace
from .walk import Finding

Found = list[tuple[Finding, Role]]


@dataclass(frozen=True, repr=False)
class Plan:
    """What `inject` would adapt, and what it would leave. `print(plan)` shows a table.

    Args:
        config: the options.
        projections: weights to adapt.
        skipped: weights that are left.
        differences: where a trace showed the weights to adapt otherwise than the rules have them; the plan follows the
            trace. None if there was no example input to trace.
        unfollowed: paths of the weights to adapt of which the trace shows no more than that they are used, if that:
            what the model does with their output was lost to it.
        trained: paths of the modules and parameters of the base that train wholly, besides norms and biases.
        new: paths of modules that look new and do not train wholly. `train` takes them.
        towers: what is adapted of each tower of a model that has several; empty for others.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> found = uora.plan(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4, targets="attention")
        >>> found.parameters, [p.path for p in found.projections]
        (80, ['self_attn.in_proj_weight', 'self_attn.out_proj'])
    """

    config: UoraConfig
    projections: tuple[Projection, ...]
    skipped: tuple[Skipped, ...]
    differences: tuple[Difference, ...] | None = None
    unfollowed: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    towers: tuple[Tower, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters that the adapters would train."""
        return sum(p.parameters(self.config.rank) for p in self.projections)

    @property
    def news(self) -> str:
        """What looks new and does not train wholly, and the option that trains it."""
        return say_new(self.new, tuple(self.config.train))

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "parameters": self.parameters,
            "projections": [{"path": p.path, **asdict(p)} for p in self.projections],
            "skipped": [asdict(s) for s in self.skipped],
            "differences": None if self.differences is None else [asdict(d) for d in self.differences],
            "unfollowed": list(self.unfollowed),
            "trained": list(self.trained),
            "new": list(self.new),
            "towers": [asdict(t) for t in self.towers],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __repr__(self) -> str:
        rank = self.config.rank
        rows: Counter[tuple[str, str, str, str]] = Counter()
        counts: Counter[tuple[str, str, str, str]] = Counter()
        for p in self.projections:
            for role in p.roles:
                reach = "read" if p.read else "called"
                key = (role.kind, f"{role.rows} x {p.shape[1]}", ", ".join(p.seen) or reach, p.rule)
                rows[key] += 1
                counts[key] += role.rows + rank
        table = [(label, n, shape, what, why, f"{counts[key]:,}" if counts[key] else "")
                 for key, n in rows.items() for label, shape, what, why in [key]]  # fmt: skip
        title = f"{len(self.projections)} weights to adapt at rank {rank}: {self.parameters:,} parameters"
        text = render(title, ("role", "count", "out x in", "reached", "rule or reason", "parameters"), table)
        if self.towers:
            text += f"\n{tower_table(self.towers)}"
        left = Counter(
            (re.sub(r"(?<![^.])\d+(?![^.])", "*", s.path), f"{s.shape[0]} x {s.shape[1]}", s.reason)
            for s in self.skipped
        )
        text += "\n" + render("Left as it is", ("path", "count", "out x in", "reason"),
                              [(path, n, shape, why) for (path, shape, why), n in left.items()])  # fmt: skip
        if self.trained:
            text += f"\nTrains wholly: {', '.join(self.trained)}."
        if self.new:
            text += f"\n{self.news}"
        if self.differences is None:
            return text
        total = len(self.projections)
        if not self.differences and not self.unfollowed:
            return f"{text}\nThe trace confirms it: it followed {total} of {total} weights."
        if self.unfollowed:
            text += (
                f"\nThe trace followed {total - len(self.unfollowed)} of {total} weights. What the model does with the "
                f"output of the others it does not show: {shortened(self.unfollowed)}."
            )
        if not self.differences:
            return text
        rows_ = [(d.path, d.kind, d.message) for d in self.differences]
        return text + render("What the trace shows otherwise", ("weight", "", "trace"), rows_)


@hinting
def plan(
    model: nn.Module,
    config: UoraConfig | None = None,
    *,
    example_input: Any = None,
    rank: int = UNSET,
    targets: str | Iterable[str] = UNSET,
    exclude: str | Iterable[str] = UNSET,
    blocks: Iterable[int] | None = UNSET,
    d_init: float = UNSET,
    seed: int = UNSET,
    layout: Layout = UNSET,
    init: Init = UNSET,
    dropout: float = UNSET,
    token_sampling: int = UNSET,
    train: str | Iterable[str] = UNSET,
) -> Plan:
    """What `inject` would do with the same arguments. Touches nothing.

    Args:
        example_input: if given, the model is run on it once, and what is seen corrects the rules: how each weight is
            reached, how the rows of a packed one are divided, and which of them attention uses as q, k and v.

    Raises:
        ConfigError, OptionError: an option is wrong.
        TargetError: nothing in the model matches a term.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> found = uora.plan(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4, targets="qv")
        >>> [(p.path, [role.label for role in p.roles]) for p in found.projections]
        [('self_attn.in_proj_weight', ['attn.q', 'attn.v'])]
    """
    options = chosen(
        config, rank=rank, targets=targets, exclude=exclude, blocks=blocks, d_init=d_init, seed=seed, layout=layout,
        init=init, dropout=dropout, token_sampling=token_sampling, train=train,
    )  # fmt: skip
    return planned(Survey(model), options, example_input, placed=False)


def planned(survey: Survey, config: UoraConfig, example_input: Any = None, placed: bool = True) -> Plan:
    """See `plan`, and `check_model` for `placed`."""
    check_model(survey, config.targets, placed)
    model, findings = survey.model, list(survey.shown.findings.values())
    seen = None
    if example_input is not None:
        check_devices((held.tensor for held in survey.parameters.values()), example_input)
        seen = trace(model, example_input)
        ruled, findings = findings, [corrected(finding, seen) for finding in findings]
    found = [(f, role) for f in findings for role in f.roles]
    if not found:
        raise TargetError(f"{type(model).__name__} has no Linear and no convolution outside its head: nothing to adapt")
    if config.targets == UoraConfig().targets and not any(role.group in (ATTENTION, MLP) for _, role in found):
        raise TargetError(
            f"{type(model).__name__} has no attention or MLP projection that the rules know, but {_inventory(found)}. "
            "targets='conv' adapts convolutions as flattened matrices, targets='other' other Linear layers; for a "
            "transformer of your own see uora_vision.register_rule."
        )
    trained, new = trained_parts(survey, tuple(config.train))
    asked = _match(found, config.targets, survey) - _match(found, config.exclude, survey, whole=True)
    asked &= _in_blocks(found, config.blocks)
    if not asked:
        raise TargetError(
            f"targets {'+'.join(config.targets)!r}, exclude {'+'.join(config.exclude)!r} and blocks {config.blocks} "
            f"together leave nothing; this model has: {_inventory(found)}"
        )
    projections, skipped, number = [], [], 0
    for finding in findings:
        candidate = finding.candidate
        mine = range(number, number := number + len(finding.roles))
        roles = tuple(role for i, role in zip(mine, finding.roles, strict=True) if i in asked)
        if finding.roles and lies_within(candidate.path, trained):
            skipped.append(Skipped(candidate.path, candidate.shape, "trains wholly"))
            continue
        if roles:
            projections.append(
                Projection(
                    candidate.module_path,
                    candidate.tensor,
                    candidate.form,
                    candidate.shape,
                    roles,
                    finding.rule,
                    finding.block,
                    candidate.read,
                    () if seen is None else uses_of(candidate, seen),
                )
            )
        else:
            outside = finding.roles and finding.roles[0].group in (CONV, OTHER)
            reason = f"{finding.rule}; targets={finding.roles[0].group!r} adapts it" if outside else finding.rule
            skipped.append(
                Skipped(candidate.path, candidate.shape, "not asked for" if finding.roles and not outside else reason)
            )
    check_weights(survey, projections)
    adapted = {p.path for p in projections}
    differing, lost = None, tuple[str, ...]()
    if seen is not None:
        ruled = [f for f in ruled if f.candidate.path in adapted]
        # Kernels take the codes of a quantised weight out of sight.
        hidden = {f.candidate.path for f in ruled if is_quantised(f.candidate.weight)}
        differing = tuple(d for d in differences(ruled, seen) if d.kind != "unused" or d.path not in hidden)
        lost = tuple(f.candidate.path for f in findings if f.candidate.path in adapted and not followed(f, seen))
    towers = counted(survey.towers, [(p.path, p.parameters(config.rank)) for p in projections])
    return Plan(config, tuple(projections), tuple(skipped), differing, lost, trained, new, towers)


def trained_parts(survey: Survey, train: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of what trains wholly, and of what looks new and does not.

    Raises:
        TargetError: a path or pattern fits nothing.
    """
    parts, terms = survey.parts, [term for term in train if term not in get_args(BasePart)]
    names = [*survey.modules, *survey.weights]
    found = matching(terms, names)
    for term, paths in found.items():
        if not paths:
            near = [n for n in names if n.endswith(f".{term}")] or difflib.get_close_matches(term, names, 3)
            hint = f"; there are {shortened(near)}" if near else ""
            raise TargetError(
                f"train={term!r} is neither {', '.join(get_args(BasePart))} nor the path of a module or parameter{hint}"
            )
    paths = [path for paths in found.values() for path in paths]
    paths = [path for path in paths if not any(path != other and lies_within(path, (other,)) for other in paths)]
    trained = (*(parts.heads if "head" in train else ()), *paths)
    return trained, tuple(path for path in parts.new if not lies_within(path, trained)) if train else ()


def say_new(new: Sequence[str], train: Sequence[str]) -> str:
    """That some parts look new and do not train wholly, and the option that trains them."""
    option = (*train, *new) if len(new) <= 4 else (*train, new[0], "...")
    return (
        f"{len(new)} {'part' if len(new) == 1 else 'parts'} of the model may be new, and would stay frozen or get "
        f"a low-rank update: {shortened(new)}. What was not pretrained trains wholly with train={tuple(option)!r}."
    )


def _match(found: Found, terms: Any, survey: Survey, whole: bool = False) -> set[int]:
    """Numbers of the roles that some terms ask for.

    Args:
        whole: whether a tower's name alone stands for all that is in it.
    """
    asked: set[int] = set()
    of: dict[str | None, set[int]] = {}
    for term in terms:
        tower, part = _split(term, found, survey)
        there = {i for i, (f, _) in enumerate(found) if not tower or survey.tower(f.candidate.path) == tower}
        hits = _hits(part, found, there, whole or tower == CONNECTOR)
        of[tower] = of.get(tower, set()) | hits
        asked |= hits
    for tower in (name for name, hits in of.items() if name and not hits and not whole):
        has = _inventory([f for f in found if survey.tower(f[0].candidate.path) == tower])
        raise TargetError(f"nothing in the tower {tower!r} is asked for; it has: {has}")
    return asked


def _split(term: str, found: Found, survey: Survey) -> tuple[str | None, str | None]:
    """The tower that a term names, None for the whole model, and what of it, None for its name alone."""
    if any(_is(term, *one) for one in found):
        return None, term
    if match := TOWER.match(term):
        return check_tower(match[1], survey.towers), match[2]
    tower = tower_named(term, survey.towers)
    if tower is None and near_towers(term, survey.towers, 0.75):
        check_tower(term, survey.towers)
    return tower, None if tower else term


def _hits(term: str | None, found: Found, there: set[int], whole: bool) -> set[int]:
    """Numbers of the roles among some that a term asks for."""
    if term is None:
        return {i for i in there if whole or found[i][1].group in (ATTENTION, MLP)}
    queries_values = {i for i in there if term == "qv" and found[i][1].kind in _QV}
    asked: set[int] = set()
    for part in ("q", "v") if term == "qv" and not queries_values else (term,):
        hits = queries_values or {i for i in there if _is(part, *found[i])}
        if not hits and part not in GROUPS:
            has = [found[i] for i in sorted(there)]
            where = "this model" if len(there) == len(found) else "that tower"
            raise TargetError(f"no projection matched {part!r}; {where} has: {_inventory(has)}. {_hint(part, has)}")
        asked |= hits
    return asked


_QV = {f"{ATTENTION}.{name}" for name in ("q", "v", "q_b", "kv_b", "qk", "kv", "qkv", "qkvz")}
"""Roles of queries and values, and weights with such that are not known to be divided."""


def _hint(term: str, found: Found) -> str:
    """What to write in place of a term that matches nothing: it may be of another library's kind."""
    pattern = f"*.{term}"
    paths = [
        path for finding, role in found for path in (finding.candidate.path, f"{finding.candidate.path}.{role.name}")
    ]
    by_path = f", or the pattern {pattern!r}" if fnmatch.filter(paths, pattern) else ", a role or a pattern over paths"
    return f"Name a group or shorthand, as 'qv', 'attention' or 'attention+mlp'{by_path}"


def _is(term: str, finding: Finding, role: Role) -> bool:
    if GROUPS.get(term) == role.group or (term == "all" and role.group in (ATTENTION, MLP)):
        return True
    path = finding.candidate.path
    if role.group in (CONV, OTHER) and term == role.name:
        return False  # names of roles are for what the rules know
    return term in (role.name, role.label, role.kind, role.kind.partition(".")[2], path) or any(
        fnmatch.fnmatchcase(p, term) for p in (path, f"{path}.{role.name}")
    )


def _in_blocks(found: Found, blocks: Any) -> set[int]:
    if blocks is None:
        return set(range(len(found)))
    total = 1 + max((f.block for f, _ in found if f.block is not None), default=-1)
    if wrong := [b for b in blocks if not -total <= b < total]:
        raise ConfigError(f"blocks {wrong} do not exist; this model has {total}, numbered 0 to {total - 1}")
    wanted = {b % total for b in blocks}
    return {i for i, (finding, _) in enumerate(found) if finding.block in wanted}


def _inventory(found: Found) -> str:
    known = Counter(role.label for _, role in found if role.group not in (CONV, OTHER))
    known.update(role.group for _, role in found if role.group in (CONV, OTHER))
    return ", ".join(f"{label} ({n})" for label, n in known.items())
