"""What a model and its weights must be for an adapter to go in.

A weight can be hidden: parametrized, quantised in an unknown way, behind a wrapper, in a compiled module. Whether that
matters depends on whether it would be adapted. So the rules look at a stand-in in which nothing is hidden, and only
what they choose there is held against the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .errors import ConfigError, StateError, TargetError, UoraError
from .quantised import is_quantised, is_quantised_linear
from .rules import CONV, OTHER, _registered
from .sites import Site, Unit, find_sites
from .views import Form
from .walker import Finding, head_names, walk

if TYPE_CHECKING:
    from .plan import Projection

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DIMENSIONS: dict[Form, tuple[int, int]] = {
    "matrix": (2, 2), "transposed": (2, 2), "kernel": (3, 5), "stack": (3, 3), "stack_transposed": (3, 3),
}  # fmt: skip
_FIT = (
    "Adapters go on weights of Linear layers (out, in) and of convolutions that mix channels, on the bare weights of "
    "nn.MultiheadAttention and recurrent layers, and on stacks of experts (n, out, in). Name one of these."
)


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


def plain(model: nn.Module, targets: Iterable[str] = ()) -> nn.Module:
    """The model as the rules can look at it: itself or, where something is hidden, a stand-in on the meta device that
    has the same paths and classes and shows it. Touches nothing.

    Args:
        targets: terms of `UoraConfig.targets`; those that are paths are checked.

    Raises:
        StateError: the model as a whole is not in a state in which it can be adapted.
        TargetError: a term is the path of something that is never adapted, or a registered rule names such a thing.
    """
    _check_whole(model)
    hidden = list(_hidden(model))
    for weight in hidden:
        if weight.deep and not weight.path:
            raise weight.error
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())
    shown = _stand_in(model, {}) if hidden or scripted else model
    _check_registered(shown)
    _check_paths(shown, targets)
    return shown


def check_weights(model: nn.Module, projections: Iterable[Projection]) -> None:
    """Whether the weights that a plan has chosen can be adapted.

    Raises:
        StateError: one is hidden, shared with another module, or on another device than the others.
        TargetError: one is of a kind that cannot be adapted.
    """
    hidden, modules, held = list(_hidden(model)), dict(model.named_modules()), _by_memory(model)
    first = None
    for p in projections:
        for obstacle in hidden:
            if obstacle.hides(p):
                raise obstacle.error
        weight = modules[p.module_path]._parameters[p.tensor]
        assert weight is not None
        if p.read and is_quantised(weight):
            raise TargetError(
                f"{p.path} ({type(weight).__name__}) is quantised, and the model reads this weight itself rather than "
                f"call its layer: there W + dW would have to be formed. Load it unquantised. {_leave_out(p.path)}"
            )
        low, high = _DIMENSIONS[p.form]
        if not low <= weight.dim() <= high:
            raise TargetError(
                f"{p.path} ({type(modules[p.module_path]).__name__}) has the shape {tuple(weight.shape)}, which is no "
                f"{p.form}: that has {low if low == high else f'{low} to {high}'} dimensions. {_leave_out(p.path)}"
            )
        first = first or (p.path, weight.device)
        if weight.device != first[1]:
            raise StateError(
                f"{p.path} is on {weight.device}, {first[0]} on {first[1]}: the adapters of a model share matrices on "
                "one device. Move the model to one device first, or inject into its parts."
            )
        for name, other in held.get(_memory(weight), ()):
            if name != f"{p.module_path}.{p.tensor}".lstrip(".") and _overlap(weight, other):
                raise StateError(
                    f"the weight of {p.path} is shared with {name}, which adapting or merging it would change too. "
                    "Give it a weight of its own, nn.Parameter(weight.detach().clone()), or adapt neither: "
                    f"exclude={p.path!r}."
                )


def _check_whole(model: nn.Module) -> None:
    heads = head_names(model)
    meta = real = ""
    for path, module in model.named_modules():
        where, name = _where(path, module), type(module).__name__
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            raise StateError(
                f"{where} is a {name} of PEFT. Take PEFT's adapter out first, with merge_and_unload() or unload(), or "
                "inject into a part of the model that has none."
            )
        in_head = any(f"{path}.".startswith(f"{head}.") for head in heads)
        if isinstance(module, torch.jit.ScriptModule) and not in_head and any(p.dim() > 1 for p in module.parameters()):
            raise StateError(
                f"{where} is a scripted or traced {module.original_name}, which cannot be looked into. Inject into the "
                "Python model, merge(), and script or trace that."
            )
        for name, p in module.named_parameters(recurse=False):
            if is_lazy(p):
                raise StateError(f"{name} of {where} has no shape yet (a lazy module). Run the model on a batch first.")
            meta, real = (meta or f"{path}.{name}", real) if p.is_meta else (meta, real or f"{path}.{name}")
    if meta and real:
        raise StateError(
            f"{meta.lstrip('.')} is on the meta device, without values, and {real.lstrip('.')} is not. Load the "
            "weights of the whole model first (to_empty() and load_state_dict()), or inject while all of it is on meta."
        )


def _hidden(model: nn.Module) -> Iterator[Hidden]:
    """Everything that hides a weight, in the model's order."""
    for path, module in model.named_modules():
        where, name = _where(path, module), type(module).__name__
        if _is_wrapper(module):
            error: UoraError = StateError(f"{where} is a {name}. Inject into the model first, wrap it after.")
            yield Hidden(path, None, True, error)
        elif "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
            error = StateError(f"{where} is compiled ({name}). Inject into the model first, compile it after.")
            yield Hidden(path, None, True, error)
        elif isinstance(module, torch.jit.ScriptModule):
            continue
        elif parametrize.is_parametrized(module):
            tensor, *_ = module.parametrizations  # type: ignore[misc]
            error = StateError(
                f"{where} is parametrized: its {tensor} is computed at every use. Make it plain first, with "
                f"parametrize.remove_parametrizations(module, {tensor!r}). {_leave_out(_path(path, tensor))}"
            )
            yield Hidden(path, None, False, error)
        elif computed := _computed(module):
            error = StateError(
                f"{computed[0]} of {where} is no parameter: it is computed before every forward, as by weight_norm, "
                "spectral_norm or pruning. Undo that first, with remove_weight_norm(), remove_spectral_norm() or "
                f"prune.remove(). {_leave_out(_path(path, computed[0]))}"
            )
            yield Hidden(path, None, False, error)
        elif size := _packed_linear(module):
            error = TargetError(
                f"{where} is a {type(module).__module__}.{name}, a projection {size[0]} x {size[1]} without a plain "
                f"weight. If it is quantised, load the model unquantised. {_leave_out(path)}"
            )
            yield Hidden(path, None, False, error)
        else:
            for tensor, p in module._parameters.items():
                if p is not None and (kind := _odd(p)) and not (tensor == "weight" and is_quantised_linear(module)):
                    error = TargetError(
                        f"{tensor} of {where} is {kind}; an adapter goes on a dense torch.nn.Parameter of float32, "
                        "float64, bfloat16 or float16, or on a Linear quantised by bitsandbytes or torchao. "
                        f"{_leave_out(_path(path, tensor))}"
                    )
                    yield Hidden(path, tensor, False, error)


def _stand_in(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """The module on the meta device, with plain parameters for what is hidden."""
    if _is_wrapper(module) or "_orig_mod" in module._modules:
        return _stand_in(module.get_submodule("module" if _is_wrapper(module) else "_orig_mod"), made)
    if module in made:
        return made[module]
    if isinstance(module, torch.jit.ScriptModule):
        made[module] = nn.Identity()
    elif size := _packed_linear(module):
        made[module] = nn.Linear(size[1], size[0], device="meta")
    else:
        shapes = {name: _full_shape(module, p) for name, p in module._parameters.items() if p is not None}
        children = dict(module._modules)
        if parametrize.is_parametrized(module):
            for name, sources in children.pop("parametrizations").items():  # type: ignore[union-attr, operator]
                shapes[name] = max((p.shape for p in sources.parameters(recurse=False)), key=torch.Size.numel)
        new: nn.Module = object.__new__(parametrize.type_before_parametrizations(module))
        made[module] = new
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
        new.__dict__["_modules"] = {n: None if c is None else _stand_in(c, made) for n, c in children.items()}
    return made[module]


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
    if isinstance(module, nn.Linear) and p is module._parameters.get("weight") and _odd(p):
        return torch.Size((module.out_features, module.in_features))
    return p.shape


def _odd(p: Tensor) -> str | None:
    """What a parameter is if no adapter can be put on it, None if one can."""
    if type(p) is not nn.Parameter:
        sharded = " (sharded: call inject() before fully_shard())" if type(p).__name__ == "DTensor" else ""
        return f"a {type(p).__name__} of {p.dtype}{sharded}"
    if p.dtype not in FLOATS:
        return f"of {p.dtype}"
    return None if p.layout is torch.strided else f"of layout {p.layout}"


def _by_memory(model: nn.Module) -> dict[int, list[tuple[str, Tensor]]]:
    """Every parameter under each of its names, by its storage."""
    held: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            held[_memory(p)].append((f"{path}.{name}".lstrip("."), p))
    return held


def _memory(p: Tensor) -> int:
    """The same number for tensors in one storage, also on the meta device."""
    if _odd(p):
        return id(p)
    try:
        return p.untyped_storage()._cdata
    except RuntimeError:  # devices without storages
        return id(p)


def _overlap(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors in one storage share bytes; cuDNN keeps all weights of an LSTM in one, side by side."""

    def bounds(t: Tensor) -> tuple[int, int]:
        length = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        return int(t.storage_offset()) * t.element_size(), int(t.storage_offset() + length) * t.element_size()

    (start, end), (other_start, other_end) = bounds(one), bounds(two)
    return start < other_end and other_start < end


def _check_registered(model: nn.Module) -> None:
    """Let every registered rule see all modules that it is for. The walk shows it only those that own a weight which
    can be adapted, so a rule for another kind of weight would be passed over."""
    members: dict[str, dict[str, Site]] = defaultdict(dict)
    for site in find_sites(model) if _registered else ():
        parts = site.path.split(".")
        for i in range(len(parts)):
            members[".".join(parts[:i])][".".join(parts[i:])] = site
    for _, rule in _registered:
        for path, module in model.named_modules():
            try:
                rule(Unit(path, module, members[path]))
            except ConfigError as error:
                if all(p.dim() < 2 or name in members[path] for name, p in module.named_parameters(recurse=False)):
                    raise
                raise TargetError(f"{error}. {_where(path, module)} {_holds(module)}. {_FIT}") from error


def _check_paths(model: nn.Module, targets: Iterable[str]) -> None:
    """Say of a target that is a path, but of no projection, what is there instead."""
    from .plan import GROUPS

    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    paths = [t for t in targets if t not in GROUPS and t not in ("all", "qv") and (t in modules or t in parameters)]
    findings = list(walk(model)) if paths else []
    for path in paths:
        named = any(
            path in (f.site.path, f"{f.site.path}.{role.name}")
            or (role.group not in (CONV, OTHER) and path in (role.name, role.label))
            for f in findings
            for role in f.roles
        )
        if not named:
            raise TargetError(f"{path!r} {_what_is(path, modules, parameters, findings)}")


def _what_is(
    path: str, modules: dict[str, nn.Module], parameters: dict[str, nn.Parameter], findings: list[Finding]
) -> str:
    for f in findings:
        site, weight = f.site, f"{f.site.module_path}.{f.site.tensor}"
        if path in (site.path, weight) and not f.roles:
            return f"({type(site.module).__name__}, {site.shape[0]} x {site.shape[1]}) is never adapted: {f.rule}"
        if path == weight and f.roles:
            return f"is the weight of a projection that goes by {site.path!r}"
    if any(f.roles and f.site.path.startswith(f"{path}.") for f in findings):
        return f"is a {type(modules[path]).__name__}, not a weight; {path + '.*'!r} adapts all that is in it"
    if path in modules:
        return f"{_holds(modules[path])}. {_FIT}"
    holder, _, name = path.rpartition(".")
    return f"is {name} of a {type(modules[holder]).__name__}, of shape {tuple(parameters[path].shape)}. {_FIT}"


def _holds(module: nn.Module) -> str:
    own = [f"{name} {tuple(p.shape)}" for name, p in module.named_parameters(recurse=False)]
    return f"is a {type(module).__name__} with {', '.join(own) or 'no parameter of its own'}"


def _where(path: str, module: nn.Module) -> str:
    return path or f"the model ({type(module).__name__})"


def _path(module_path: str, tensor: str) -> str:
    """What a weight goes by in the options."""
    return module_path if tensor in ("weight", "bias") else f"{module_path}.{tensor}"


def _leave_out(path: str) -> str:
    return f"Or leave it out: exclude={path!r}."
