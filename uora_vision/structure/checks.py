"""What a model and its weights must be for an adapter to go in.

A weight can be hidden: parametrized, quantised in an unknown way, behind a wrapper, in a compiled module. Whether that
matters depends on whether it would be adapted. So the rules look at a stand-in in which nothing is hidden, and only
what they choose there is held against the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..config import TOWER
from ..errors import ConfigError, StateError, TargetError
from ..weights.matrix import Form
from ..weights.quantised import is_quantised
from ..weights.role import CONV, OTHER
from ..weights.sharded import is_sharded
from .candidates import Candidate, Unit
from .hidden import leave_out, odd_kind, shown_path
from .paths import ancestors, joined, lies_within
from .rules import registered
from .shared_rules import load_shared_rules
from .survey import Survey, held_at
from .targets import GROUPS, Projection
from .towers import tower_named
from .walk import Finding

_DIMENSIONS: dict[Form, tuple[int, int]] = {
    "matrix": (2, 2), "transposed": (2, 3), "kernel": (3, 5), "stack": (3, 3), "stack_transposed": (3, 3),
}  # fmt: skip

_FIT = (
    "Adapters go on weights of Linear layers (out, in) and of convolutions that mix channels, on the bare weights of "
    "nn.MultiheadAttention and recurrent layers, and on stacks of experts (n, out, in). Name one of these."
)


def check_model(survey: Survey, targets: Iterable[str] = (), placed: bool = True) -> None:
    """Whether the rules can look at the model. Touches nothing.

    Args:
        targets: terms of `UoraConfig.targets`; those that are paths are checked.
        placed: whether the weights must be where adapters can go in, rather than some of them on the meta device.

    Raises:
        StateError: the model as a whole is not in a state in which it can be adapted.
        TargetError: a term is the path of something that is never adapted, or a registered rule names such a thing.
    """
    _check_state(survey, placed)
    for weight in survey.hidden:
        if weight.deep and not weight.path:
            raise weight.error
    _check_registered(survey.shown)
    _check_paths(survey.shown, targets)


def check_weights(survey: Survey, projections: Iterable[Projection]) -> None:
    """Whether the weights that a plan has chosen can be adapted.

    Raises:
        StateError: one is hidden, shared with another module, or on another device than the others.
        TargetError: one is of a kind that cannot be adapted.
    """
    modules, held = survey.modules, _by_memory(survey)
    first = None
    for p in projections:
        for obstacle in survey.hidden:
            if obstacle.hides(p):
                raise obstacle.error
        weight = modules[p.module_path]._parameters[p.tensor]
        assert weight is not None
        if p.read and is_quantised(weight):
            raise TargetError(
                f"{p.path} ({type(weight).__name__}) is quantised, and the model reads this weight itself rather than "
                f"call its layer: there W + dW would have to be formed. Load it unquantised. {leave_out(p.path)}"
            )
        low, high = _DIMENSIONS[p.form]
        if not low <= weight.dim() <= high:
            raise TargetError(
                f"{p.path} ({type(modules[p.module_path]).__name__}) has the shape {tuple(weight.shape)}, which is no "
                f"{p.form}: that has {low if low == high else f'{low} to {high}'} dimensions. {leave_out(p.path)}"
            )
        first = first or (p.path, weight.device)
        if weight.device != first[1] and "meta" not in (weight.device.type, first[1].type):
            raise StateError(
                f"{p.path} is on {weight.device}, {first[0]} on {first[1]}: the adapters of a model share matrices on "
                "one device. Move the model to one device first, or inject into its parts."
            )
        for name, other in held.get(_memory(weight), ()):
            if name != joined(p.module_path, p.tensor) and _overlap(weight, other):
                raise StateError(
                    f"the weight of {p.path} is shared with {name}, which adapting or merging it would change too. "
                    "Give it a weight of its own, nn.Parameter(weight.detach().clone()), or adapt neither: "
                    f"exclude={p.path!r}."
                )


def _check_state(survey: Survey, placed: bool) -> None:
    meta = real = ""
    for path, module in survey.modules.items():
        where, name = shown_path(path, module), type(module).__name__
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            raise StateError(
                f"{where} is a {name} of PEFT. Take PEFT's adapter out first, with merge_and_unload() or unload(), or "
                "inject into a part of the model that has none."
            )
        looked_at = not isinstance(module, torch.jit.ScriptModule) or lies_within(path, survey.heads)
        if not looked_at and any(p.dim() > 1 for p in module.parameters()):
            raise StateError(
                f"{where} is a scripted or traced {module.original_name}, which cannot be looked into. Inject into the "
                "Python model, merge(), and script or trace that."
            )
        for name, p in module._parameters.items():
            if p is None:
                continue
            if is_lazy(p):
                raise StateError(f"{name} of {where} has no shape yet (a lazy module). Run the model on a batch first.")
            meta, real = (meta or joined(path, name), real) if p.is_meta else (meta, real or joined(path, name))
    if placed and meta and real:
        raise StateError(
            f"{meta} is on the meta device, without values, and {real} is not. Load the "
            "weights of the whole model first (to_empty() and load_state_dict()), or inject while all of it is on meta."
        )


def _by_memory(survey: Survey) -> dict[int, list[tuple[str, Tensor]]]:
    """Every parameter under each of its names, by its storage."""
    held: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, place in survey.weights.items():
        held[_memory(place.tensor)].append((name, place.tensor))
    return held


def _memory(p: Tensor) -> int:
    """The same number for tensors in one storage, also on the meta device."""
    if odd_kind(p):
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


def _check_registered(survey: Survey) -> None:
    """Let every registered rule see all modules that it is for. The walk shows it only those that own a weight which
    can be adapted, so a rule for another kind of weight would be passed over."""
    load_shared_rules()
    members: dict[str, dict[str, Candidate]] = defaultdict(dict)
    for candidate in survey.candidates.values() if registered else ():
        for above in ancestors(candidate.path):
            members[above][candidate.path[len(above) :].lstrip(".")] = candidate
    for _, rule in reversed(registered.values()):
        for path, module in survey.modules.items():
            try:
                rule(Unit(path, module, members[path]))
            except ConfigError as error:
                own = {name: p for name, p in module._parameters.items() if p is not None}
                if all(p.dim() < 2 or name in members[path] for name, p in own.items()):
                    raise
                raise TargetError(f"{error}. {shown_path(path, module)} {_holds(module)}. {_FIT}") from error


def _check_paths(survey: Survey, targets: Iterable[str]) -> None:
    """Say of a target that is a path, but of no projection, what is there instead."""
    for term in targets:
        match = TOWER.match(term)
        path = match[2] if match else term
        if not match and tower_named(path, survey.towers):
            continue
        held = held_at(survey.model, path)
        there = path in survey.modules or (held is not None and held.key in held.module._parameters)
        if path in GROUPS or path in ("all", "qv") or not there:
            continue
        findings = list(survey.findings.values())
        named = any(
            path in (f.candidate.path, f"{f.candidate.path}.{role.name}")
            or (role.group not in (CONV, OTHER) and path in (role.name, role.label))
            for f in findings
            for role in f.roles
        )
        if not named:
            raise TargetError(f"{path!r} {_what_is(path, survey, findings)}")


def _what_is(path: str, survey: Survey, findings: list[Finding]) -> str:
    for f in findings:
        candidate, weight = f.candidate, joined(f.candidate.module_path, f.candidate.tensor)
        if path in (candidate.path, weight) and not f.roles:
            out, width = candidate.shape
            return f"({type(candidate.module).__name__}, {out} x {width}) is never adapted: {f.rule}"
        if path == weight and f.roles:
            return f"is the weight of a projection that goes by {candidate.path!r}"
    if any(f.roles and f.candidate.path.startswith(f"{path}.") for f in findings):
        return f"is a {type(survey.modules[path]).__name__}, not a weight; {path + '.*'!r} adapts all that is in it"
    if path in survey.modules:
        return f"{_holds(survey.modules[path])}. {_FIT}"
    held = held_at(survey.model, path)
    assert held is not None
    return f"is {held.key} of a {type(held.module).__name__}, of shape {tuple(held.tensor.shape)}. {_FIT}"


def _holds(module: nn.Module) -> str:
    own = [f"{name} {tuple(p.shape)}" for name, p in module._parameters.items() if p is not None]
    return f"is a {type(module).__name__} with {', '.join(own) or 'no parameter of its own'}"


def check_whole(survey: Survey) -> None:
    """Adapters go into, and out of, models that each process holds as a whole.

    Raises:
        StateError: the model holds DTensors.
    """
    if any(is_sharded(held.tensor) for held in survey.parameters.values()):
        raise StateError(
            "the parameters of this model are spread over processes. Call load() before fully_shard(); to "
            "merge or remove, save() the adapter and load() it into a base that is not sharded."
        )
