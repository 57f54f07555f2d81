"""Every weight of a model that could be adapted, where it is, and how the model reaches it."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from torch import Tensor, nn

from ..weights.kinds import base_class, call_form
from ..weights.matrix import Form, matrix_shape
from ..weights.quantised import full_shape
from .bare import products
from .paths import ancestors, weight_path

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Candidate:
    """A weight in its surroundings.

    Args:
        module_path: of the module that holds it, such as `blocks.0.attn.qkv`.
        tensor: name of the parameter in the module.
        module: the module.
        form: what its dimensions are.
        read: whether the model reads the tensor, rather than (or besides) calling the module.
        groups: of a grouped convolution; 1 otherwise.
        spatial: whether it is a kernel of more than one point.
    """

    module_path: str
    tensor: str
    module: nn.Module
    form: Form
    read: bool = False
    groups: int = 1
    spatial: bool = False

    @property
    def path(self) -> str:
        """Of the module, and the tensor's name if that is not `weight`."""
        return weight_path(self.module_path, self.tensor)

    @property
    def weight(self) -> Tensor:
        weight = self.module._parameters[self.tensor]
        assert weight is not None
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight as a matrix; of a quantised one, before it was packed."""
        return matrix_shape(full_shape(self.module, self.weight), self.form)


@dataclass(frozen=True)
class Unit:
    """The projections that one module owns: an attention, an MLP, a stack of experts, or a whole block.

    A wrapper of a single projection (a convolution with its norm, say) and a container own nothing; what is in them
    belongs to the module above.

    Args:
        path: of the module.
        module: the owner.
        members: its projections, by their path in it: `qkv`, `mlp.c_fc`, `in_proj_weight`.
    """

    path: str
    module: nn.Module
    members: dict[str, Candidate] = field(default_factory=dict)

    @property
    def class_name(self) -> str:
        return base_class(self.module).__name__


def find_candidates(modules: Mapping[str, nn.Module]) -> list[Candidate]:
    """Every Linear, convolution, and bare tensor that its module multiplies with, in the model's order.

    Args:
        modules: of the model, by path.
    """
    candidates = []
    for path, module in modules.items():
        for tensor, form in _weights(module):
            kernel = form == "kernel" and isinstance(module, _CONVOLUTIONS)
            candidate = Candidate(
                path,
                tensor,
                module,
                form,
                tensor != "weight" or call_form(module) is None or is_read(path, modules),
                module.groups if kernel else 1,  # type: ignore[arg-type]
                kernel and max(module.kernel_size) > 1,  # type: ignore[arg-type, type-var]
            )
            candidates.append(candidate)
    return candidates


def units(candidates: Sequence[Candidate], modules: Mapping[str, nn.Module]) -> list[Unit]:
    """The candidates by owner, in the model's order."""
    count: Counter[str] = Counter()
    for candidate in candidates:
        if not candidate.spatial:
            count.update({candidate.module_path, *ancestors(candidate.module_path)})
    owners: dict[str, Unit] = {}
    for candidate in candidates:
        bare = candidate.tensor != "weight"
        chain = ([candidate.module_path] if bare else []) + list(ancestors(candidate.module_path))
        alone = 0 if candidate.spatial else 1
        path = next((p for p in chain if count[p] > alone and not isinstance(modules[p], CONTAINERS)), "")
        unit = owners.setdefault(path, Unit(path, modules[path]))
        unit.members[candidate.path[len(path) :].lstrip(".")] = candidate
    return list(owners.values())


def _weights(module: nn.Module) -> Iterator[tuple[str, Form]]:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    own_weight = parameters.get("weight")
    form = call_form(module)
    if own_weight is not None and own_weight.dim() >= 2:
        if isinstance(module, _CONVOLUTIONS):
            if own_weight.shape[1] > 1:  # of depthwise kernels every row is a filter of its own: nothing to project
                yield "weight", "kernel"
        elif isinstance(module, nn.Linear) or form is not None:
            yield "weight", form or "matrix"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield from ((name, "matrix") for name in parameters if name.startswith("weight_"))
    elif "in_proj_weight" in module._parameters:
        yield from ((name, "matrix") for name in IN_PROJECTIONS if name in parameters and parameters[name].dim() == 2)
    stacks = {name: p for name, p in parameters.items() if p.dim() == 3 and name != "weight" and len(p) > 1}
    if form := _stack_form([tuple(p.shape) for p in stacks.values()]):
        yield from ((name, form) for name in stacks)
    elif not isinstance(module, _OF_TORCH) and any(p.dim() in (2, 3) for p in parameters.values()):
        yield from ((name, form) for name, (form, _) in products(module).items() if name not in IN_PROJECTIONS)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_OF_TORCH = (*_CONVOLUTIONS, nn.Linear, nn.Embedding, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules whose weights were dealt with already, or are no matrices."""

IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Bare tensors of nn.MultiheadAttention, and of attention modelled after it."""


def _stack_form(shapes: list[tuple[int, ...]]) -> Form | None:
    """Experts (n, out, in) or (n, in, out), by what fits together: one leads from the model's width into the expert's
    (twice, if a gate is packed with it), another back. None if nothing does."""
    if len({shape[0] for shape in shapes}) != 1 or min(min(shape) for shape in shapes) == 1:
        return None
    (_, rows, columns), *others = shapes
    for _, back_rows, back_columns in others:
        if columns == back_rows and rows in (back_columns, 2 * back_columns):
            return "stack"
        if rows == back_columns and columns in (back_rows, 2 * back_rows):
            return "stack_transposed"
    return None


def is_read(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the code of a module above takes `<name>.weight` for a computation, or cannot be looked at."""
    name = path.rpartition(".")[2]
    for above in ancestors(path):
        module = modules[above]
        reads = _weights_read(base_class(module))
        if reads is None or name in reads:
            return True
    return False


# Asking a weight for what it is does not compute with it.
_READ = re.compile(
    r"\.(\w+)\.weight\b(?!\s*\.\s*(?:dtype|device|shape|size|ndim|dim|requires_grad|is_\w+|numel|data\b))"
)

_ASIDE = re.compile(r"init|reset|load|fuse|export|reparam|switch|prune|resize|tie|from_pretrained|convert|__repr__")


@cache
def _weights_read(cls: type) -> frozenset[str] | None:
    """Names n for which a method of a class holds `.n.weight`; None if the forward's source cannot be read.

    Methods that make, load or convert the module are not looked at.
    """
    found: set[str] = set()
    for base in cls.__mro__:
        if base is nn.Module:
            break
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else getattr(value, "__func__", None)
            if not inspect.isfunction(function) or _ASIDE.search(name):
                continue
            if "weight" not in _names_in(function):
                continue
            try:
                found.update(_READ.findall(inspect.getsource(function)))
            except (OSError, TypeError):
                if name == "forward":
                    return None
    return frozenset(found)


def _names_in(function: object) -> set[str]:
    """Attribute names that a function uses, without its source: most functions need not be read."""
    code = function.__code__  # type: ignore[attr-defined]
    names, todo = set(code.co_names), [c for c in code.co_consts if inspect.iscode(c)]
    while todo:
        inner = todo.pop()
        names |= set(inner.co_names)
        todo += [c for c in inner.co_consts if inspect.iscode(c)]
    return names
