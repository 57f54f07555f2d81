"""Proof that every adapter trains: none is silently out of the model's path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeadAdapterError
from ..structure.example import call, evaluating, float_tensors
from ..structure.survey import Survey
from .library import adapters_in


def verify(model: nn.Module, example_input: Any) -> dict[str, float]:
    """One forward and backward with b (and trained parts that are all zero, as fresh heads are) set to small random
    values, and a look at every gradient.

    Parameters, buffers, gradients, training flags and random state are as before afterwards.

    Args:
        model: an injected model.
        example_input: its input: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        The norm of the gradient of every role's b, by name (`blocks.0.attn.qkv.q`).

    Raises:
        DeadAdapterError: names the adapters whose b or d gets no gradient, or one that is not finite.
    """
    survey = Survey(model)
    adapters = list(adapters_in(survey).values())
    vectors = [p for adapter in adapters for p in (adapter.b, adapter.d)]
    device = vectors[0].device
    wanted = [p.requires_grad for p in vectors]
    # A fresh head is often all zeros and hides every adapter from the loss until its first step.
    mine = {id(p) for p in vectors}
    trained = [held.tensor for held in survey.parameters.values()]
    zero = [t for t in trained if t.requires_grad and id(t) not in mine and not t.any()]
    changed: list[Tensor] = [*(adapter.b for adapter in adapters), *zero]
    saved = [t.detach().clone() for t in changed]
    generator, noise = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)
    try:
        with evaluating(model), torch.enable_grad():
            for p in vectors:
                p.requires_grad_(True)
            with torch.no_grad():
                for t in changed:
                    t.normal_(std=0.1, generator=generator)
            output = call(model, example_input)
            outputs = float_tensors(output)
            loss = sum((t.float() * torch.randn(t.shape, generator=noise).to(t.device)).sum() for t in outputs)
            grads: Sequence[Tensor | None] = [None] * len(vectors)
            if isinstance(loss, Tensor) and loss.requires_grad:
                grads = torch.autograd.grad(loss, vectors, allow_unused=True)
    finally:
        with torch.no_grad():
            for t, value in zip(changed, saved, strict=True):
                t.copy_(value)
        for p, want in zip(vectors, wanted, strict=True):
            p.requires_grad_(want)

    norms, dead = {}, []
    for adapter, grad_b, grad_d in zip(adapters, grads[::2], grads[1::2], strict=True):
        first = 0
        for k, role in enumerate(adapter.roles):
            b = 0.0 if grad_b is None else grad_b[first : first + role.rows].norm().item()
            d = 0.0 if grad_d is None else grad_d[k].norm().item()
            first += role.rows
            norms[f"{adapter.name}.{role.name}"] = b
            if not (0 < b < float("inf") and 0 < d < float("inf")):
                dead.append(f"{adapter.name}.{role.name} (gradient norm of b {b:g}, of d {d:g})")
    if dead:
        shown = "; ".join(dead[:8]) + (f"; and {len(dead) - 8} more" if len(dead) > 8 else "")
        raise DeadAdapterError(
            f"{len(dead)} of {len(norms)} adapters would not train on this input: {shown}. Exclude them, or give an "
            "input on which the model uses them. In a base that is not pretrained, frozen norms or gates that start at "
            "zero (SwinV2, layer scale) stop every gradient."
        )
    return norms
