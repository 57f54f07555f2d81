"""What a saved adapter is, as text and as a picture, without its model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, printable
from ..storage.stored import Stored
from ..tables import render, shortened

BARS = 96
"""With more roles than this, bars are drawn for blocks."""

_EIGHTHS = " ▏▎▍▌▋▊▉█"

_LEVELS = "▁▂▃▄▅▆▇█"


def facts(stored: Stored, size: int) -> dict[str, Any]:
    """The numbers of an adapter, for JSON.

    Args:
        size: of its folder in bytes.
    """
    config, identity = stored.config, stored.identity
    return {
        "base": {"name": identity.shown, "class": identity.class_name, "fingerprint": identity.fingerprint},
        "config": config.to_dict(),
        "weights": len(stored.projections),
        "roles": sum(len(p.roles) for p in stored.projections),
        "parameters": len(stored.vector),
        "base_parameters": {name: t.numel() for name, t in sorted(stored.parts.items())},  # files keep no order
        "bytes": size,
        **stored.about,
        "versions": stored.versions,
        "firings": firings(stored),
        "layers": [{"role": name, "b": b.abs().mean().item(), "d": d.abs().mean().item()}
                   for name, _, b, d in role_vectors(stored)],
    }  # fmt: skip


def firings(stored: Stored) -> dict[str, Any]:
    """What redraws did: how many directions, at how many steps, in which matrices."""
    by_matrix: Counter[str] = Counter()
    for event in stored.log:
        by_matrix[event.matrix] += len(event.indices)
    steps = sorted({event.step for event in stored.log})
    span = [steps[0], steps[-1]] if steps else []
    return {"directions": sum(by_matrix.values()), "steps": len(steps), "first_and_last": span, "matrices": by_matrix}


def role_vectors(stored: Stored) -> list[tuple[str, int | None, Tensor, Tensor]]:
    """Every role: its name, its block, its b (rows,) and its d (rank,)."""
    out = []
    for p, (b, d) in zip(stored.projections, stored.vectors, strict=True):
        parts = b.split([role.rows for role in p.roles])
        out += [(f"{p.path}.{role.name}", p.block, *pair) for role, *pair in zip(p.roles, parts, d, strict=True)]
    return out


def describe(stored: Stored, size: int) -> str:
    """An adapter as text: what it is, what it adapts, its redraws, and |b| and |d| by layer."""
    c, i, found = stored.config, stored.identity, facts(stored, size)
    head = sum(found["base_parameters"].values())
    lines = [
        f"base       {i.shown} ({i.class_name}), fingerprint {i.fingerprint or 'unknown'}",
        f"adapter    rank {c.rank}, seed {c.seed}, layout {c.layout}, init {c.init}, {'+'.join(c.targets)[:80]}",
        f"parameters {found['parameters']:,} in b and d; {head:,} in {len(stored.parts)} trained tensors of the base",
        f"size       {size:,} B",
        *_task(stored),
        f"written by {', '.join(f'{name} {version}' for name, version in stored.versions.items())}",
    ]
    rows: dict[tuple[str, str], list[int]] = {}
    for p in stored.projections:
        for role in p.roles:
            row = rows.setdefault((role.kind, f"{role.rows} x {p.width}"), [0, 0])
            row[0] += 1
            row[1] += role.rows + c.rank
    table = render(
        f"{found['weights']} weights, {found['roles']} roles",
        ("role", "count", "out x in", "parameters"),
        [(kind, n, shape, count) for (kind, shape), (n, count) in rows.items()],
    )
    return "\n".join([*lines, "", table, "", _redraws(stored), "", _bars(stored)])


def _task(stored: Stored) -> list[str]:
    about, labels = stored.about.get("preprocessing", {}), stored.about.get("labels", [])
    task = [f"task       {about['task']}"] if "task" in about else []
    return task + ([f"classes    {len(labels):,}: {shortened(labels)[:200]}"] if labels else [])


def _redraws(stored: Stored) -> str:
    found = firings(stored)
    if not found["directions"]:
        return "no direction was redrawn"
    first, last = found["first_and_last"]
    counts = [0] * min(60, last - first + 1)
    for event in stored.log:
        counts[(event.step - first) * len(counts) // (last - first + 1)] += len(event.indices)
    line = "".join(_LEVELS[-(-7 * n // max(counts))] for n in counts)
    shown = [f"  {name}: {n:,}" for name, n in found["matrices"].most_common(8)]
    more = len(found["matrices"]) - len(shown)
    text = f"{found['directions']:,} rows of A and B redrawn, in {found['steps']:,} steps from {first:,} to {last:,}"
    return "\n".join([text, f"  {line}", *shown, *([f"  and {more} more matrices"] if more else [])])


def _bars(stored: Stored) -> str:
    """Mean |b| and |d| of each role, or of each block if there are many."""
    roles = role_vectors(stored)
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, block, b, d in roles:
        key = name if len(roles) <= BARS else "outside of blocks" if block is None else f"block {block}"
        groups.setdefault(key, []).append((b, d))
    means = {name: tuple(torch.cat([pair[k] for pair in pairs]).abs().mean().item() for k in (0, 1))
             for name, pairs in groups.items()}  # fmt: skip
    high = [max((m[k] for m in means.values()), default=0.0) or 1.0 for k in (0, 1)]
    wide = max(map(len, means))
    lines = [f"{'mean of'.ljust(wide)}  {'|b|'.ljust(31)}|d|"]
    for name, pair in means.items():
        bars = [f"{_bar(value / high[k]).ljust(20)} {value:<9.3g}" for k, value in enumerate(pair)]
        lines.append(f"{name.ljust(wide)}  {' '.join(bars)}".rstrip())
    return "\n".join(lines)


def _bar(share: float, width: int = 20) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def plot(stored: Stored, path: Path) -> None:
    """Mean |b| and |d| by block, a line for each role, and redraws by step, as a picture.

    Raises:
        ImportError: matplotlib is not there.
        ConfigError: there are no pictures of this ending.
    """
    from matplotlib.figure import Figure

    labels = {f"{p.path}.{r.name}": r.kind for p in stored.projections for r in p.roles}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for k, what in enumerate(("b", "d")):
        lines: dict[str, list[tuple[int, float]]] = {}
        for name, block, b, d in role_vectors(stored):
            points = lines.setdefault(labels[name], [])
            points.append((len(points) if block is None else block, (b, d)[k].abs().mean().item()))
        for label, points in lines.items():
            axes[k].plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
        axes[k].set(title=f"mean |{what}|", xlabel="block", ylim=(0, 1.05 * axes[k].get_ylim()[1]))
        axes[k].xaxis.get_major_locator().set_params(integer=True)
    axes[0].legend(fontsize=7)
    steps: Counter[int] = Counter()
    for event in stored.log:
        steps[event.step] += len(event.indices)
    axes[2].bar(list(steps), list(steps.values()), width=max(1.0, max(steps, default=1) / 100))
    axes[2].set(title=f"{sum(steps.values()):,} rows of A and B redrawn", xlabel="step")
    title = printable(f"{stored.identity.shown}, rank {stored.config.rank}", 120)
    figure.suptitle(title, fontsize=10, parse_math=False)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:  # of an ending that it has no format for
        raise ConfigError(f"no picture can be written to {path}: {error}") from error
