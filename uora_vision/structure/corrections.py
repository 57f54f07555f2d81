"""What a trace says about the rules: where it corrects them, and where plan and trace differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ..weights.matrix import Span
from ..weights.role import ATTENTION, CONV, OTHER, Role
from .candidates import Candidate
from .paths import joined
from .rules import COORDINATES
from .trace import ROLES, Trace
from .walk import Finding

TRACED = "seen in the trace"


@dataclass(frozen=True)
class Difference:
    """Something that a trace shows otherwise than a plan has it.

    Args:
        path: of the weight.
        kind: `unused`: the example does not reach it; `reach`: it is read where the rules have it called; `rows`: the
            rules divide its rows otherwise than the model does; `names`: attention takes as q, k or v what the rules,
            following the model's own names, call otherwise (DaViT's attention over channels), or know nothing of.
        message: what the trace shows.
    """

    path: str
    kind: Literal["unused", "reach", "rows", "names"]
    message: str


def corrected(finding: Finding, trace: Trace) -> Finding:
    """A finding as the trace shows it: tensors that are read are so marked, and rows divided as the model divides them.

    Where the rules were wrong or knew nothing, what attention took as q, k and v is called so.
    """
    candidate, name = finding.candidate, parameter_name(finding.candidate)
    if not candidate.read and _is_read(candidate, trace):
        finding = replace(finding, candidate=replace(candidate, read=True))
    flows = trace.flows.get(name, {})
    unknown = bool(finding.roles) and finding.roles[0].group in (CONV, OTHER)
    if candidate.groups > 1 or candidate.form.startswith("stack") or _apart(candidate) or not finding.roles:
        return finding
    rows = candidate.shape[0]
    packed = len(finding.roles) == 1 and len(flows) > 1
    if not _rows_message(finding.roles, trace.rows.get(name), rows) and not packed and not (unknown and flows):
        return finding
    if unknown and candidate.shape[1] <= COORDINATES:
        return finding
    seen = sorted(flows.items(), key=lambda item: item[1])
    spans = [(role, span_of(span_rows)) for role, span_rows in seen]
    group = ATTENTION if unknown else finding.roles[0].group
    apart = sum(len(span_rows) for _, span_rows in seen) == len({row for _, span_rows in seen for row in span_rows})
    if seen and apart and all(span is not None for _, span in spans):
        roles = tuple(Role(role, group, *span) for role, span in spans if span is not None)
        return replace(finding, roles=roles, rule=TRACED)
    if unknown:
        return finding
    return replace(finding, roles=(Role(finding.roles[0].name, group, 0, rows),), rule=TRACED)


def differences(ruled: Iterable[Finding], trace: Trace) -> tuple[Difference, ...]:
    """Where a trace shows weights otherwise than the rules have them, and all that `corrected` makes of it."""
    out: list[Difference] = []
    for finding in ruled:
        candidate, roles = finding.candidate, finding.roles
        name = parameter_name(candidate)
        if name in trace.unused or name not in trace.uses:
            out.append(Difference(candidate.path, "unused", "nothing consumes it on this input"))
            continue
        if not candidate.read and (reader := _is_read(candidate, trace)):
            out.append(Difference(candidate.path, "reach", f"read at {reader}"))
        within = roles
        if candidate.form.startswith("stack"):
            per = candidate.shape[0] // candidate.weight.shape[0]
            within = tuple(role for role in roles if role.span.end <= per)
        if candidate.groups == 1 and not _apart(candidate):
            flows = trace.flows.get(name, {})
            if message := _rows_message(within, trace.rows.get(name), candidate.shape[0]):
                out.append(Difference(candidate.path, "rows", message))
            elif message := _names_message(within, flows):
                out.append(Difference(candidate.path, "names", message))
            elif (changed := corrected(finding, trace).roles) != roles:
                kind: Literal["rows", "names"] = "rows" if len(changed) > 1 else "names"
                out.append(Difference(candidate.path, kind, f"it is {_listed(changed)}, and called {_listed(roles)}"))
    return tuple(out)


def followed(finding: Finding, trace: Trace) -> bool:
    """Whether a trace saw all that a plan says of a weight: that it is used and, of one that is divided or a query, key
    or value, where its rows go."""
    name, roles = parameter_name(finding.candidate), finding.roles
    if name not in trace.uses:
        return False
    return (
        name in trace.rows or name in trace.flows or not (len(roles) > 1 or any(set(r.name) <= {*ROLES} for r in roles))
    )


def uses_of(candidate: Candidate, trace: Trace) -> tuple[str, ...]:
    """What consumes a weight, such as `linear at eva.py:262`."""
    uses = trace.uses.get(parameter_name(candidate), ())
    return tuple(dict.fromkeys(use.op if use.called else f"{use.op} at {use.where}" for use in uses))


def parameter_name(candidate: Candidate) -> str:
    """Name of a candidate's tensor among the model's parameters."""
    return joined(candidate.module_path, candidate.tensor)


def span_of(rows: tuple[int, ...]) -> Span | None:
    """Ascending rows as a span; None if they are not runs of one length at one distance."""
    breaks = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
    if not breaks:
        return Span(rows[0], len(rows))
    block, stride = breaks[0], rows[breaks[0]] - rows[0]
    if len(rows) % block:
        return None
    span = Span(rows[0], len(rows), block, stride)
    return span if tuple(span.indices()) == rows else None


def _apart(candidate: Candidate) -> bool:
    """Whether the outputs, or inputs, of a weight are several of its dimensions: a trace follows each by itself."""
    return candidate.weight.dim() > 2 and candidate.form in ("transposed", "kernel") and candidate.tensor != "weight"


def _is_read(candidate: Candidate, trace: Trace) -> str:
    """Where a tensor is read past its module, "" if nowhere."""
    uses = trace.uses.get(parameter_name(candidate), ())
    return next((use.where for use in uses if not use.called and not use.op.endswith(":input")), "")


def _rows_message(roles: tuple[Role, ...], groups: tuple[tuple[int, ...], ...] | None, rows: int) -> str:
    """Which rows that go one way are of two roles; "" if none. Rows of one role may well go several ways."""
    owner = {row: role.name for role in roles for row in role.span.indices()}
    for group in groups or ():
        names = {owner[row] for row in group if row in owner}
        if len(names) > 1:
            return f"rows {_short(group)} of {rows} go one way, but are of {' and '.join(sorted(names))}"
    return ""


def _names_message(roles: tuple[Role, ...], flows: dict[str, tuple[int, ...]]) -> str:
    for role in roles:
        mine = set(role.span.indices())
        for name, rows in flows.items():
            if role.name != name and role.name in ("q", "k", "v") and mine <= set(rows):
                return f"rows {_short(rows)} are taken as {name}, and called {role.name}"
    return ""


def _listed(roles: tuple[Role, ...]) -> str:
    return " and ".join(f"{role.name} ({role.rows} rows)" for role in roles)


def _short(rows: tuple[int, ...]) -> str:
    span = span_of(rows)
    if span is None or (span.block and span.block < len(rows)):
        return f"{rows[0]}, {rows[1]}, ... {rows[-1]}" if len(rows) > 2 else str(list(rows))
    return f"{rows[0]}-{rows[-1]}"
