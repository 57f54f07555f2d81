"""Batches in which every sample has its own adapter.

The adapters are taken out of the model, and in their place sit modules that compute every sample with its own
(`mixed_batch.py` has the arithmetic, `find_samples.py` finds the samples). Parts of the base that adapters train
(heads) are computed for each adapter's samples apart.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import linear

from ..errors import StateError
from ..lifecycle.contexts import Context
from ..lifecycle.entry import Entry, Placement, holders
from ..lifecycle.library import Library, known_name, library_of
from ..lifecycle.surgery import attach
from ..maths.bank import Bank
from ..maths.convolution import Geometry
from ..maths.forms import autocasts, exact
from ..private import tree_flatten, tree_leaves, unseen
from ..structure.survey import Survey
from ..structure.targets import Projection
from ..weights.kinds import raw
from ..weights.matrix import Form, to_matrix
from .find_samples import Pattern, Recorder, check_batch, find_patterns
from .mixed_batch import Table, tables
from .read_weights import Reads


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside, each sample of a batch is computed with its own adapter.

    The samples may lie anywhere in the model's tensors (windows, sequence first): where they are is found once per
    model, by three or four runs of the first batch. Where the heads of the adapters have different numbers of classes,
    the outputs of the smaller ones are filled up with -inf. For inference: vectors get no gradient here.

    Args:
        model: an injected model.
        names: of the adapter of each sample, None for the base.

    Raises:
        StateError: an adapter does not exist, the batch has another length than `names`, or an adapter trains or adapts
            something that cannot be computed sample by sample.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        >>> for name in ("cats", "dogs"):
        ...     model = uora.inject(model, rank=4, name=name)
        >>> with torch.no_grad(), uora.route(model, ["cats", "dogs", None]):
        ...     y = model(torch.randn(3, 5, 16))
        >>> y.shape
        torch.Size([3, 5, 16])
    """
    library = library_of(model)
    if isinstance(names, str):
        raise StateError(f"route() needs a name for each sample, [{names!r}, ...]; activate() one adapter for all")
    for name in names:
        if name is not None:
            known_name(library, name)
    if not names:
        raise StateError("route() needs the name of an adapter (or None) for each sample of the batch")
    unique = list(dict.fromkeys(names))
    index = torch.tensor([unique.index(name) for name in names], device="cpu")
    route = _Route(model, library, unique, index)
    context = Context(model, library, "route", route.take_out)
    try:
        try:
            with library.undo(model, unique[0]):
                context.open()
                library.switch(model, unique[0] if len(unique) == 1 else None)
                route.put_in()
            with route.reads:
                yield model
        finally:
            context.leave()
    finally:
        context.leave_again()


class Routed(nn.Module):
    """Sits where an adapter sits, and has its methods; computes every sample with its own."""

    route: _Route

    def __init__(self, route: _Route, path: str, form: Form) -> None:
        super().__init__()
        self.__dict__["route"] = route
        self.path, self.form = path, form
        self.tables: list[Table] = []
        self.bias: Tensor | None = None
        """What the bias of each adapter is more than the base's, (adapters, out)."""

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with unseen():
            return self.add_update(x, linear(x, to_matrix(weight, self.form), bias))

    def add_update(self, x: Tensor, y: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """y plus each sample's update; of some rows of the weight alone, given as (start, number)."""
        where = self.route.pattern_of(self.path, x)
        if where is None:
            return y
        index = self.route.index.to(x.device)
        dtype = torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype
        with exact(x):
            for table in self.tables:
                table = table if rows is None else table.narrow(*rows)
                if table.roles:
                    y = table.update(x, y, where, index, dtype)
            if self.bias is not None:
                y = y + where.spread(self.bias.to(y)[index], y)
        return y

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        if any(size != 1 for size in weight.shape[2:]) or any(geometry.padding) or geometry.groups != 1:  # type: ignore[arg-type]
            raise StateError(f"{self.path}: convolutions with kernels above 1, or in groups, cannot be routed")
        for axis, step in enumerate(geometry.stride, start=2):
            x = x[(slice(None),) * axis + (slice(None, None, step),)]
        return self.project(x.movedim(1, -1), weight, bias).movedim(-1, 1)

    def fold(self, weight: Tensor) -> Tensor:
        """The base's weight: `Reads` sees where the model takes it."""
        return weight


class _Route:
    """The adapters of one batch in a model from which all adapters are taken out.

    Args:
        names: of the adapters, each once; None for the base.
        index: (batch,) which of them each sample has.
    """

    def __init__(self, model: nn.Module, library: Library, names: list[str | None], index: Tensor) -> None:
        self.model, self.library, self.names, self.index = model, library, names, index
        self.recorder: Recorder | None = None
        self.reads = Reads({})
        self.depth = 0
        self.known = Known()
        self.strict = True
        self.paths = {module: path for path, module in model.named_modules()}
        self.sites: dict[str, tuple[nn.Module, Projection, Routed]] = {}
        self.parts: dict[nn.Module, dict[str, list[Tensor]]] = {}

    def put_in(self) -> None:
        """The model, out of which all adapters are, computes each sample with its own from now on."""
        if len(self.names) > 1:  # one adapter for all is switched to
            self._prepare([None if name is None else self.library.entries[name] for name in self.names])
        for owner, p, routed in self.sites.values():
            attach(owner, p.tensor, routed, p.read)  # type: ignore[arg-type]
            if p.tensor in type(owner).read:  # type: ignore[attr-defined]
                weight = raw(owner, p.tensor)
                self.reads.weights[weight.untyped_storage().data_ptr()] = p.path, weight, routed.add_update
        for module, values in self.parts.items():
            module.__dict__["forward"] = _Part(self, module, values)
        inner = {*self.parts, *(owner for owner, _, _ in self.sites.values())}
        for path in {"", *(above for m in inner for above in _above(self.paths[m]))}:
            module = self.model.get_submodule(path)
            if module not in self.parts:
                module.__dict__["forward"] = _Call(self, module)

    def _prepare(self, entries: list[Entry | None]) -> None:
        groups: dict[tuple[Placement, Bank], list[Entry | None]] = {}
        for entry in entries:
            if entry is not None:
                key = entry.placement, entry.bank
                groups[key] = [e if e and (e.placement, e.bank) == key else None for e in entries]
        for (placement, bank), members in groups.items():
            for owner, p, table in tables(placement, bank, members):
                _, first, routed = self.sites.setdefault(p.path, (owner, p, Routed(self, p.path, p.form)))
                if p.read and not first.read:
                    self.sites[p.path] = owner, p, routed
                routed.tables.append(table)
        self._find_parts(entries)

    def take_out(self) -> None:
        """Undo `put_in`; can be repeated."""
        self.reads.end()
        if self.sites:
            self.library.detach(Survey(self.model))
        for module in self.paths:
            forward = module.__dict__.get("forward")
            if isinstance(forward, _Part | _Call):
                if forward.own is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward.own

    def call(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """The outermost call with a batch."""
        if self.depth or self.recorder is not None:
            return forward(*args, **kwargs)
        if threading.get_ident() != self.library.owner:
            raise StateError("another thread routes batches through this model; call it there, or use a copy")
        check_batch((args, kwargs), len(self.index))
        if not self.sites and not self.parts:
            return forward(*args, **kwargs)
        kind = self.paths[module], *_kind((args, kwargs), len(self.index))
        self.known = self.library.patterns.setdefault(kind, Known())
        again = _is_pure((args, kwargs))
        self.strict = again
        inside = {p for p in (*self.sites, *map(self.paths.get, self.parts)) if p is not None}
        inside = {p for p in inside if _within(p, self.paths[module])}
        if not inside <= self.known.tried:
            self._try(module, args, kwargs, inside)
        self.depth += 1
        try:
            return forward(*args, **kwargs)
        except _Unknown:
            if not again:  # what the run has written to the arguments cannot be taken back
                self.known.tried.clear()
                raise
        finally:
            self.depth -= 1
        self._try(module, args, kwargs, inside)
        self.strict = False
        self.depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self.depth -= 1

    def _try(self, module: nn.Module, args: Any, kwargs: Any, inside: set[str]) -> None:
        """Find out where the samples of this call are."""
        found = find_patterns(module, args, kwargs, len(self.index), self._record)
        reached = {p for p, _ in found}
        missed = [p for m in self.parts if (p := self.paths[m]) in inside and p not in reached | self.known.tried]
        if missed:
            raise StateError(f"an adapter trains {missed[0]}, which the model does not call: it cannot be routed")
        self.known.patterns |= found
        self.known.tried |= inside

    def pattern_of(self, path: str, x: Tensor) -> Pattern | None:
        """Where the samples are in the input of a layer; None while that is being found out."""
        batch = len(self.index)
        if self.recorder is not None:
            self.recorder.see(path, x)
            self.known.shapes.add((path, batch, x.shape))
            return None
        key = path, x.dim()
        if key not in self.known.patterns:
            raise _Unknown(
                f"the input of {path} is not reached by the batch that was tried: its adapter cannot be routed. "
                "activate() one adapter instead"
            )
        pattern = self.known.patterns[key]
        if pattern is None:
            raise StateError(
                f"the input of {path} is not rows of samples: its adapter cannot be routed. activate() one adapter "
                "instead"
            )
        if x.shape[pattern.axis] % batch:
            raise _Unknown(
                f"{batch} adapters were named, one for each sample, but {path} gets {tuple(x.shape)}, which is no "
                f"multiple along dimension {pattern.axis}"
            )
        # Of another shape than was tried: if they can lie along another dimension too, it is tried again.
        others = (n for axis, n in enumerate(x.shape[:-1]) if axis != pattern.axis)
        if self.strict and (path, batch, x.shape) not in self.known.shapes and any(n % batch == 0 for n in others):
            raise _Unknown(f"the samples may be elsewhere in the input of {path} than they were")
        return pattern

    def _find_parts(self, entries: list[Entry | None]) -> None:
        """The trained parts of the base in which the adapters differ."""
        sites = {owner: (p, routed) for owner, p, routed in self.sites.values()}
        for name, own in self.library.base_parts.items():
            values = [own if entry is None else entry.parts.get(name, own) for entry in entries]
            if all(v.shape == own.shape and torch.equal(v, own) for v in values):
                continue
            for module, key in holders(Survey(self.model), [name])[name]:
                if module not in sites:
                    self.parts.setdefault(module, {})[key] = values
                    continue
                p, routed = sites[module]
                if key != "bias" or p.read or p.tensor != "weight":
                    raise StateError(f"an adapter trains {name}, which cannot be computed sample by sample; merge() it")
                routed.bias = torch.stack([v.detach() - own for v in values])

    def _record(self, recorder: Recorder | None) -> None:
        self.recorder = recorder


class _Call:
    """The forward of a module that has routed layers within."""

    def __init__(self, route: _Route, module: nn.Module) -> None:
        self.route, self.module, self.own = route, module, module.__dict__.get("forward")
        update_wrapper(self, self.forward)

    @property
    def forward(self) -> Any:
        return type(self.module).forward.__get__(self.module) if self.own is None else self.own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.route.call(self.module, self.forward, args, kwargs)


class _Part:
    """The forward of a module of the base of which adapters have their own parameters."""

    def __init__(self, route: _Route, module: nn.Module, values: dict[str, list[Tensor]]) -> None:
        self.route, self.module, self.values, self.own = route, module, values, module.__dict__.get("forward")

    def __call__(self, x: Tensor) -> Tensor:
        module: Any = self.module
        where = self.route.pattern_of(self.route.paths[module], x)
        if where is None:
            return type(module).forward(module, x)
        rows = where.rows(self.route.index.to(x.device), x.shape[where.axis])
        held = {k: (module._parameters if k in module._parameters else module._buffers) for k in self.values}
        base = {k: held[k][k] for k in self.values}
        order, outputs = [], []
        try:
            for u in range(len(self.route.names)):
                chosen = (rows == u).nonzero().squeeze(1)
                for k, values in self.values.items():
                    held[k][k] = values[u].to(base[k].device)
                outputs.append(type(module).forward(module, x.index_select(where.axis, chosen)))
                order.append(chosen)
        finally:
            for k, value in base.items():
                held[k][k] = value
        width = max(y.shape[-1] for y in outputs)
        outputs = [F.pad(y, (0, width - y.shape[-1]), value=float("-inf")) for y in outputs]
        return torch.cat(outputs, where.axis).index_select(where.axis, torch.cat(order).argsort())


class Known:
    """What was found out about one kind of call.

    Args: none; `patterns` says where the samples are, by path of a layer and number of dimensions of its input, None
    where that is not clear; `tried`, which layers the calls could have reached; `shapes`, of which inputs it is known.
    """

    def __init__(self) -> None:
        self.patterns: dict[tuple[str, int], Pattern | None] = {}
        self.tried: set[str] = set()
        self.shapes: set[tuple[str, int, torch.Size]] = set()


class _Unknown(StateError):
    """It has to be found out where the samples are."""


def _kind(arguments: Any, batch: int) -> tuple[Any, ...]:
    """What calls have in common whose samples lie alike: the options, and along which dimensions samples could lie."""
    leaves, structure = tree_flatten(arguments)
    kinds = [tuple(n % batch == 0 for n in t.shape) if isinstance(t, Tensor) else _plain(t) for t in leaves]
    return str(structure), *kinds


def _plain(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else type(value)


_PLAIN = (bool, int, float, str, type(None))


def _is_pure(arguments: Any) -> bool:
    """Whether a model cannot write into its arguments, but for tensors."""
    return all(isinstance(t, (Tensor, *_PLAIN)) for t in tree_leaves(arguments))


def _above(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def _within(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(f"{above}.")
