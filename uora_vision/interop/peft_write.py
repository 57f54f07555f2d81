"""Writing adapters in PEFT's formats: LoRA (exact, or of a smaller rank) and VeRA (exact)."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..lifecycle.library import bank_of
from ..weights.matrix import Span, place
from .low_rank import factors, truncated
from .peft_folder import (
    PREFIX,
    AdaptedWeight,
    adapted_weights,
    check_expressible,
    in_attention,
    target_modules,
    write,
    written_parts,
)


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Args:
        folder: where to.
        kind: `LoRA` or `VeRA`.
        ranks: by path of the weight.
        errors: relative Frobenius distance of each weight's dW from the adapter's, by path: 0 where only rounding to
            the type of the file is lost.
        parameters: of the adapter, as PEFT counts them: without A and B of VeRA, and without the head.
        size: of the folder in bytes.

    Example:
        >>> import tempfile, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), rank=4)
        >>> for adapter in uora.adapters(model).values():  # as after training
        ...     _ = adapter.b.data.normal_()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = uora.export.to_peft_lora(model, folder)
        >>> report.kind, report.parameters, report.worst
        ('LoRA', 384, 0.0)
    """

    folder: Path
    kind: str
    ranks: dict[str, int]
    errors: dict[str, float]
    parameters: int
    size: int

    @property
    def worst(self) -> float:
        return max(self.errors.values())

    @property
    def mean(self) -> float:
        return sum(self.errors.values()) / len(self.errors)

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        rank = f"rank {high}" if low == high else f"ranks {low} to {high}"
        text = (
            f"PEFT {self.kind} of {len(self.ranks)} weights at {rank}: {self.parameters:,} parameters, {self.size:,} B"
        )
        if self.kind == "VeRA":
            text += "; needs PEFT 0.21 or newer"
        if not self.worst:
            return f"{text}; exact"
        at = max(self.errors, key=lambda path: self.errors[path])
        return f"{text}; relative error of dW {self.mean:.2g} on average, {self.worst:.2g} at worst ({at})"


def to_peft_lora(model: nn.Module, folder: str | os.PathLike[str], rank: int | None = None) -> ExportReport:
    """Write the active adapter as a LoRA adapter that `peft.PeftModel.from_pretrained(base, folder)` loads.

    dW = (b B d) A is a LoRA of the adapter's own rank, also where one weight holds q, k and v. What else was trained
    (the head, norms) goes along.

    Args:
        rank: of the closest LoRA to write, by SVD; None for the exact one.

    Raises:
        StateError: the model is not injected.
        ConfigError, OptionError: the rank is not a whole number of at least 1, or this can be no folder.
        ExportError: PEFT cannot express the adapter; see `docs/export.md`.
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), rank=4)
        >>> for adapter in uora.adapters(model).values():  # as after training
        ...     _ = adapter.b.data.normal_()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = uora.export.to_peft_lora(model, folder, rank=2)
        >>> report.ranks
        {'0': 2, '2': 2}
    """
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"rank must be a whole number of at least 1, or None for all of it; got {rank!r}")
    weights = adapted_weights(model)
    check_expressible(model, weights, "LoRA")
    found: dict[str, tuple[Tensor, Tensor]] = {}
    errors: dict[str, float] = {}
    for w in weights:
        left, right = factors(w.adapter, w.projection.shape[0])
        if rank is not None:
            left, right, errors[w.path] = truncated(left, right, rank)
        found[w.path] = left.to(w.dtype), right.to(w.dtype)
    targets = _lora_targets(weights, found)
    ranks = {target: max(right.shape[0] for _, right in parts.values()) for target, parts in targets.items()}
    config, tensors = written_parts(model, targets)
    for target, parts in targets.items():
        for name, (left, right) in parts.items():
            size = ranks[target]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = _padded(right, size, 0)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = _padded(left, size, 1)
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(target)}": size for target, size in ranks.items() if size != common}
    config |= {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": target_modules(model, list(targets)),
        "fan_in_fan_out": any(w.projection.form == "transposed" for w in weights),
    }
    size = write(model, folder, config, tensors)
    return ExportReport(
        Path(folder),
        "LoRA",
        {path: right.shape[0] for path, (_, right) in found.items()},
        {w.path: errors.get(w.path, 0.0) for w in weights},
        sum(t.numel() for name, t in tensors.items() if ".lora_" in name),
        size,
    )


def to_peft_vera(model: nn.Module, folder: str | os.PathLike[str]) -> ExportReport:
    """Write the active adapter, exactly, as a VeRA adapter that `peft.PeftModel.from_pretrained(base, folder)` loads.

    It takes PEFT 0.21 or newer: older ones pass by the A and B of a file without a word, and compute with their own.

    PEFT's VeRA has one A and one B for all layers and one d per layer. An adapter with `layout="slice"`, one role in
    every weight and no rows of a layer's own is that. Of any other, the directions of every pair of matrices and place
    of a role follow one another in A and B, and the d of a layer is 0 at those which are not its own: the same
    function, with a larger rank there.

    Raises:
        StateError: the model is not injected.
        ExportError: PEFT cannot express the adapter; see `docs/export.md`.
        ConfigError, OptionError: this can be no folder.
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), rank=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = uora.export.to_peft_vera(model, folder)
        >>> report.ranks, report.worst
        ({'0': 8, '2': 8}, 0.0)
    """
    weights = adapted_weights(model)
    check_expressible(model, weights, "VeRA")
    config, tensors = written_parts(model, [w.path for w in weights])
    a, b, vectors = _vera_directions(weights)
    for w, d in zip(weights, vectors, strict=True):
        out = w.projection.shape[0]
        whole = place(w.adapter.b.detach()[:, None], w.adapter.spans, out)[:, 0]
        tensors[f"{PREFIX}{w.path}.vera_lambda_b"] = whole.to(w.dtype)
        tensors[f"{PREFIX}{w.path}.vera_lambda_d"] = d.to(w.dtype)
    tensors |= {"base_model.vera_A": a.to(weights[0].dtype), "base_model.vera_B": b.to(weights[0].dtype)}
    options = bank_of(model).config
    config |= {
        "peft_type": "VERA",
        "r": len(a),
        "target_modules": target_modules(model, [w.path for w in weights]),
        "projection_prng_key": options.seed,
        "save_projection": True,
        "vera_dropout": options.dropout,
        "d_initial": options.d_init,
        "fan_in_fan_out": any(w.projection.form == "transposed" for w in weights),
    }
    size = write(model, folder, config, tensors)
    ranks = {w.path: len(a) for w in weights}
    count = sum(t.numel() for name, t in tensors.items() if ".vera_lambda_" in name)
    return ExportReport(Path(folder), "VeRA", ranks, dict.fromkeys(ranks, 0.0), count, size)


def _lora_targets(
    weights: list[AdaptedWeight], found: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """The layers that PEFT replaces, and in each, by the name in PEFT's file, B (out, n) and A (n, in)."""
    targets: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for w in weights:
        left, right = found[w.path]
        if in_attention(w):
            # PEFT replaces the attention as a whole; its LoRA of the other projection is 0.
            path, width = w.projection.module_path, w.adapter.width
            nothing = left.new_zeros(width, 1), right.new_zeros(1, width)
            targets[path] = {path: (left, right), f"{path}.base_layer.out_proj": nothing}
            continue
        if w.projection.form == "kernel":
            kernel: Any = w.module._parameters["weight"]
            left = left.reshape(*left.shape, *[1] * (kernel.dim() - 2))
            right = right.reshape(len(right), *kernel.shape[1:])
        targets[w.path] = {w.path: (left, right)}
    return targets


def _vera_directions(weights: list[AdaptedWeight]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One A (n, in) and one B (out, n) for all weights, and d (n,) of each, float32."""
    bank = weights[0].adapter.bank
    n = 0
    wide, tall = max(w.adapter.width for w in weights), max(w.projection.shape[0] for w in weights)
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    places: dict[tuple[str, str, Span], int] = {}
    parts: list[list[tuple[int, Tensor]]] = []

    def add(a: Tensor, b: Tensor, span: Span) -> int:
        """Put directions a (k, in) and b (rows, k) behind those that are there."""
        nonlocal n
        rows.append(nn.functional.pad(a.float(), (0, wide - a.shape[1])))
        columns.append(place(b.float(), (span,), tall))
        n += len(a)
        return n - len(a)

    for w in weights:
        mine: list[tuple[int, Tensor]] = []
        a, bm = w.adapter.matrices()
        width, out = w.adapter.width, w.projection.shape[0]
        for k, role in enumerate(w.adapter.roles):
            name_a, name_b = (own.shared for own in w.adapter.own(k))
            shared_a, shared_b = bank.get_buffer(name_a), bank.get_buffer(name_b).t()
            # What lies beyond the last row of a weight is never used, so whole weights of all heights share B.
            whole = role.span.indices() == list(range(out)) if role.rows == out else False
            span = Span(0, min(tall, len(shared_b))) if whole else role.span
            key = name_a, name_b, span
            if key not in places:
                places[key] = add(shared_a, shared_b[: span.rows], span)
            d = w.adapter.d[k].detach().float()
            own = (a[k % len(a)] != shared_a[:, :width].to(a[0])).any(dim=1)
            mine.append((places[key], torch.where(own, 0.0, d)))
            if own.any():
                at = add(a[k % len(a)][own], bm[k % len(bm)][:, own], role.span)
                mine.append((at, d[own]))
        parts.append(mine)
    vectors = []
    for mine in parts:
        d = torch.zeros(n, device="cpu", dtype=torch.float32)
        for at, values in mine:
            d[at : at + len(values)] = values.cpu()
        vectors.append(d)
    return torch.cat(rows), torch.cat(columns, dim=1), vectors


def _padded(factor: Tensor, size: int, dim: int) -> Tensor:
    """A factor with zeros up to a rank."""
    shape = list(factor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim) if shape[dim] else factor
