"""Putting an adapter into a model and taking it out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .bank import Bank, BankState
from .config import UoraConfig
from .errors import StateError
from .forms import WIDE
from .layers import CHILD, REDUCED, Adapter, adapters_of, is_adapted
from .library import (
    DEFAULT,
    LIBRARY,
    MERGED,
    STATISTICS,
    Entry,
    Layout,
    Library,
    check_not_routing,
    disabled,
    library_of,
    tensors_of,
)
from .plan import Plan, plan
from .quantised import is_quantised
from .reduced import Reduced
from .sharded import is_sharded
from .verify import verify
from .walker import head_names


def inject(
    model: nn.Module,
    config: UoraConfig | None = None,
    *,
    name: str = DEFAULT,
    example_input: Any = None,
    **options: Any,
) -> nn.Module:
    """Adapt a model in place: freeze it, and give every chosen projection its trained vectors.

    The model computes what it did before, since b starts at 0: to the last bit over a float32 or float64 base; over a
    base stored in bfloat16 or float16 to within rounding of that type.

    Args:
        model: of timm, open_clip, transformers or one's own; see `plan` for what would be adapted. It may have adapters
            already: the new one is added under its name and made the active one.
        config: options; the keyword arguments change single ones. See `UoraConfig`.
        name: of the adapter.
        example_input: if given, a trace of it corrects the rules (see `plan`), and `verify` is run on it; the model is
            left as it was when that fails.

    Returns:
        The same model.

    Raises:
        StateError: the model already has an adapter of that name.
        ConfigError, OptionError, TargetError: see `plan`.
        DeadAdapterError: see `verify`.
    """
    library = check_room(model, name)
    active = library.active if library else None
    with disabled(model) if library else nullcontext():
        what = plan(model, config, example_input=example_input, **options)
    apply_plan(model, what, name)
    if example_input is not None:
        try:
            verify(model, example_input)
        except BaseException:
            if library:
                library.switch(model, active)
                del library.entries[name]
            else:
                remove(model)
            raise
    return model


def apply_plan(
    model: nn.Module,
    what: Plan,
    name: str = DEFAULT,
    vector: Tensor | None = None,
    base: dict[str, Tensor] | None = None,
    state: BankState | None = None,
    activate: bool = True,
    bank: Bank | None = None,
) -> Entry:
    """Carry out a plan. Everything that can fail is made before the model is touched.

    Args:
        name: of the adapter.
        vector: its b and d, as `Entry` has them; fresh ones if None.
        base: its trained parts of the base; if None, those that its options name, with the values of the base.
        state: what re-draws made of its bank.
        activate: whether the model computes with it from now on.
        bank: its bank, see `bank_for`.
    """
    config = what.config
    library = model.__dict__.get(LIBRARY) or Library(model)
    layout = _layout(model, library, what)
    weights: list[Any] = [m._parameters[p.tensor] for m, p in zip(layout.modules, layout.projections, strict=True)]
    coarse = [p.path for p, w in zip(what.projections, weights, strict=True) if p.read and w.dtype not in WIDE]
    if coarse:
        warnings.warn(
            f"{len(coarse)} weights ({coarse[0]}, ...) are read by the model itself and stored in a half type: small "
            "updates to them are rounded away. Keep the base in float32 and use torch.autocast.",
            stacklevel=3,
        )
    entry = Entry(config, layout, bank or bank_for(model, what), {}, state or BankState(), vector)
    if activate:
        entry.materialise()
    first = not library.entries
    # Many are added beside others, and a walk over the model takes longer than all the rest.
    held = tensors_of(model) if first or base is None or not base.keys() <= library.base.keys() else {}
    if base is None:
        parts = [n for n in base_parameters(model, config.train) if _trains(n, held[n])]
        parts += [name for name in held if name.endswith(STATISTICS)]
        # The first adapter trains the parts of the base as they stand there; later ones have their own.
        entry.base = {name: held[name] if first else _copy(library.base.get(name, held[name]), True) for name in parts}
    else:
        entry.base = dict(base)
    kept = {name: _copy(held[name]) for name in entry.base if name not in library.base}
    if first:
        model.__dict__[LIBRARY] = library
    try:
        library.base |= kept
        library.entries[name] = entry
        if first:
            for p in held.values():
                if isinstance(p, nn.Parameter) and (p.is_floating_point() or p.is_complex()):
                    p.requires_grad_(False)
        for part in entry.base.values():
            if isinstance(part, nn.Parameter):
                part.requires_grad_(True)
        if activate:
            library.switch(model, name)
    except BaseException:
        del library.entries[name]
        if first:
            take_out(model, library)
        raise
    return entry


def remove(model: nn.Module) -> nn.Module:
    """Take all adapters out without merging: the base as it was, with its own head, its parameters trainable as they
    were."""
    library = library_of(model)
    check_not_routing(library)
    check_whole(model)
    if library.active is not None:
        # In place, since optimizers and tied weights know the base by its tensors.
        parts = library.entries[library.active].base
        if any(t.shape != library.base[name].shape for name, t in parts.items()):
            library.switch(model, None)
        with torch.no_grad():
            for name, t in parts.items() if library.active is not None else ():
                t.copy_(library.base[name])
    return take_out(model, library)


def take_out(model: nn.Module, library: Library) -> nn.Module:
    """The model without adapters, with the head of the active one."""
    library.detach(model)
    del model.__dict__[LIBRARY]
    if CHILD in model._modules:
        delattr(model, CHILD)
    for name, p in model.named_parameters():  # parts without adapters may have been replaced since
        if name in library.flags and (p.is_floating_point() or p.is_complex()):
            p.requires_grad_(library.flags[name])
    return model


def _layout(model: nn.Module, library: Library, what: Plan) -> Layout:
    """That of an adapter which sits at the same places, or a new one."""
    for entry in library.entries.values():
        layout = entry.layout
        if layout.rank == what.config.rank and layout.projections == what.projections:
            return layout
    return Layout.of(model, what.projections, what.config.rank)


def bank_for(model: nn.Module, what: Plan, first: Mapping[str, Tensor] | None = None) -> Bank:
    """The bank of an adapter in the model that draws the same matrices, or a new one.

    Args:
        first: matrices by name to use in place of those that are drawn from the seed.
    """
    widths_in = {p.shape[1] for p in what.projections}
    widths_out = {role.rows for p in what.projections for role in p.roles}
    library = model.__dict__.get(LIBRARY)
    for entry in library.entries.values() if library else ():
        bank = entry.bank
        given = {} if first is None else first
        same = all(torch.equal(bank._first[n], t) for n, t in given.items() if n in bank._first)
        same &= first is not None or not bank.given
        if same and bank.serves(what.config, widths_in, widths_out):
            return bank
    weight: Any = model.get_submodule(what.projections[0].module_path)._parameters[what.projections[0].tensor]
    dtype = torch.float32 if is_quantised(weight) else weight.dtype
    bank = Bank(what.config, widths_in, widths_out, device=weight.device, dtype=dtype, first=first)
    bank.__dict__[REDUCED] = Reduced()
    return bank


def _copy(t: Tensor, trains: bool = False) -> Tensor:
    copy = t.detach().clone()
    return nn.Parameter(copy, requires_grad=trains) if isinstance(t, nn.Parameter) else copy


def _trains(name: str, p: Tensor) -> bool:
    if p.is_floating_point() or p.is_complex():
        return True
    warnings.warn(f"{name} is of {p.dtype} and does not train", stacklevel=4)
    return False


def check_whole(model: nn.Module) -> None:
    """Adapters go into, and out of, models that each process holds as a whole.

    Raises:
        StateError: the model holds DTensors.
    """
    if any(map(is_sharded, model.parameters())):
        raise StateError(
            "the parameters of this model are spread over processes. Call load() before fully_shard(); to "
            "merge or remove, save() the adapter and load() it into a base that is not sharded."
        )


def check_room(model: nn.Module, name: str) -> Library | None:
    """The adapters that a model has already, None if it has none.

    Raises:
        StateError: there is no room for one of that name.
    """
    if LIBRARY in model.__dict__:
        library = library_of(model)
        if name in library.entries:
            raise StateError(
                f"this model already has an adapter {name!r}; add this one under another name=..., or merge() or "
                "remove() what is there"
            )
        return library
    if any(MERGED in m.__dict__ for m in model.modules()):
        raise StateError("the adapters of this model are merged reversibly; unmerge() them first")
    if is_injected(model):
        raise StateError("a part of this model already has an adapter; merge() or remove() it first")
    if hasattr(model, CHILD):
        raise StateError(f"{type(model).__name__} has an attribute {CHILD!r} of its own, where the bank would go")
    return None


def is_injected(model: nn.Module) -> bool:
    return LIBRARY in model.__dict__ or any(is_adapted(m) for m in model.modules())


def bank_of(model: nn.Module) -> Bank:
    """The bank of the active adapter.

    Raises:
        StateError: the model is not injected, or its adapters are disabled.
    """
    return active_entry(model).bank


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The active adapter, by the path of each weight, in the model's order.

    Raises:
        StateError: the model is not injected, or its adapters are disabled.
    """
    active_entry(model)
    return {adapter.name: adapter for m in model.modules() for adapter in adapters_of(m).values()}


def active_entry(model: nn.Module) -> Entry:
    """The active adapter, as the library has it.

    Raises:
        StateError: the model is not injected, or its adapters are disabled.
    """
    library = library_of(model)
    if library.active is None:
        raise StateError("the adapters of this model are disabled; activate() one first")
    return library.entries[library.active]


def base_parameters(model: nn.Module, parts: Iterable[str]) -> list[str]:
    """Names of the base's parameters that belong to `head`, `norm` or `bias`."""
    heads = head_names(model)
    chosen = []
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            in_head = any(full.startswith(head + ".") for head in heads)
            norm = "norm" in type(module).__name__.lower()
            bias = name == "bias" or name.endswith("_bias")
            if ("head" in parts and in_head) or ("norm" in parts and norm) or ("bias" in parts and bias):
                chosen.append(full)
    return chosen
