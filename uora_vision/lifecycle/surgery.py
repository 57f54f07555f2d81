"""How an adapter sits on a module: the vectors it trains, and the class that lets the module use them.

An adapted module keeps its parameters, their names and its class as a base class: `type(m)` becomes a subclass made
here, and the trained vectors live in child modules, `m.uora` for `m.weight` and `m.uora_<name>` for other tensors.
Removing the children and restoring the class gives the module back as it was.

There are two mechanisms. A module that is *called* computes the adapted projection itself, at the least cost. A
tensor that is *read*, by the module's parent or by a forward of its own, is a property that hands out W + dW. A module
can have both.
"""

from __future__ import annotations

import threading
import types
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..maths.convolution import Geometry
from ..private import ComputedFlatWeights, forget_flat_weights, in_symbolic_trace, pads, renew_flat_weights
from ..weights.kinds import WRAPPED, Adapted, base_class, call_form, class_call_form, is_adapted, is_forward_of, raw
from ..weights.quantised import is_quantised, own_forward
from ..weights.sharded import is_sharded
from .adapter import CHILD, Adapter, child
from .read_tensor import reading


class Surgical(Adapted):
    """Made by `adapted_class`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, so copies and pickles name what it was made from."""
        cls: Any = type(self)
        return _rebuild, (base_class(self), cls.called, cls.read), self.__getstate__()


def _check_there(adapter: Any, weight: Tensor) -> None:
    """Whether the vectors are where the weight is.

    Raises:
        StateError: they were offloaded.
    """
    b = adapter._parameters.get("b")  # those of a mixed batch have none
    if b is not None and b.is_meta and not weight.is_meta:
        raise _offloaded(f"b and d of {adapter.name} were")


def _offloaded(what: str) -> StateError:
    return StateError(
        f"{what} offloaded, as cpu_offload() and disk_offload() of accelerate do: a module has its parameters only "
        "while it is called, and an adapter is not called. Spread the model over devices (dispatch_model() without "
        "offloading), or load its base in 4 or 8 bits."
    )


class CalledLinear(Surgical):
    def forward(self, x: Tensor) -> Tensor:
        adapter, weight = getattr(self, CHILD), raw(self, "weight")
        _check_there(adapter, weight)
        if is_quantised(weight):
            return adapter.add_update(x, own_forward(self, base_class(self).forward, x))
        return adapter.project(x, weight, raw(self, "bias"))


class CalledConv(Surgical):
    def forward(self: Any, x: Tensor) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = nn.functional.pad(x, pads(self), mode=mode)
            padding = (0,) * len(self.stride)
        geometry = Geometry(self.stride, padding, self.dilation, self.groups)
        adapter, weight = getattr(self, CHILD), raw(self, "weight")
        _check_there(adapter, weight)
        return adapter.convolve(x, weight, raw(self, "bias"), geometry)


class ReadWithin(Surgical):
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


class ReadRecurrent(ComputedFlatWeights, ReadWithin):
    """torch's LSTM and GRU."""

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN's layout would be that of W + dW, which every forward makes anew."""


_FOLDS = "_uora_folds"


def _reading(name: str) -> property:
    """The property that hands out W + dW in place of a parameter of that name; what is written into that outside of the
    module's own forward is written into W. Parameters and state dicts do not go through it."""

    def get(self: Any) -> Tensor:
        if is_sharded(raw(self, name)):
            return raw(self, name)  # fully_shard looks its shard up here; whoever computes finds the whole weight
        if in_symbolic_trace():
            raise StateError(
                f"torch.fx cannot trace a model that reads the weight of an adapted {base_class(self).__name__} "
                "instead of calling it: W + dW would be a constant in the graph. Take features by forward hooks, or "
                "trace after merge()."
            )
        _check_there(self._modules[child(name)], raw(self, name))
        folds = self.__dict__.get(_FOLDS)
        if folds is None:
            return reading(raw(self, name), self._modules[child(name)].fold)
        key = name, torch.is_grad_enabled(), threading.get_ident()
        if key not in folds:
            folds[key] = self._modules[child(name)].fold(raw(self, name))
        return folds[key]

    def put(self: Any, value: Any) -> None:
        self.__dict__[name] = value  # a replica gets its parameters so

    return property(get, put)


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
            mixin: type = CalledConv if class_call_form(base) == "kernel" else CalledLinear
        else:
            mixin = ReadRecurrent if issubclass(base, nn.RNNBase) else ReadWithin
        body: dict[str, Any] = {name: _reading(name) for name in read}
        # torch.fx takes what is of torch.nn as one step, and so looks into no adapter.
        body |= {"__module__": base.__module__, "called": called, "read": read}
        _classes[key] = type(f"Uora{base.__name__}", (mixin, base), body)
    return _classes[key]


def _rebuild(base: type[nn.Module], called: bool, read: tuple[str, ...]) -> Any:
    cls = adapted_class(base, called, read)
    return cls.__new__(cls)


def _become(module: Any, cls: Any) -> None:
    """Change the class of a module, and the forward of the class where hooks on the instance have kept it."""
    before, module.__class__ = type(module), cls
    for key in ("forward", WRAPPED):
        if is_forward_of(module.__dict__.get(key), module, before):
            module.__dict__[key] = types.MethodType(cls.forward, module)


def attach(module: nn.Module, tensor: str, adapter: Adapter, read: bool) -> None:
    """Give a tensor of a module its adapter; the model computes with W + dW from then on.

    Args:
        tensor: name of the parameter.
        read: whether the model may read the tensor rather than call the module. A module whose forward is its own is
            always read.

    Raises:
        StateError: accelerate has offloaded the module.
    """
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        raise _offloaded(f"the weights of {adapter.name} are")
    cls: Any = type(module)
    adapted = isinstance(module, Adapted)
    called = (tensor == "weight" and call_form(module) is not None) or (adapted and cls.called)
    names = (cls.read if adapted else ()) + ((tensor,) if read or not called else ())
    module.add_module(child(tensor), adapter)
    _become(module, adapted_class(base_class(module), called, names))
    forget_flat_weights(module)


def detach(module: nn.Module) -> None:
    """Undo every `attach` to a module."""
    if not is_adapted(module):
        return
    for name in [name for name in module._modules if name == CHILD or name.startswith(f"{CHILD}_")]:
        delattr(module, name)
    _become(module, base_class(module))
    renew_flat_weights(module)


def adapters_of(module: nn.Module) -> dict[str, Adapter]:
    """The adapters of one module, by the name of the tensor."""
    if not is_adapted(module):
        return {}
    found = {name: c for name, c in module._modules.items() if isinstance(c, Adapter)}
    return {"weight" if name == CHILD else name.removeprefix(f"{CHILD}_"): c for name, c in found.items()}
