"""How an adapter sits on a module: the vectors it trains, and the class that lets the module use them.

An adapted module keeps its parameters, their names and its class as a base class: `type(m)` becomes a subclass made
here, and the trained vectors live in child modules, `m.uora` for `m.weight` and `m.uora_<name>` for other tensors.
Removing the children and restoring the class gives the module back as it was.

There are two mechanisms. A module that is *called* computes the adapted projection itself, at the least cost. A
tensor that is *read*, by the module's parent or by a forward of its own, is a property that hands out W + dW. A module
can have both.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .bank import Bank
from .convolution import Geometry, convolve
from .quantised import is_quantised, is_quantised_linear, own_forward
from .sharded import is_sharded
from .views import Form, Span, to_matrix

CHILD = "uora"
"""Name of the child module that holds the vectors of a module's `weight`, and of the bank in the injected model."""


REDUCED = "_uora_reduced"
"""Where a bank keeps the `Reduced` of its adapters."""


@dataclass(frozen=True)
class Role:
    """One projection inside a weight.

    Args:
        name: what it does: q, k, v, proj, fc1, fc2, ...
        group: `attn`, `mlp` or `conv`.
        start: its first output row in the weight.
        rows: how many output rows it has.
        block: length of its runs of rows, for weights that interleave projections; 0 if its rows are one run.
        stride: distance between the first rows of two runs.
    """

    name: str
    group: str
    start: int
    rows: int
    block: int = 0
    stride: int = 0

    @property
    def label(self) -> str:
        return f"{self.group}.{self.name}"

    @property
    def kind(self) -> str:
        """The label without the number that tells experts, and groups of a convolution, apart."""
        return re.sub(r"_\d+$", "", self.label)

    @property
    def span(self) -> Span:
        return Span(self.start, self.rows, self.block, self.stride)


class Adapter(nn.Module):
    """The trained vectors of one adapted weight.

    Args:
        name: path of the weight in the model: of its module, and the tensor's name if that is not `weight`.
        roles: the adapted projections in the weight, by ascending `start`.
        width: input width.
        bank: the shared matrices; referred to, not owned.
        form: what the dimensions of the weight are.
        d_init: initial value of d.
        dropout, token_sampling: see `UoraConfig`.
        origin: the name under which its own rows were first drawn, if modules were renamed since.
    """

    bank: Bank

    def __init__(
        self,
        name: str,
        roles: tuple[Role, ...],
        width: int,
        bank: Bank,
        form: Form = "matrix",
        d_init: float = 0.1,
        dropout: float = 0.0,
        token_sampling: int = 1,
        device: torch.device | str = "cpu",
        origin: str | None = None,
    ) -> None:
        super().__init__()
        self.origin = name if origin is None else origin
        self.name, self.roles, self.width, self.form = name, roles, width, form
        self.dropout, self.token_sampling = dropout, token_sampling
        self.spans = tuple(role.span for role in roles)
        # Past nn.Module's registration: the bank is a child of the model, once, not of every adapted module.
        self.__dict__["bank"] = bank
        rank = bank.config.rank
        # In float32 whatever the base's type: young updates are below the resolution of bfloat16.
        self.b = nn.Parameter(torch.zeros(sum(role.rows for role in roles), device=device, dtype=torch.float32))
        self.d = nn.Parameter(torch.full((len(roles), rank), d_init, device=device, dtype=torch.float32))
        self._own: tuple[int, ...] = ()

    def own_name(self, role: int, side: str) -> str:
        """Name of a role's own matrix in the bank's log."""
        return f"{self.origin}.{self.roles[role].name}/{side}"

    def refresh_own(self, role: int) -> None:
        """Take over a role's own rows from the bank, after they were re-drawn there.

        The buffers grow by doubling, filled up with repetitions, so that a compiled model sees few different shapes.
        """
        for side in ("A", "B"):
            indices, rows = self.bank.own(self.own_name(role, side))
            size = min(self.d.shape[1], 1 << max(3, (len(indices) - 1).bit_length()))
            fill = torch.arange(size).clamp(max=len(indices) - 1)
            shared = self.bank.a(self.width)
            self._set(f"own_index_{role}", indices[fill].to(shared.device))
            self._set(f"own_{side.lower()}_{role}", rows[fill].to(shared))
        self._own = tuple(sorted({*self._own, role}))

    def take_own(self) -> None:
        """Take over the own rows of every role, as the bank has them now."""
        for name in list(self._buffers):
            del self._buffers[name]
        self._own = ()
        for role in range(len(self.roles)):
            if self.bank.draws(self.own_name(role, "A")).any():
                self.refresh_own(role)

    def _set(self, name: str, value: Tensor) -> None:
        old = self._buffers.get(name)
        if old is not None and old.shape == value.shape:
            old.copy_(value)
        else:
            self.register_buffer(name, value, persistent=False)

    def matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """A of the roles, each (r, in), and B of the roles, each (rows, r): one entry where all of them share it."""
        shared, rows, device = self.bank.a(self.width), [role.rows for role in self.roles], self.b.device
        if not self._own:
            bm = [self.bank.b(n) for n in (rows[:1] if len(set(rows)) == 1 else rows)]
            if shared.device == device:
                return [shared], bm
            return [shared.to(device)], [m.to(device) for m in bm]  # of a replica
        # One view each: autograd functions must not be given one tensor twice when compiled.
        a = [self.bank.a(self.width).to(device) for _ in rows]
        bm = [self.bank.b(n).to(device) for n in rows]
        for k in self._own:
            index = self.get_buffer(f"own_index_{k}")
            a[k] = a[k].index_copy(0, index, self.get_buffer(f"own_a_{k}"))
            bm[k] = bm[k].t().index_copy(0, index, self.get_buffer(f"own_b_{k}")).t()
        return a, bm

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted projection, (..., in) -> (..., out); see `functional.project`."""
        matrix, (a, bm) = to_matrix(weight, self.form), self.matrices()
        if self.training and self.dropout:
            dropped = nn.functional.dropout(x, self.dropout)
            branch = functional.delta(dropped, self.b, self.d, self.spans, a, bm, matrix.shape[0])
            return nn.functional.linear(x, matrix, bias) + branch
        return functional.project(x, matrix, bias, self.b, self.d, self.spans, a, bm, *self._options)

    def add_update(self, x: Tensor, y: Tensor) -> Tensor:
        """y + low-rank branch of x, for a layer that has computed its y itself; see `functional.add_update`."""
        a, bm = self.matrices()
        if self.training and self.dropout:
            dropped = nn.functional.dropout(x, self.dropout)
            return (y + functional.delta(dropped, self.b, self.d, self.spans, a, bm, y.shape[-1])).to(y.dtype)
        return functional.add_update(x, y, self.b, self.d, self.spans, a, bm, *self._options)

    @property
    def _options(self) -> tuple[Any, int]:
        """What `project` and `add_update` take last."""
        return self.bank.__dict__.get(REDUCED), self.token_sampling if self.training else 1

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        """The adapted convolution; see `convolution.convolve`."""
        dropout = self.dropout if self.training else 0.0
        return convolve(x, weight, bias, geometry, self.b, self.d, self.spans, *self.matrices(), dropout)

    def fold(self, weight: Tensor) -> Tensor:
        """W + dW, differentiable; see `functional.fold`."""
        return functional.fold(weight, self.form, self.b, self.d, self.spans, *self.matrices())

    def delta_weight(self, dtype: torch.dtype) -> list[Tensor]:
        """dW of each role, (rows, in), computed in `dtype`."""
        return functional.delta_weight(self.b, self.d, self.spans, *self.matrices(), dtype)

    def extra_repr(self) -> str:
        return f"{', '.join(role.label for role in self.roles)}, rank={self.d.shape[1]}"


class Adapted:
    """Mixed in before the class of a module that has adapters; made by `adapted_class`."""

    _parameters: dict[str, Any]
    __dict__: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, so copies and pickles name what it was made from."""
        cls: Any = type(self)
        return _rebuild, (base_class(self), cls.called, cls.read), self.__getstate__()


class CalledLinear(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        adapter, weight = getattr(self, CHILD), raw(self, "weight")
        if is_quantised(weight):
            return adapter.add_update(x, own_forward(self, base_class(self).forward, x))
        return adapter.project(x, weight, raw(self, "bias"))


class CalledConv(Adapted):
    def forward(self: Any, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = nn.functional.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * len(self.stride)
        geometry = Geometry(self.stride, padding, self.dilation, self.groups)
        return getattr(self, CHILD).convolve(x, raw(self, "weight"), raw(self, "bias"), geometry)


class ReadWithin(Adapted):
    """A module whose own forward reads its tensors, often more than once; each is folded once per forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        base_forward = base_class(self).forward
        if torch.compiler.is_compiling():
            return base_forward(self, *args, **kwargs)
        self.__dict__[_FOLDS] = {}
        try:
            return base_forward(self, *args, **kwargs)
        finally:
            self.__dict__.pop(_FOLDS, None)


class ReadRecurrent(ReadWithin):
    """torch's LSTM and GRU read their tensors from a list that they keep."""

    @property
    def _flat_weights(self: Any) -> list[Tensor | None]:
        there = self._parameters.keys() | self.__dict__.keys()  # a replica gets its tensors one by one
        return [getattr(self, name) if name in there else None for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        """torch renews the list when the module is moved; it is made from the parameters here."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)  # torch's own would keep the list up to date

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN's layout would be that of W + dW, which every forward makes anew."""


_FOLDS = "_uora_folds"


def raw(module: Any, name: str) -> Any:
    """A parameter of a module as it is stored. Replicas of DataParallel keep theirs among the plain attributes."""
    parameters = module._parameters
    return parameters[name] if name in parameters else module.__dict__[name]


def _reading(name: str) -> property:
    """The property that hands out W + dW in place of a parameter of that name. Parameters and state dicts do not go
    through it."""

    def get(self: Any) -> Tensor:
        if is_sharded(raw(self, name)):
            return raw(self, name)  # fully_shard looks its shard up here; whoever computes finds the whole weight
        folds = self.__dict__.get(_FOLDS)
        if folds is None:
            return self._modules[child(name)].fold(raw(self, name))
        key = name, torch.is_grad_enabled(), threading.get_ident()
        if key not in folds:
            folds[key] = self._modules[child(name)].fold(raw(self, name))
        return folds[key]

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value  # a replica gets its parameters so

    return property(get, put)


def child(tensor: str) -> str:
    """Name of the child module that holds the vectors of a module's tensor."""
    return CHILD if tensor == "weight" else f"{CHILD}_{tensor}"


def call_form(module: nn.Module) -> Form | None:
    """The form of the weight of a module that can be called adapted; None if its forward is its own."""
    return "matrix" if is_quantised_linear(module) else _call_form(base_class(module))


def _call_form(cls: type[nn.Module]) -> Form | None:
    forward = cls.forward
    if forward is nn.Linear.forward:
        return "matrix"
    if issubclass(cls, nn.Conv1d | nn.Conv2d | nn.Conv3d) and forward in _CONVOLUTIONS:
        return "kernel"
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return "transposed"
    return None


_CONVOLUTIONS: tuple[Callable[..., Any], ...] = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_classes: dict[tuple[type, bool, tuple[str, ...]], Any] = {}


def adapted_class(base: type[nn.Module], called: bool, read: tuple[str, ...]) -> Any:
    """The adapted subclass of a module class, made once.

    Args:
        called: whether the module is called, and computes the projection of its weight adapted.
        read: names of the tensors that are read as W + dW.
    """
    key = base, called, read
    if key not in _classes:
        if called:
            mixin: type = CalledConv if _call_form(base) == "kernel" else CalledLinear
        else:
            mixin = ReadRecurrent if issubclass(base, nn.RNNBase) else ReadWithin
        body: dict[str, Any] = {name: _reading(name) for name in read}
        body |= {"__module__": __name__, "called": called, "read": read}
        _classes[key] = type(f"Uora{base.__name__}", (mixin, base), body)
    return _classes[key]


def base_class(module: Any) -> Any:
    """The class of a module; of an adapted one, the class that it had before."""
    classes = type(module).__mro__  # fully_shard may have put classes of its own in front
    return classes[classes.index(Adapted) + 1] if Adapted in classes else classes[0]


def _rebuild(base: type[nn.Module], called: bool, read: tuple[str, ...]) -> Any:
    cls = adapted_class(base, called, read)
    return cls.__new__(cls)


def attach(module: nn.Module, tensor: str, adapter: Adapter, read: bool) -> None:
    """Give a tensor of a module its adapter; the model computes with W + dW from then on.

    Args:
        tensor: name of the parameter.
        read: whether the model may read the tensor rather than call the module. A module whose forward is its own is
            always read.
    """
    cls: Any = type(module)
    adapted = isinstance(module, Adapted)
    called = (tensor == "weight" and call_form(module) is not None) or (adapted and cls.called)
    names = (cls.read if adapted else ()) + ((tensor,) if read or not called else ())
    module.add_module(child(tensor), adapter)
    module.__class__ = adapted_class(base_class(module), called, names)
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


def detach(module: nn.Module) -> None:
    """Undo every `attach` to a module."""
    if not is_adapted(module):
        return
    for name in [name for name in module._modules if name == CHILD or name.startswith(f"{CHILD}_")]:
        delattr(module, name)
    module.__class__ = base_class(module)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, Adapted)


def adapters_of(module: nn.Module) -> dict[str, Adapter]:
    """The adapters of one module, by the name of the tensor."""
    if not is_adapted(module):
        return {}
    found = {name: c for name, c in module._modules.items() if isinstance(c, Adapter)}
    return {"weight" if name == CHILD else name.removeprefix(f"{CHILD}_"): c for name, c in found.items()}
