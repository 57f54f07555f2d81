"""Whether every adapter gets a gradient, on an example and as the model stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeadAdapterError, StateError, warn
from ..maths.bank import Bank
from ..private import no_steps_in_backward
from ..structure.example import call, check_devices, float_tensors
from ..structure.survey import Survey
from ..tables import shortened
from .adapter import Adapter
from .library import active_entry, adapters_in

TRIES = 16
"""How often a run in training mode is repeated while an adapter gets no gradient: chance may leave out its layer."""


def verify(model: nn.Module, example_input: Any) -> dict[str, float]:
    """Run the model forward and backward, in evaluation mode and as it trains, and look at the gradients of b and d.

    As it trains: with its hooks, its checkpointing and what is frozen in it; in training mode, as its modules stand if
    any of them is in training mode. For this b, and trained parts that are all zero, as fresh heads are, have small
    random values. Parameters, buffers, gradients, training flags and random state are as before afterwards.

    What this does not show: that the loss of the training uses this output, or that the optimizer has b and d
    (`Reinitializer` looks at the optimizer).

    Args:
        model: an injected model.
        example_input: its input: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        The norm of the gradient of every role's b in evaluation mode, by name (`blocks.0.attn.qkv.q`).

    Raises:
        StateError: the model is not injected.
        DeadAdapterError: names the adapters whose b or d is frozen, or gets no gradient, or one that is not finite.

    Warns:
        UoraWarning: a trained part of the base (a head) is frozen or gets no gradient, or the model does not run in
            training mode on this input, so that it was seen in evaluation mode alone.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> norms = uora.verify(model, torch.randn(2, 5, 16))
        >>> len(norms), all(norm > 0 for norm in norms.values())
        (6, True)
    """
    entry = active_entry(model)
    survey = Survey(model)
    parameters = [held.tensor for held in survey.parameters.values()]
    if any(p.is_meta for p in parameters):
        raise StateError(
            "a model on the meta device computes nothing, so whether it trains cannot be seen: plan() takes an example "
            "input there, inject() and verify() once the weights are loaded"
        )
    check_devices(parameters, example_input)
    adapters = list(adapters_in(survey).values())
    frozen = [a.name for a in adapters if not (a.b.requires_grad and a.d.requires_grad)]
    if frozen:
        raise DeadAdapterError(
            f"{len(frozen)} of {len(adapters)} adapters are frozen: {shortened(frozen)}. Something after inject() has "
            "set requires_grad to False on their b or d: set it to True, or freeze the rest by name."
        )
    parts = {name: t for name, t in entry.parts.items() if isinstance(t, nn.Parameter)}
    with as_before(survey), _noise(survey, adapters):
        model.eval()
        alive = _alive(adapters, _backward(survey, example_input))
        norms = {name: norm for name, (norm, _) in alive.items()}
        dead = {name: why for name, (_, why) in alive.items() if why}
    if dead:
        raise DeadAdapterError(
            f"{len(dead)} of {len(norms)} adapters would not train on this input: "
            f"{shortened(list(dead.values()), between='; ')}. Exclude them, or give an input on which the model uses "
            "them. In a base that is not pretrained, frozen norms or gates that start at zero (SwinV2, layer scale) "
            "stop every gradient."
        )
    still, reached = _in_training(survey, example_input, adapters, parts)
    if still:
        raise DeadAdapterError(
            f"{len(still)} of {len(norms)} adapters get a gradient in evaluation mode, but not as the model trains: "
            f"{shortened(list(still.values()), between='; ')}. Reentrant checkpointing stops every gradient where its "
            "inputs need none, as behind a frozen embedding: use torch.utils.checkpoint with use_reentrant=False "
            "(gradient_checkpointing_kwargs={'use_reentrant': False}), or enable_input_require_grads()."
        )
    left = [f"{n} is frozen" if not p.requires_grad else f"{n} gets no gradient" for n, p in parts.items()
            if not p.requires_grad or n not in reached]  # fmt: skip
    if left:
        warn(
            f"the adapters train, but of {len(parts)} trained parts of the base {len(left)} would not on this input: "
            f"{shortened(left, between='; ')}"
        )
    return norms


def _in_training(
    survey: Survey, example_input: Any, adapters: list[Adapter], parts: dict[str, nn.Parameter]
) -> tuple[dict[str, str], set[str]]:
    """Which adapters get no gradient in training mode, and which parts of the base do. Several runs count as one."""
    dead: dict[str, str] | None = None
    reached: set[str] = set()
    model = survey.model
    training = any(m.training for m in survey.modules.values() if not isinstance(m, Bank | Adapter))
    with as_before(survey), _noise(survey, adapters):
        if not training:
            model.train()
        for _ in range(TRIES):
            try:
                backward = _backward(survey, example_input)
            except Exception as error:  # broad on purpose: some models want labels, or more samples, to train
                warn(
                    "the gradients were looked at in evaluation mode alone; in training mode the model does not run on "
                    f"this input: {type(error).__name__}: {error}"
                )
                model.eval()
                backward = _backward(survey, example_input)
            found = {name: why for name, (_, why) in _alive(adapters, backward).items() if why}
            reached |= {name for name, p in parts.items() if p.grad is not None and p.grad.any()}
            dead = found if dead is None else {name: why for name, why in dead.items() if name in found}
            if not dead:
                break
    return dead or {}, reached


def _backward(survey: Survey, example_input: Any) -> Callable[[], None]:
    """The forward pass; what is returned does the backward one. Not by torch.autograd.grad, which reentrant checkpoints
    refuse."""
    for held in survey.parameters.values():
        held.tensor.grad = None
    noise = torch.Generator().manual_seed(0)
    outputs = list(float_tensors(call(survey.model, example_input)))

    def backward() -> None:
        parts = [torch.randn(t.shape, generator=noise, device="cpu").to(t.device) for t in outputs]
        loss = sum((t.float() * part).sum() for t, part in zip(outputs, parts, strict=True))
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()

    return backward


def _alive(adapters: list[Adapter], backward: Callable[[], None]) -> dict[str, tuple[float, str]]:
    """The norm of the gradient of every role's b, and what is wrong with it, "" if nothing is."""
    backward()
    found = {}
    for adapter in adapters:
        grad_b, grad_d, first = adapter.b.grad, adapter.d.grad, 0
        for k, role in enumerate(adapter.roles):
            b = 0.0 if grad_b is None else grad_b[first : first + role.rows].norm().item()
            d = 0.0 if grad_d is None else grad_d[k].norm().item()
            first += role.rows
            name = f"{adapter.name}.{role.name}"
            trains = 0 < b < float("inf") and 0 < d < float("inf")
            found[name] = b, "" if trains else f"{name} (gradient norm of b {b:g}, of d {d:g})"
    return found


@contextmanager
def _noise(survey: Survey, adapters: list[Adapter]) -> Iterator[None]:
    """Inside, b and trained parts that are all zero have small random values: with b = 0, d gets no gradient, and a
    head of zeros hides every adapter from the loss until its first step."""
    device = adapters[0].b.device
    mine = {id(p) for a in adapters for p in (a.b, a.d)}
    others = (held.tensor for held in survey.parameters.values())
    zero = [p for p in others if p.requires_grad and id(p) not in mine and not p.any()]
    changed: list[Tensor] = [*(a.b for a in adapters), *zero]
    saved = [p.detach().clone() for p in changed]
    generator = torch.Generator(device).manual_seed(0)
    try:
        with torch.no_grad():
            for p in changed:
                p.normal_(std=0.1, generator=generator)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(changed, saved, strict=True):
                p.copy_(value)


@contextmanager
def as_before(survey: Survey) -> Iterator[None]:
    """Inside, gradients are enabled, and begin anew; afterwards gradients, buffers, training flags and random state are
    as before."""
    modules, parameters = survey.modules.values(), [held.tensor for held in survey.parameters.values()]
    flags = {m: m.training for m in modules}
    gradients = [(p, p.grad) for p in parameters]
    buffers = [
        (m, key, t, t.detach().clone())
        for m in modules if not isinstance(m, Bank | Adapter)
        for key, t in m._buffers.items() if t is not None
    ]  # fmt: skip
    devices = sorted({p.device.index for p, _ in gradients if p.is_cuda})
    try:
        with torch.random.fork_rng(devices), torch.enable_grad(), no_steps_in_backward(parameters):
            for p, _ in gradients:
                p.grad = None  # else a backward would add to what is put back
            yield
    finally:
        for p, grad in gradients:
            p.grad = grad
        with torch.no_grad():
            for m, key, t, value in buffers:
                m._buffers[key] = t
                t.copy_(value)
        for m, training in flags.items():
            m.training = training
