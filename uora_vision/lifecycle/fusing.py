"""What an adapted model must not do: make new weights out of those that have adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import StateError
from ..structure.paths import ancestors, joined, submodule

_FUSING = ("fuse", "reparameterize", "switch_to_deploy", "convert_to_deploy", "fuse_model")
"""Methods by which models of timm and torchvision compute new weights from those they have."""


class MergeFirst:
    """Stands in an adapted model for a method that would make new weights without the adapter."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise StateError(
            f"{self.name}() would make new weights and lose the adapter. merge() the model first (or a copy of it, to "
            "keep the adapter), or remove() the adapter."
        )


def forbid_fusing(model: nn.Module, paths: Iterable[str]) -> None:
    """Make the modules on the way to the given ones refuse to fuse or re-parametrize themselves; copies and pickles of
    the model refuse too."""
    for path in {p for below in paths for p in (below, *ancestors(below))}:
        module = submodule(model, path)
        for name in _FUSING:
            if _takes_nothing(getattr(type(module), name, None)):
                module.__dict__[name] = MergeFirst(joined(path, name))


def allow_fusing(module: nn.Module) -> None:
    """Undo `forbid_fusing` in one module."""
    for name in [name for name, value in vars(module).items() if isinstance(value, MergeFirst)]:
        del module.__dict__[name]


def _takes_nothing(method: Any) -> bool:
    """Whether a method can be called without arguments; one of such a name with some fuses features, in the forward."""
    if not inspect.isroutine(method):
        return False
    _, *others = inspect.signature(method).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others)
