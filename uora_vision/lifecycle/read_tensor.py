"""W + dW as a model reads it. What the model, or nn.init, writes into it is written into W."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..private import in_transform, tree_map, unseen_by_subclasses

_TORCH = "torch.nn.modules."
"""Modules of torch write into no weight in their forward, and take their fast ways for plain tensors alone."""

_TARGETS = ("input", "self", "tensor", "out")
"""Names under which functions of torch take what they write into."""


class ReadTensor(Tensor):
    """Behaves as W + dW wherever it is used, and as W where it is written into; its views do too.

    `source` is W or the same view of it; `refresh` makes the whole anew after W was changed.
    """

    source: Tensor
    refresh: Callable[[], None]
    uncompiled: ClassVar[bool] = False
    """Whether torch.compile was told to leave it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with unseen_by_subclasses():
            target = _target(func, args, kwargs)
            if target is not None:
                first, *others = args or (None,)
                args = (tree_map(_source, first), *tree_map(_plain, others)) if args else ()
                named = {k: tree_map(_source if k in _TARGETS else _plain, v) for k, v in kwargs.items()}
                before = target.source._version
                out = func(*args, **named)
                if target.source._version != before:
                    target.refresh()
                return out
            out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
            mine = [t for t in (*args, *kwargs.values()) if isinstance(t, ReadTensor)]
            made = out if isinstance(out, tuple | list) else (out,)
            if len(mine) == 1 and any(_shares(t, mine[0]) for t in made):
                sources = func(*tree_map(_source, args), **tree_map(_source, kwargs))
                if not isinstance(out, tuple | list):
                    return _made(out, sources, mine[0].refresh)
                return type(out)(_made(*pair, mine[0].refresh) for pair in zip(out, sources, strict=True))
            return out


def reading(weight: Tensor, fold: Callable[[Tensor], Tensor]) -> Tensor:
    """What to hand out for a weight that is read.

    Args:
        weight: W.
        fold: makes W + dW of it.
    """
    whole = fold(weight)
    plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform()
    if whole is weight or plain or sys._getframe(2).f_globals.get("__name__", "").startswith(_TORCH):
        return whole
    _leave_uncompiled()

    def refresh() -> None:
        with torch.no_grad():
            new = fold(weight)
            if new.shape == whole.shape:
                whole.copy_(new)

    return _made(whole, weight, refresh)


def _leave_uncompiled() -> None:
    """Where torch.compile is in use, keep it out of `__torch_function__`, which is met in frames that it has left."""
    if "torch._dynamo" in sys.modules and not ReadTensor.uncompiled:
        ReadTensor.__torch_function__ = classmethod(torch.compiler.disable(ReadTensor.__torch_function__.__func__))  # type: ignore[assignment,attr-defined]
        ReadTensor.uncompiled = True


def _made(out: Tensor, source: Tensor, refresh: Callable[[], None]) -> Tensor:
    made = out.as_subclass(ReadTensor)
    made.source, made.refresh = source, refresh
    return made


def _target(func: Any, args: Any, kwargs: dict[str, Any]) -> ReadTensor | None:
    """What a function writes into, or looks up the gradient of."""
    name = getattr(func, "__name__", "")
    writes = name.endswith("_") if not name.startswith("__") else name in _WRITING
    if name == "__get__":
        writes = func in (Tensor.grad.__get__, Tensor.is_leaf.__get__)  # type: ignore[attr-defined, union-attr]
    if writes and args:
        first = args[0] if isinstance(args[0], list | tuple) else args[:1]
        return next((t for t in first if isinstance(t, ReadTensor)), None)
    found = [kwargs.get(k) for k in (_TARGETS if writes else ("out",))]
    return next((t for t in found if isinstance(t, ReadTensor)), None)


_WRITING = {"__set__", "__setitem__", "__delitem__"} | {
    f"__i{op}__"
    for op in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
}


def _plain(t: Any) -> Any:
    return t.as_subclass(Tensor) if isinstance(t, ReadTensor) else t


def _source(t: Any) -> Any:
    return t.source if isinstance(t, ReadTensor) else t


def _shares(t: Any, other: Tensor) -> bool:
    return isinstance(t, Tensor) and t.layout is torch.strided and _storage(t) == _storage(other)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
