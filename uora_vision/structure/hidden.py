"""Weights that are there but cannot be adapted, each with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import StateError, TargetError, UoraError
from ..weights.quantised import is_quantised_linear
from .paths import weight_path

if TYPE_CHECKING:
    from .targets import Projection


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Hidden(NamedTuple):
    """A weight that cannot be adapted as it is, or a part of the model that hides its weights.

    Args:
        path: of the module.
        tensor: name of the weight in the module, None for all of its own.
        deep: whether everything below the module is hidden too.
        error: to raise if it would be adapted.
    """

    path: str
    tensor: str | None
    deep: bool
    error: UoraError

    def hides(self, p: Projection) -> bool:
        own = p.module_path == self.path and self.tensor in (None, p.tensor)
        return own or (self.deep and p.module_path.startswith(f"{self.path}."))


def find_hidden(modules: Mapping[str, nn.Module]) -> Iterator[Hidden]:
    """Everything that hides a weight, in the model's order.

    Args:
        modules: of the model, by path.
    """
    for path, module in modules.items():
        where, name = shown_path(path, module), type(module).__name__
        if _is_wrapper(module):
            error: UoraError = StateError(f"{where} is a {name}. Inject into the model first, wrap it after.")
            yield Hidden(path, None, True, error)
        elif "_orig_mod" in module._modules:
            error = StateError(
                f"{where} is compiled ({name}). Inject into the model first and compile it after, or compile its parts "
                "in place: part.compile()."
            )
            yield Hidden(path, None, True, error)
        elif isinstance(module, torch.jit.ScriptModule):
            continue
        elif parametrize.is_parametrized(module):
            tensor, *_ = module.parametrizations  # type: ignore[misc]
            error = StateError(
                f"{where} is parametrized: its {tensor} is computed at every use. Make it plain first, with "
                f"parametrize.remove_parametrizations(module, {tensor!r}). {leave_out(_path(path, tensor))}"
            )
            yield Hidden(path, None, False, error)
        elif computed := _computed(module):
            error = StateError(
                f"{computed[0]} of {where} is no parameter: it is computed before every forward, as by weight_norm, "
                "spectral_norm or pruning. Undo that first, with remove_weight_norm(), remove_spectral_norm() or "
                f"prune.remove(). {leave_out(_path(path, computed[0]))}"
            )
            yield Hidden(path, None, False, error)
        elif size := _packed_linear(module):
            error = TargetError(
                f"{where} is a {type(module).__module__}.{name}, a projection {size[0]} x {size[1]} without a plain "
                f"weight. If it is quantised, load the model unquantised. {leave_out(path)}"
            )
            yield Hidden(path, None, False, error)
        else:
            for tensor, p in module._parameters.items():
                if p is not None and (kind := odd_kind(p)) and not (tensor == "weight" and is_quantised_linear(module)):
                    error = TargetError(
                        f"{tensor} of {where} is {kind}; an adapter goes on a dense torch.nn.Parameter of float32, "
                        "float64, bfloat16 or float16, or on a Linear quantised by bitsandbytes or torchao. "
                        f"{leave_out(_path(path, tensor))}"
                    )
                    yield Hidden(path, tensor, False, error)


def plain_copy(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module on the meta device, with plain parameters for what is hidden."""
    if _is_wrapper(module) or "_orig_mod" in module._modules:
        return plain_copy(module.get_submodule("module" if _is_wrapper(module) else "_orig_mod"), copies)
    if module in copies:
        return copies[module]
    if isinstance(module, torch.jit.ScriptModule):
        copies[module] = nn.Identity()
        if any(True for _ in module.parameters()):  # as a head has
            copies[module].register_parameter("scripted", nn.Parameter(torch.empty(0, device="meta")))
    elif size := _packed_linear(module):
        copies[module] = nn.Linear(size[1], size[0], device="meta")
    else:
        shapes = {name: _full_shape(module, p) for name, p in module._parameters.items() if p is not None}
        children = dict(module._modules)
        if parametrize.is_parametrized(module):
            for name, sources in children.pop("parametrizations").items():  # type: ignore[union-attr, operator]
                shapes[name] = max((p.shape for p in sources.parameters(recurse=False)), key=torch.Size.numel)
        new: nn.Module = object.__new__(parametrize.type_before_parametrizations(module))
        copies[module] = new
        new.__dict__.update(module.__dict__)
        for name in _computed(module):
            shapes = {n: shape for n, shape in shapes.items() if n not in (f"{name}_orig", f"{name}_v", f"{name}_g")}
            shapes[name] = new.__dict__.pop(name).shape
        none = {name: None for name, p in module._parameters.items() if p is None}
        empty = {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()}
        packed = module._parameters.get("weight")
        if packed is not None and is_quantised_linear(module):
            empty["weight"] = packed  # its layer can be adapted as it is
        new.__dict__["_parameters"] = none | empty
        new.__dict__["_modules"] = {n: None if c is None else plain_copy(c, copies) for n, c in children.items()}
    return copies[module]


def _is_wrapper(module: nn.Module) -> bool:
    """Whether it replicates or shards a model; FSDP by name, since it is costly to import."""
    known = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return known or any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)


def _computed(module: nn.Module) -> list[str]:
    """Names of weights that are attributes computed from parameters."""
    own = module._parameters
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and (name == "weight" or f"{name}_orig" in own or f"{name}_v" in own)
    ]


def _packed_linear(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a projection that is no nn.Linear and has no weight that could be seen."""
    out, width = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(module, nn.Linear) or not isinstance(out, int) or not isinstance(width, int):
        return None
    return None if any(p.dim() > 1 for p in module.parameters()) else (out, width)


def _full_shape(module: nn.Module, p: Tensor) -> torch.Size:
    """Shape of a parameter; of a packed weight of a Linear, that of the weight."""
    if isinstance(module, nn.Linear) and p is module._parameters.get("weight") and odd_kind(p):
        return torch.Size((module.out_features, module.in_features))
    return p.shape


def odd_kind(p: Tensor) -> str | None:
    """What a parameter is if no adapter can be put on it, None if one can."""
    if type(p) is not nn.Parameter:
        sharded = " (sharded: call inject() before fully_shard())" if type(p).__name__ == "DTensor" else ""
        return f"a {type(p).__name__} of {p.dtype}{sharded}"
    if p.dtype not in FLOATS:
        return f"of {p.dtype}"
    return None if p.layout is torch.strided else f"of layout {p.layout}"


def shown_path(path: str, module: nn.Module) -> str:
    return path or f"the model ({type(module).__name__})"


def _path(module_path: str, tensor: str) -> str:
    """What a weight goes by in the options."""
    return module_path if tensor == "bias" else weight_path(module_path, tensor)


def leave_out(path: str) -> str:
    return f"Or leave it out: exclude={path!r}."
