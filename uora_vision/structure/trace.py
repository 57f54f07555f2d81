"""What a model does with its parameters, seen by running it once.

A mode sees every torch function called from Python. Parameters are followed through views and copies to the operation
that consumes them, wherever it is called. The output of a projection is followed too: its elements are labelled with
the rows of the weight they come from, and what the model does to the output (view, permute, chunk, ...) is done to the
labels. Rows that go into a computation of their own are a group; attention tells which groups are q, k and v. No value
is ever looked at, so models on the meta device work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .example import call, evaluating
from .labels import (
    LIMIT,
    MOVES,
    Labels,
    along,
    atoms,
    collapsed,
    compact,
    labels_after,
    pick,
    spread,
    tensors_in,
    thinned,
)
from .operations import ATTENTIONS, EXAMPLES, PRODUCTS, REDUCTIONS, SUMS, WEIGHTED, free_axes, name_of, operands_of
from .paths import joined


@dataclass(frozen=True)
class Use:
    """One way in which a parameter is consumed.

    Args:
        op: the torch function that takes it: `linear`, `conv2d`, `matmul`, `lstm`, `embedding`, `multi_head_attention`,
            ...; `linear:input` where it is what a projection is applied to. Views and copies count only where nothing
            else ever happens to the parameter.
        reader: path of the innermost module whose forward was running, "" for the model itself.
        called: whether that module owns the parameter; otherwise the parameter is read past its owner.
        where: file and line of the innermost frame outside torch (`eva.py:262`), or in torch's own modules that have
            children, as nn.MultiheadAttention.
    """

    op: str
    reader: str
    called: bool
    where: str


@dataclass(frozen=True)
class Trace:
    """What one run showed, by name, of the parameters that have two or more dimensions.

    Args:
        uses: in the order of their appearance. A use of a tied parameter goes by the name under which the running
            module owns it, if any, and by all its names otherwise.
        unused: parameters that nothing consumed under any name.
        rows: the groups of output rows (indices along the output dimension; of stacked experts, within one) that go
            separate ways, each ascending, by their first rows. Missing where all rows go the same way.
        flows: the rows that attention used as `q`, `k` and `v`, whatever the model calls them; missing where that is
            not certain. A row can be in two, as where keys are also the values.
    """

    uses: dict[str, tuple[Use, ...]]
    unused: tuple[str, ...]
    rows: dict[str, tuple[tuple[int, ...], ...]]
    flows: dict[str, dict[str, tuple[int, ...]]]


def trace(model: nn.Module, example_input: Any) -> Trace:
    """Run a model once, in eval mode and without gradients, and report what it does with its parameters.

    Args:
        model: a model without adapters, on any device, meta included. Training flags and random state are as before
            afterwards; no parameter is written. What scripted or compiled parts of it consume is not seen.
        example_input: its input: a tensor, a tuple of arguments or a dict of keyword arguments. Small is enough.

    Raises:
        Exception: whatever the model's forward raises on this input.
    """
    tracer = _Tracer(model, example_input)
    hooks = [
        register_module_forward_pre_hook(lambda module, args: tracer.stack.append(module)),
        register_module_forward_hook(lambda *_: tracer.leave(), always_call=True),
    ]
    try:
        # No need of gradients to see inside nn.MultiheadAttention: an active mode rules out its fused path.
        with evaluating(model), torch.no_grad(), tracer:
            call(model, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return tracer.result()


ROLES = ("q", "k", "v")


class _Attention(NamedTuple):
    """Scores, or probabilities if `normal`, made of these queries and keys."""

    q: Labels = ()
    k: Labels = ()
    normal: bool = False


class _Mark(NamedTuple):
    """What is known of a tensor: whether it depends on the input, the parameters that it is a view or copy of, the rows
    it comes from, and the attention that it is part of."""

    active: bool = False
    weights: tuple[str, ...] = ()
    labels: Labels = ()
    attention: _Attention | None = None


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module, example_input: Any) -> None:
        super().__init__()
        self.stack: list[nn.Module] = []
        self.paths: dict[nn.Module, str] = {}
        self.owners: dict[str, nn.Module] = {}
        self.uses: dict[str, dict[Use, None]] = {}
        self.moves: dict[str, dict[Use, None]] = {}
        self.marks = WeakTensorKeyDictionary()
        names: dict[Tensor, tuple[str, ...]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(module, path)
            for key, p in module._parameters.items():
                if p is not None and p.dim() >= 2:
                    name = joined(path, key)
                    self.owners[name] = module
                    names[p] = (*names.get(p, ()), name)
        # One kind of rows for every axis of a parameter, and by kind what was found.
        self.kinds = [(known, size) for p, known in names.items() for size in p.shape]
        sizes = torch.tensor([1] + [size for _, size in self.kinds], device="cpu")
        self.starts = sizes.cumsum(0)
        self.groups: dict[int, dict[tuple[int, ...], Tensor]] = {}
        self.flows: dict[int, dict[str, Tensor]] = {}
        starts = iter(self.starts)
        for p, known in names.items():
            columns = (next(starts) + torch.arange(size, device="cpu").double() for size in p.shape)
            self.marks[p] = _Mark(weights=known, labels=tuple(spread(c, k, p.shape) for k, c in enumerate(columns)))
        for t in tensors_in(dict(example_input) if isinstance(example_input, Mapping) else example_input):
            self.marks[t] = _Mark(active=True)

    def leave(self) -> None:
        self.stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = name_of(func)
        outs = [args[0]] if name == "setitem" else tensors_in(out)
        if outs and name not in EXAMPLES:  # else an attribute was read
            self.observe(name, func, args, kwargs, outs)
        return out

    def mark(self, value: Any) -> _Mark:
        return (isinstance(value, Tensor) and self.marks.get(value)) or _Mark()

    def observe(self, name: str, func: Any, args: Any, kwargs: Any, outs: list[Tensor]) -> None:
        moved = name in MOVES  # what does: the first argument; others are shapes, indices and examples to follow
        taken = (args[0] if args else next(iter(kwargs.values()))) if moved else (args, kwargs)
        marks = {t: self.mark(t) for t in tensors_in(taken)}
        active = any(mark.active for mark in marks.values())
        inputs = args[: 1 if name in WEIGHTED else 3 if name == "multi_head_attention" else 0]
        for t, mark in marks.items():
            if mark.weights:
                book = self.moves if moved and not active else self.uses
                self.record(book, mark.weights, f"{name}:input" if any(t is x for x in inputs) else name)
                marks[t] = _Mark() if moved and active else mark  # as a class token that is put before the others
        weights = tuple(dict.fromkeys(n for mark in marks.values() for n in mark.weights)) if moved else ()
        attention = next((mark.attention for mark in marks.values() if mark.attention), None) if moved else None
        results = [_Mark(active, weights, (), attention) for _ in outs]
        try:
            if moved:
                labels = labels_after(name, func, args, kwargs, outs, {id(t): mark.labels for t, mark in marks.items()})
                results = [result._replace(labels=rows) for result, rows in zip(results, labels, strict=True)]
            elif name in ATTENTIONS:
                self.attend(name, args, kwargs)
            elif name == "copy" or (name == "setitem" and not tensors_in(args[1])):
                self.write(outs[0] if name == "copy" else outs[0][args[1]], self.mark(args[-1]).labels)
                results = [self.mark(outs[0])._replace(active=active)]
            else:
                how = self.multiply if name in WEIGHTED | PRODUCTS else self.transform
                results = [how(name, args, kwargs, marks, outs)._replace(active=active)] * len(outs)
        except Exception:  # broad on purpose: this is an extra; what it cannot follow must not stop the model
            pass
        for out, result in zip(outs, results, strict=True):
            self.marks[out] = result

    def transform(self, name: str, args: Any, kwargs: Any, marks: dict[Tensor, _Mark], outs: list[Tensor]) -> _Mark:
        """Anything that is neither movement nor product. Where the output has the shape of an input (activations,
        norms, scales, biases, rotary embedding), it keeps the labels."""
        out, active = outs[0], any(mark.active for mark in marks.values())
        first = next(iter(marks), out)
        if not active and self.mark(first).weights:  # a weight made from a weight, as by weight norm
            return marks[first] if first.shape == out.shape else _Mark()
        dim = pick(args, kwargs, 1, "dim")
        attention = next((mark.attention for t, mark in marks.items() if mark.attention and t.shape == out.shape), None)
        if name == "softmax":  # over the last axis, it is over keys; over the one before, what stands first is the keys
            q, k, _ = attention or _Attention()
            q, k = {-1: (q, k), -2: (k, q)}.get(dim if dim is None or dim < 0 else dim - out.dim(), ((), ()))
            attention = _Attention(q, k, normal=True)
        tracked = {t: mark.labels for t, mark in marks.items() if mark.labels and not mark.weights}
        followed = {t: labels for t, labels in tracked.items() if marks[t].active or not active}  # others are constants
        only = next(iter(followed.values())) if len(followed) == 1 else ()
        labels: Labels = ()
        if len(outs) == 1 and all(t.shape == out.shape for t in followed):
            labels = self.merged(list(followed.values()), name in SUMS)
        elif "pool" in name or name == "interpolate":
            labels = collapsed(only, out, tuple(range(2, out.dim())), keepdim=True)
        elif name in REDUCTIONS and dim is not None:
            labels = collapsed(only, out, dim, bool(pick(args, kwargs, 2, "keepdim")))
        if name in SUMS and any(mark.active and not mark.labels for mark in marks.values()):
            labels = ()  # a residual connection: from here on the elements belong to the stream
        for t, ended in tracked.items():
            if not labels or t not in followed:
                self.part(ended)
            for half in range(2) if name == "glu" else ():
                self.part(tuple(rows.chunk(2, -1 if dim is None else dim)[half] for rows in ended))
        return _Mark(labels=labels, attention=attention)

    def multiply(self, name: str, args: Any, kwargs: Any, marks: dict[Tensor, _Mark], outs: list[Tensor]) -> _Mark:
        """Products of two tensors: a projection where one of them is a weight, attention where none is."""
        out, operands = outs[0], operands_of(name, args, kwargs)
        free = free_axes(name, args, operands, out)
        labels: Labels = ()
        sides = [self.mark(t) for t in operands]
        attention = None if any(mark.weights for mark in sides) else self.score(sides, free)
        if name in WEIGHTED:
            if operands[0].shape == out.shape:
                attention = sides[0].attention  # heads that talk: a linear map of the scores
            if name != "linear" and operands[1].shape[1] == 1:  # depthwise: the channels stay apart
                labels = collapsed(sides[0].labels, out, tuple(range(2, out.dim())), keepdim=True)
        for mark in sides:
            if not mark.weights and not labels:
                self.part(mark.labels)
        if name in WEIGHTED or not all(mark.weights for mark in sides):
            for k, axis, out_axis in free:
                columns = [along(rows, axis) for rows in sides[k].labels] if sides[k].weights else []
                labels += tuple(spread(c, out_axis, out.shape) for c in columns if c is not None)
        return _Mark(labels=labels, attention=attention)

    def score(self, marks: list[_Mark], free: list[tuple[int, int, int]]) -> _Attention | None:
        """Queries times keys starts an attention; probabilities times values ends it."""
        last = next((k for k, _, out_axis in free if out_axis == -1), None)
        if last is None or len(marks) != 2:
            return None
        for mark, other in (marks, marks[::-1]):
            if mark.attention and mark.attention.normal:
                known = mark.attention.q or mark.attention.k or mark.labels  # else it is some pooling
                for role, labels in zip(ROLES, (mark.attention.q, mark.attention.k, other.labels), strict=True):
                    self.claim(role, labels if known and other.labels else ())
                return None
        scored = any(mark.labels for mark in marks)
        return _Attention(q=marks[1 - last].labels, k=marks[last].labels) if scored else None

    def attend(self, name: str, args: Any, kwargs: Any) -> None:
        """Attention as one function: what it is given as q, k and v, or the weights with which it makes them."""
        packed = self.mark(pick(args, kwargs, 5, "in_proj_weight")).labels[:1]
        for k, (role, word) in enumerate(zip(ROLES, ("query", "key", "value"), strict=True)):
            given = self.mark(pick(args, kwargs, k, word))
            labels = () if given.weights else given.labels
            self.part(labels)
            if name == "multi_head_attention":
                own = self.mark(kwargs.get(f"{role}_proj_weight")).labels[:1]
                labels = own or tuple(rows.chunk(3)[k] for rows in packed)
                self.part(labels)
            self.claim(role, labels)

    def write(self, part: Tensor, labels: Labels) -> None:
        """Labels that are copied into a tensor, or into a part of the tensor that it is a view of."""
        base = part if part._base is None else part._base
        if not labels or not base.is_contiguous() or base.numel() > LIMIT:
            self.part(labels)
            return
        results, known = [], self.mark(base).labels
        for turn in range(max(len(known), len(labels))):
            rows = torch.zeros(base.shape, dtype=torch.double, device="cpu")
            rows = rows.copy_(known[turn]) if turn < len(known) else rows
            view = rows.as_strided(part.shape, part.stride(), part.storage_offset() - base.storage_offset())
            view.copy_(labels[min(turn, len(labels) - 1)])
            results.append(compact(rows))
        self.marks[base] = _Mark(active=True, labels=tuple(results))

    def record(self, book: dict[str, dict[Use, None]], names: tuple[str, ...], op: str) -> None:
        reader = next((module for module in reversed(self.stack) if module in self.paths), None)
        path = "" if reader is None else self.paths[reader]
        own = tuple(name for name in names if self.owners[name] is reader)
        for name in own or names:
            book.setdefault(name, {})[Use(op, path, bool(own), _where(reader))] = None

    def seen(self, labels: Labels) -> dict[int, Tensor]:
        """The rows that occur in some labels, ascending, by their kind."""
        if not labels:
            return {}
        flat = [thinned(torch.view_as_real(rows) if rows.is_complex() else rows).flatten() for rows in labels]
        numbers = torch.cat(flat).long()
        occurs = torch.zeros(int(numbers.max()) + 1, dtype=torch.bool, device="cpu")
        occurs[numbers] = True
        rows = occurs[1:].nonzero().flatten() + 1
        kinds = torch.bucketize(rows, self.starts, right=True) - 1
        return {k: rows[kinds == k] - self.starts[k] for k in kinds.unique_consecutive().tolist()}

    def part(self, labels: Labels) -> None:
        """The rows of these labels go into a computation of their own."""
        for kind, rows in self.seen(labels).items():
            if len(rows) < self.kinds[kind][1]:
                self.groups.setdefault(kind, {})[tuple(rows.tolist())] = rows

    def claim(self, role: str, labels: Labels) -> None:
        for kind, rows in self.seen(labels).items():
            flow = self.flows.setdefault(kind, {})
            flow[role] = torch.cat([flow[role], rows]).unique() if role in flow else rows

    def merged(self, inputs: list[Labels], add: bool) -> Labels:
        """Labels of an elementwise result; none where rows that went separate ways meet, as a gate and what it gates.
        Parts of one projection that are added, as in rotary embedding, are no such meeting."""
        labels = inputs[0] if inputs else ()
        for other in inputs[1:]:
            one, two = self.seen(labels), self.seen(other)
            if one.keys() != two.keys():
                return ()
            if not all(torch.equal(one[kind], two[kind]) for kind in one):
                if not add or len(labels) > 8:
                    return ()
                labels += other
        return labels

    def result(self) -> Trace:
        uses = {name: tuple(self.uses.get(name) or self.moves.get(name) or ()) for name in self.owners}
        used = {name for known, _ in self.kinds if any(uses[name] for name in known) for name in known}
        rows: dict[str, tuple[tuple[int, ...], ...]] = {}
        flows: dict[str, dict[str, tuple[int, ...]]] = {}
        for kind, (known, size) in enumerate(self.kinds):
            for name in known:
                if kind in self.groups:
                    rows.setdefault(name, atoms(size, self.groups[kind].values()))
                if flow := self.flows.get(kind):
                    flows.setdefault(name, {role: tuple(flow[role].tolist()) for role in ROLES if role in flow})
        unused = tuple(name for name in uses if name not in used)
        return Trace({name: found for name, found in uses.items() if found}, unused, rows, flows)


def _where(reader: nn.Module | None) -> str:
    skipped = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))
    composed = reader is not None and any(True for _ in reader.children())
    home = sys.modules.get(type(reader).__module__) if composed else None
    frame = sys._getframe(1)
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file == getattr(home, "__file__", None) or not file.startswith(skipped):
            break
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
