"""Bare tensors that a module multiplies its input with, read off its code."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import NamedTuple

from torch import Tensor, nn

from ..weights.kinds import base_class
from ..weights.matrix import Form

_ASIDE = re.compile(r"init|reset|load|fuse|export|reparam|switch|prune|resize|tie|from_pretrained|convert|__repr__")


class Product(NamedTuple):
    """How a module multiplies with one of its tensors.

    Args:
        form: what its dimensions are if it has two, or as many as its name in an einsum has letters.
        stacked: what they are if it has three and no einsum says so; None if that is not known.
        other: what it is multiplied with, as the code has it.
    """

    form: Form
    stacked: Form | None
    other: str


def products(module: nn.Module) -> dict[str, tuple[Form, str]]:
    """Form, and the code of the other factor, of each parameter of two or three dimensions that a module multiplies
    with; parameters that it adds, indexes or normalises with are not among them."""
    held = {
        name: p
        for name, p in module._parameters.items()
        if p is not None and p.dim() in (2, 3) and min(p.shape) > 1 and not _EMBEDDING.search(name)
    }
    found: dict[str, tuple[Form, str]] = {}
    for name, product in _products(base_class(module)).items() if held else ():
        if name in held and (form := _form(product, held[name])):
            found[name] = form, product.other
    return found


_EMBEDDING = re.compile(r"embed|table|pos(ition)?_|token|latent|bias")


def _form(product: Product, p: Tensor) -> Form | None:
    if p.dim() == 2:
        return product.form if product.form in ("matrix", "transposed") else None
    return product.stacked


@cache
def method_source(cls: type) -> str:
    """Source of all methods of a class but those that make, load or convert a module; empty where it cannot be read."""
    parts = []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else getattr(value, "__func__", None)
            if inspect.isfunction(function) and not _ASIDE.search(name):
                try:
                    parts.append(inspect.getsource(function))
                except (OSError, TypeError):
                    continue
    return "\n".join(parts)


_OTHER = r"(?P<other>[^,()]*(?:\([^()]*\))?[^,()]*)"
_OWN = r"self\.(?P<name>\w+)(?P<index>\[[^\]]*\])?(?P<turned>\.(?:t\(\)|T\b|mT\b|transpose\())?"

_LINEAR = re.compile(rf"\blinear\(\s*{_OTHER},\s*(?:weight=)?{_OWN}")
_MATMUL = re.compile(rf"\b(?:matmul|mm|bmm)\(\s*{_OTHER},\s*{_OWN}")
_AT = re.compile(rf"(?P<other>[\w.]+(?:\([^()]*\))?)\s*@\s*{_OWN}")
_BEFORE = re.compile(r"self\.(?P<name>\w+)(?P<index>\[[^\]]*\])?\s*@\s*(?P<other>\w+)")
_EINSUM = re.compile(rf"\beinsum\(\s*[\"'](?P<terms>[^\"']+)[\"'],\s*{_OTHER},\s*{_OWN}")


@cache
def _products(cls: type) -> dict[str, Product]:
    source = method_source(cls)
    found: dict[str, Product] = {}
    for match in _LINEAR.finditer(source):
        found.setdefault(match["name"], Product("matrix", "stack" if match["index"] else None, match["other"]))
    for match in (*_MATMUL.finditer(source), *_AT.finditer(source)):
        form: Product = (
            Product("matrix", "stack", match["other"]) if match["turned"]
            else Product("transposed", "stack_transposed", match["other"])
        )  # fmt: skip
        found.setdefault(match["name"], form)
    for match in _BEFORE.finditer(source):
        found.setdefault(match["name"], Product("matrix", "stack", match["other"]))
    for match in _EINSUM.finditer(source):
        if (summed := _summed(match["terms"])) is not None:
            found.setdefault(match["name"], Product(summed, summed, match["other"]))
    return found


def _summed(terms: str) -> Form | None:
    """The form of the second factor of an einsum such as `ibh,hnd->ibnd`."""
    inputs, _, output = terms.replace(" ", "").partition("->")
    first, _, second = inputs.partition(",")
    summed = [c in first and c not in output for c in second]
    free = [c in output and c not in first for c in second]
    batch = [c in first and c in output for c in second]
    if not any(summed) or not any(free) or len(second) not in (2, 3):
        return None
    if batch[0] and len(second) == 3:
        return "stack" if summed[2] and free[1] else "stack_transposed" if summed[1] and free[2] else None
    if any(batch):
        return None
    if summed[0] and all(free[1:]):
        return "transposed"
    if free[0] and all(summed[1:]):
        return "matrix" if len(second) == 2 else "kernel"
    return "stack" if len(second) == 3 and summed[2] else None
