"""Sketches of the gradients of adapted weights, taken where their adapters sit.

On each adapter sits, for some batches, a branch with dW = S^T Q and Q = 0. The model computes what it computes without,
and the gradient of Q is S G, the sketch of the gradient G of the weight: so of every kind of weight that can be
adapted, however the model uses it.

Shapes: x (..., in), W (out, in), S (l, rows of all roles), Q and a sketch (l, in).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..maths import linear
from ..maths.convolution import Geometry, convolve
from ..maths.draws import keyed_generator
from ..maths.forms import left_matrix
from ..maths.update import Update
from ..weights.matrix import from_matrix, to_matrix
from .adapter import Adapter, child
from .entry import Entry


class Inputs:
    """Which weights are given the same input: q, k and v of an attention, gate and up of an MLP."""

    def __init__(self) -> None:
        self.same: dict[str, str] = {}
        """By the path of a weight, the first that was seen with its input."""
        self._last: dict[str, tuple[Any, str]] = {}

    def note(self, x: Tensor, adapter: Adapter) -> None:
        """Of the weights of one module's children: what all decoder layers take from an encoder is not one input."""
        parent = adapter.name.rpartition(".")[0]
        last = self._last.get(parent)
        if last is not None and last[0]() is x and last[1] != adapter.name:
            self.same.setdefault(adapter.name, self.same.get(last[1], last[1]))
        else:
            self._last[parent] = ref(x), adapter.name


class Probe(nn.Module):
    """Sits on an adapter, in its place and with its interface.

    Args:
        adapter: on which it sits.
        size: l.
        inputs: shared by all of a model.
    """

    q: Tensor
    adapter: Adapter

    def __init__(self, adapter: Adapter, size: int, inputs: Inputs) -> None:
        super().__init__()
        device = adapter.b.device
        generator = keyed_generator(adapter.bank.config.seed, f"{adapter.origin}/sketch")
        s = torch.randn(size, len(adapter.b), generator=generator, device="cpu", dtype=torch.float32).to(device)
        # No parameter: nothing that walks over the model may take it for one.
        self.__dict__["q"] = torch.zeros(size, adapter.width, device=device, dtype=torch.float32, requires_grad=True)
        self.__dict__["adapter"], self.inputs = adapter, inputs
        parts = tuple(part.t() for part in s.split([role.rows for role in adapter.roles], dim=1))
        b, d = (self.q.new_ones(shape) for shape in (s.shape[1:], (len(adapter.roles), size)))
        self.update = Update(b, d, adapter.spans, (self.q,), parts)

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._sketched(x, self.adapter.project(x, weight, bias))

    def add_update(self, x: Tensor, y: Tensor) -> Tensor:
        return self._sketched(x, self.adapter.add_update(x, y))

    def _sketched(self, x: Tensor, y: Tensor) -> Tensor:
        self.inputs.note(x, self.adapter)
        return y + linear.delta(x, self.update, y.shape[-1]).to(y.dtype)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        self.inputs.note(x, self.adapter)
        none = Update(torch.zeros_like(self.adapter.b), *self.adapter.update()[1:])
        return convolve(x, self.fold(weight), bias, geometry, none)

    def fold(self, weight: Tensor) -> Tensor:
        whole = left_matrix(self.update, to_matrix(weight, self.adapter.form).shape[0]) @ self.q
        adapted = self.adapter.fold(weight)
        return (adapted.float() + from_matrix(whole, self.adapter.form, weight.shape)).to(weight.dtype)


@contextmanager
def probing(entry: Entry, size: int) -> Iterator[tuple[list[Probe], Inputs]]:
    """Inside, a probe sits on every adapter."""
    inputs = Inputs()
    places = list(zip(entry.placement.modules, entry.placement.projections, entry.modules or (), strict=True))
    probes = [Probe(adapter, size, inputs) for _, _, adapter in places]
    try:
        for (owner, p, _), probe in zip(places, probes, strict=True):
            owner._modules[child(p.tensor)] = probe
        yield probes, inputs
    finally:
        for owner, p, adapter in places:
            owner._modules[child(p.tensor)] = adapter
