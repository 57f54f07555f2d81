"""Dotted paths of modules and weights, as `named_modules` and `named_parameters` give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn


def joined(path: str, name: str) -> str:
    """The path of what a module calls so; the model itself has the path ""."""
    return f"{path}.{name}" if path else name


def weight_path(module_path: str, tensor: str) -> str:
    """What a weight goes by: the path of its module, and the tensor's name if that is not `weight`."""
    return module_path if tensor == "weight" else joined(module_path, tensor)


def ancestors(path: str) -> Iterator[str]:
    """The paths above, from the innermost to that of the model."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def lies_within(path: str, names: Iterable[str]) -> bool:
    """Whether a path is one of these, or below one."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, also at the second one of a module that has two; None if there is none."""
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        if module is None or name not in module._modules:
            return None
        module = module._modules[name]
    return module
