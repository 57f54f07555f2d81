"""What is proven of one model: structure on the meta device, effect on small real inputs."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import uora_vision as uora
from uora_vision.lifecycle.surgery import adapters_of
from uora_vision.structure.example import float_tensors

from .zoo import Entry, call

RANK = 4
MERGED, HALF = 1e-3, 0.1
"""Largest difference of merged from unmerged outputs, relative to their norm: in float32, under bfloat16 autocast."""
SILENT = 1e-3
"""Smallest relative change of the outputs when every b is set to random values."""


def prove(
    entry: Entry, known: MutableMapping[str, dict[str, Any]] | None = None, structure_only: bool = False
) -> dict[str, Any]:
    """One row of the table: what was found, how long it took, and `failures`, empty if all is proven.

    Args:
        known: what was measured of the real models so far, by their description. Many names are one model with other
            weights, or one that differs only in the size of the image.
        structure_only: whether to leave out what needs real weights.
    """
    known = {} if known is None else known
    row: dict[str, Any] = {"library": entry.library, "name": entry.name, "family": entry.family}
    row |= {key: value for key in ("reduced", "note") if (value := getattr(entry, key))}
    failures: list[str] = []
    try:
        targets = _structure(entry.meta(), row, failures)
        if structure_only:
            return {**row, "failures": failures}
        started = time.perf_counter()
        model, example = entry.real()
        row["real_parameters"] = sum(p.numel() for p in model.parameters())
        row["build_s"] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()
        description = _describe(model, example)
        if description in known:
            row |= {"same_as": known[description]["name"], **known[description]["measured"]}
        else:
            measured: dict[str, Any] = {}
            _effect(model, example, targets, measured, failures)
            row |= measured
            if not failures:
                known[description] = {"name": entry.name, "measured": measured}
        row["effect_s"] = round(time.perf_counter() - started, 2)
    except Exception as error:  # a model that breaks is a row of the table, not the end of it
        failures.append(f"{type(error).__name__}: {str(error)[:300]}")
    return {**row, "failures": failures}


def _structure(model: nn.Module, row: dict[str, Any], failures: list[str]) -> str:
    """Plan and inject at full size. Returns the targets: the default, or `conv` if the rules know no projection."""
    targets = uora.UoraConfig().targets
    row["base_parameters"] = sum(p.numel() for p in model.parameters())
    started = time.perf_counter()
    try:
        plan = uora.plan(model, rank=RANK, train=())
        row["projections"] = True
    except uora.TargetError as error:
        if "targets='conv'" not in str(error):
            failures.append(f"unhelpful error: {error}")
        targets, row["projections"] = ("conv",), False
        plan = uora.plan(model, rank=RANK, targets=targets, train=())
    identities = {name: id(p) for name, p in model.named_parameters()}
    uora.inject(model, rank=RANK, targets=targets, train=())
    row["inject_s"] = round(time.perf_counter() - started, 3)
    row["weights"], row["read"] = len(plan.projections), sum(p.read for p in plan.projections)
    labels = Counter(role.kind for p in plan.projections for role in p.roles)
    row["roles"] = dict(sorted(labels.items())) if row["projections"] else {}
    now = {name: id(p) for name, p in model.named_parameters()}
    if any(now.get(name) != identity for name, identity in identities.items()):
        failures.append("a parameter of the base was copied or renamed")
    # From the shapes alone: a number for every output row of a weight, and a rank for every projection in it.
    formula = 0
    for module in model.modules():
        for tensor, adapter in adapters_of(module).items():
            shape = module._parameters[tensor].shape  # type: ignore[union-attr]
            formula += shape.numel() // adapter.width + RANK * len(adapter.roles)
    row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if row["parameters"] != formula:
        failures.append(f"trains {row['parameters']} parameters, {formula} by the shapes")
    return "+".join(targets)


def _effect(model: nn.Module, example: Any, targets: str, row: dict[str, Any], failures: list[str]) -> None:
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    # torch sums a product in another order where a factor may need a gradient: the base is the frozen one.
    model.requires_grad_(False)
    base = _run(model, example)
    plan = uora.plan(model, rank=RANK, targets=targets, train=(), example_input=example)
    failures += [f"{d.path}: {d.message}" for d in plan.differences or () if d.kind != "names"]
    row["names"] = sorted({d.message for d in plan.differences or () if d.kind == "names"})
    uora.inject(model, rank=RANK, targets=targets, train=())

    zero = _run(model, example)
    row["b_zero"] = _distance(zero, base)
    row["b_zero_exact"] = all(torch.equal(a, b) for a, b in zip(zero, base, strict=True))
    if not row["b_zero"] <= 1e-6:
        failures.append(f"with b = 0 the output differs by {row['b_zero']:.2g} of its norm")

    adapters = list(uora.adapters(model).values())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for a in adapters:  # of a size at which dW is about a fifth of W
            sizes = torch.cat([torch.full((r.rows,), float(r.rows) ** 0.5) for r in a.roles])
            a.b.copy_(torch.randn(a.b.shape, generator=generator) * sizes)
    awake = _gradients(model, example, adapters, row, failures)
    row["change"] = _distance(awake, base)
    if not row["change"] >= SILENT:
        failures.append(f"random b change the output by {row['change']:.2g} of its norm only")

    modes = ("eval", "train") if targets == "conv" else ("eval", "train", "autocast")
    outputs = _modes(model, example, modes)
    row["no_grad"] = _distance(outputs["eval"], awake)
    if not row["no_grad"] <= 1e-5:
        failures.append(f"without gradients the output differs by {row['no_grad']:.2g} of its norm")
    uora.merge(model)
    if list(model.state_dict()) != keys or [type(m) for m in model.modules()] != classes:
        failures.append("merging does not give back the keys and classes of the base")
    for mode, merged in _modes(model, example, modes).items():
        row[f"merged_{mode}"] = _distance(merged, outputs[mode])
        if not row[f"merged_{mode}"] <= (HALF if mode == "autocast" else MERGED):
            failures.append(f"merged differs from unmerged by {row[f'merged_{mode}']:.2g} in {mode}")


def _gradients(
    model: nn.Module, example: Any, adapters: list[Any], row: dict[str, Any], failures: list[str]
) -> list[Tensor]:
    """The output with gradients on, after checking that those of every role's b and d are finite and not 0."""
    vectors = [p for a in adapters for p in (a.b, a.d)]
    outputs = list(float_tensors(call(model, example)))
    generator = torch.Generator().manual_seed(2)
    loss = sum((y.float() * torch.randn(y.shape, generator=generator)).sum() for y in outputs if y.requires_grad)
    grads = torch.autograd.grad(loss, vectors, allow_unused=True)  # type: ignore[arg-type]
    dead = []
    for a, gb, gd in zip(adapters, grads[::2], grads[1::2], strict=True):
        parts = [None] * len(a.roles) if gb is None else gb.split([r.rows for r in a.roles])
        for k, (role, part) in enumerate(zip(a.roles, parts, strict=True)):
            alive = part is not None and gd is not None and part.any() and gd[k].any()
            if not (alive and part.isfinite().all() and gd[k].isfinite().all()):  # type: ignore[union-attr]
                dead.append(f"{a.name}.{role.name}")
    row["alive"] = sum(len(a.roles) for a in adapters) - len(dead)
    row["dead"] = len(dead)
    if dead:
        failures.append(f"{len(dead)} dead: {', '.join(dead[:5])}")
    return [y.detach() for y in outputs]


def _modes(model: nn.Module, example: Any, modes: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """Outputs in eval, under bfloat16 autocast and in training mode; batch statistics are as before afterwards."""
    out = {}
    for mode in modes:
        with _buffers_kept(model), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            torch.manual_seed(0)
            # Half types are slow on most processors: one image has to do.
            one = mode == "autocast" and isinstance(example, Tensor)
            out[mode] = _run(model.train(mode == "train"), example[:1] if one else example)
            model.eval()
    return out


@torch.no_grad()
def _run(model: nn.Module, example: Any) -> list[Tensor]:
    return [y.float() for y in float_tensors(call(model, example))]


def _describe(model: nn.Module, example: Any) -> str:
    """A digest of all that a model computes with but for the values of its weights: its modules with their plain
    attributes, the shapes of its tensors and of its input."""
    plain = (bool, int, float, str, tuple)
    parts = [repr(model), *(f"{n} {t.shape} {t.dtype}" for n, t in (*model.named_parameters(), *model.named_buffers()))]
    for name, module in model.named_modules():
        attributes = sorted((key, str(value)) for key, value in vars(module).items() if type(value) in plain)
        parts.append(f"{name} {type(module)} {attributes}")
    parts += [str(getattr(leaf, "shape", leaf)) for leaf in tree_leaves(example)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    kept = {name: b.clone() for name, b in model.named_buffers()}
    yield
    for name, b in model.named_buffers():
        b.copy_(kept[name])


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Norm of the difference over the norm of b, the largest of all outputs."""
    if len(a) != len(b) or not a:
        return float("inf")
    return max(((x - y).norm() / y.norm().clamp(min=1e-12)).item() for x, y in zip(a, b, strict=True))
