"""The adapters of one model: any number of them by name, of which one is active.

Only the active adapter is part of the model: its vectors are parameters, its re-drawn rows are in the bank, its head is
the model's head. The others wait as plain tensors, beside the base, whose weights are never copied. A switch changes
pointers, and the rows in which the banks of the two differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .bank import Bank, BankState
from .config import UoraConfig
from .errors import StateError
from .fusing import allow_fusing, forbid_fusing
from .layers import CHILD, Adapter, attach, child, detach
from .plan import Projection
from .sharded import is_sharded

LIBRARY = "_uora_library"
"""Attribute of an injected model that holds its `Library`."""
MERGED = "_uora_merged"
"""Attribute of a model that was merged reversibly; see `merge.Merged`."""
DEFAULT = "default"
"""Name of an adapter that was given none."""
STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")
"""Ends of the names of buffers that training moves even in a frozen base."""
TORCH_UNSENT = "_ddp_params_and_buffers_to_ignore"
"""Where DistributedDataParallel looks for names of tensors that it shall not send."""


@dataclass(eq=False)
class Layout:
    """Where the adapters of one plan sit; shared by all adapters of that plan.

    Args:
        projections: the adapted weights.
        rank: of the adapters.
        modules: the module that holds each.
        sizes: lengths of b and d of each, alternating, as they follow one another in an adapter's vector.
    """

    projections: tuple[Projection, ...]
    rank: int
    modules: tuple[nn.Module, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, projections: tuple[Projection, ...], rank: int) -> Layout:
        modules = dict(model.named_modules())
        lengths = ((sum(role.rows for role in p.roles), len(p.roles) * rank) for p in projections)
        owners = tuple(modules[p.module_path] for p in projections)
        return cls(projections, rank, owners, tuple(itertools.chain.from_iterable(lengths)))


@dataclass(eq=False)
class Entry:
    """One adapter.

    Args:
        config: its options.
        layout: where it sits.
        bank: its shared matrices, in common with all adapters that draw the same ones.
        base: the parts of the base that it trained, by name.
        state: what re-draws made of the bank; of the active adapter, the bank itself has it.
        vector: every b and d, one after the other, float32; None once `modules` hold them.
        modules: made when it is first active, and kept, so that an optimizer still finds its parameters.
        settled: whether the modules have taken over their own rows.
    """

    config: UoraConfig
    layout: Layout
    bank: Bank
    base: dict[str, Tensor]
    state: BankState = field(default_factory=BankState)
    vector: Tensor | None = None
    modules: tuple[Adapter, ...] | None = None
    settled: bool = False

    def values(self) -> Tensor:
        """Every b and d, one after the other: (parameters,)."""
        if self.vector is not None:
            return self.vector
        return torch.cat([t.detach().flatten() for module in self.modules or () for t in (module.b, module.d)])

    def materialise(self) -> tuple[Adapter, ...]:
        """Its modules, on the device of the weights that they adapt."""
        if self.modules is None:
            self.modules = tuple(
                Adapter(
                    p.path,
                    p.roles,
                    p.shape[1],
                    self.bank,
                    p.form,
                    self.config.d_init,
                    self.config.dropout,
                    self.config.token_sampling,
                    origin=p.origin,
                )
                for p in self.layout.projections
            )
            if self.vector is not None:
                parts = iter(self.vector.split(self.layout.sizes))
                for module in self.modules:
                    module.b.data = next(parts)
                    module.d.data = next(parts).view_as(module.d)
                self.vector = None
        for module, owner, p in zip(self.modules, self.layout.modules, self.layout.projections, strict=True):
            weight = owner._parameters[p.tensor]
            assert weight is not None
            if module.b.device != weight.device:
                module.to(weight.device)
            module.training = owner.training
        return self.modules


class Library:
    """All adapters of a model.

    Args:
        model: has none yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.entries: dict[str, Entry] = {}
        self.active: str | None = None
        self.base: dict[str, Tensor] = {}
        """The base's own values of the parts that some adapter trains."""
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.unsent: set[str] = set()
        self.routing = False
        self.patterns: dict[tuple[str, int], Any] = {}
        """What routing found out about the inputs of layers: see `probe.find_patterns`."""
        self.probed: dict[str, set[str]] = {}
        """Of modules that were called with a batch: the layers in them that it looked at."""

    def switch(self, model: nn.Module, name: str | None) -> None:
        """Make an adapter the active one, or none. What can fail is done before the model is touched."""
        old = self.entries[self.active] if self.active is not None else None
        new = self.entries[name] if name is not None else None
        if old is new:
            return
        modules = new.materialise() if new else ()
        self._swap_banks(model, old, new)
        if new and not new.settled:
            for module in modules:
                module.take_own()
            new.settled = True
        if old and new and old.layout is new.layout:
            for p, owner, module in zip(new.layout.projections, new.layout.modules, modules, strict=True):
                owner._modules[child(p.tensor)] = module
        else:
            self.detach(model)
            self.attach(model, new, modules)
        self._swap_base(model, old.base if old else {}, new.base if new else {})
        self.active = name

    def attach(self, model: nn.Module, entry: Entry | None, modules: tuple[Any, ...]) -> None:
        """Put modules of an entry's layout where its adapters sit."""
        layout = entry.layout if entry else None
        for p, owner, module in zip(*(layout.projections, layout.modules, modules), strict=True) if layout else ():
            attach(owner, p.tensor, module, p.read)
        if layout:
            forbid_fusing(model, (p.module_path for p in layout.projections))
            self._keep_from_sending(model)

    def detach(self, model: nn.Module) -> None:
        """Take out whatever sits in the model."""
        allow_fusing(model)
        for module in model.modules():
            detach(module)
        left = set(getattr(model, TORCH_UNSENT, ())) - self.unsent
        if left:
            setattr(model, TORCH_UNSENT, left)
        elif hasattr(model, TORCH_UNSENT):
            delattr(model, TORCH_UNSENT)

    def values(self, entry: Entry) -> Mapping[str, Tensor]:
        """The base's parts as this entry has them."""
        return {name: entry.base.get(name, value) for name, value in self.base.items()}

    def state(self, entry: Entry) -> BankState:
        """What re-draws made of an entry's bank."""
        active = self.active is not None and self.entries[self.active] is entry
        return entry.bank.state() if active else entry.state

    def _swap_banks(self, model: nn.Module, old: Entry | None, new: Entry | None) -> None:
        if old:
            old.state = old.bank.swap(new.state if new and new.bank is old.bank else BankState())
        if new and (old is None or new.bank is not old.bank):
            new.bank.swap(new.state)
        if new:
            device = next(p.device for m in new.layout.modules for p in m._parameters.values() if p is not None)
            if model._modules.get(CHILD) is not new.bank:
                model.add_module(CHILD, new.bank.to(device))
            new.bank.config = new.config

    def _swap_base(self, model: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        if not (changed := old.keys() | new.keys()):
            return
        there = tensors_of(model)
        for name in changed:
            if isinstance(there[name], nn.Parameter) and name in new and not isinstance(new[name], nn.Parameter):
                new[name] = nn.Parameter(new[name])
        values = {name: new.get(name, self.base[name]) for name in changed}
        different = [name for name, value in values.items() if value is not there[name]]
        for name, places in holders(model, different).items():
            for module, key in places:
                place(module, key, values[name])

    def _keep_from_sending(self, model: nn.Module) -> None:
        """Tell DistributedDataParallel to leave the matrices alone: by default it sends every buffer of the first
        process to the others before each forward, and every process makes and re-draws its own, equal ones."""
        names = {f"{CHILD}.{name}" for name, _ in model.get_submodule(CHILD).named_buffers()}
        for path, module in model.named_modules():
            if isinstance(module, Adapter):
                # Those that a re-draw in the scope `layer` will give it.
                names |= {f"{path}.own_{part}_{k}" for k in range(len(module.roles)) for part in ("index", "a", "b")}
        there = set(getattr(model, TORCH_UNSENT, ()))
        self.unsent = names - there
        setattr(model, TORCH_UNSENT, there | names)


def holders(model: nn.Module, names: Iterable[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every module that holds the parameter or buffer of a name, tied ones under each of their names, and what it is
    called there."""
    there = tensors_of(model)
    found: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names}
    wanted = {id(there[name]): name for name in found}
    for module in model.modules():
        for key, t in tensors_of(module, recurse=False).items():
            if id(t) in wanted:
                found[wanted[id(t)]].append((module, key))
    return found


def tensors_of(module: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters(recurse=recurse)), **dict(module.named_buffers(recurse=recurse))}


def place(module: nn.Module, key: str, value: Tensor) -> None:
    """Put a tensor where another of that name was. The head of another number of classes has another width."""
    old = module._parameters.get(key, module._buffers.get(key))
    if old is not None and value.device != old.device:
        value.data = value.to(old.device)
    (module._parameters if key in module._parameters else module._buffers)[key] = value  # type: ignore[assignment]
    if key == "weight" and isinstance(module, nn.Linear) and value.dim() == 2:
        module.out_features = len(value)


def library_of(model: nn.Module) -> Library:
    """The adapters of an injected model.

    Raises:
        StateError: there are none.
    """
    library = model.__dict__.get(LIBRARY)
    if MERGED in model.__dict__:
        raise StateError(f"the adapters of this {type(model).__name__} are merged reversibly; unmerge() it first")
    if not isinstance(library, Library):
        raise StateError(f"this {type(model).__name__} has no adapter; call inject() or load() on it first")
    return library


def adapter_names(model: nn.Module) -> list[str]:
    """Names of a model's adapters, in the order in which they came.

    Raises:
        StateError: the model is not injected.
    """
    return list(library_of(model).entries)


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter, None while all are disabled.

    Raises:
        StateError: the model is not injected.
    """
    return library_of(model).active


def activate(model: nn.Module, name: str) -> nn.Module:
    """Make another adapter the active one: the one that computes, trains and is saved.

    Its parameters are objects of their own: make a new optimizer and `Reinitializer` for it, or use those of its last
    training. Those of the adapter that was active stay valid for when it is active again.

    Returns:
        The same model.

    Raises:
        StateError: the model is not injected, has no adapter of that name, is spread over processes, or trains parts of
            the base that its active adapter does not know of.
    """
    library = library_of(model)
    known_name(library, name)
    check_switch(model, library)
    library.switch(model, name)
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is the base, with its own head: `with disabled(model): model(x)`.

    Raises:
        StateError: as for `activate`.
    """
    library = library_of(model)
    check_switch(model, library)
    active = library.active
    library.switch(model, None)
    try:
        yield model
    finally:
        library.switch(model, active)


def delete(model: nn.Module, name: str) -> nn.Module:
    """Forget an adapter that is not active. `remove` takes out all.

    Returns:
        The same model.

    Raises:
        StateError: the model is not injected, has no adapter of that name, or it is active.
    """
    library = library_of(model)
    known_name(library, name)
    if library.active == name:
        raise StateError(f"the adapter {name!r} is active; activate() another one first, or remove() all")
    del library.entries[name]
    return model


def known_name(library: Library, name: str) -> Entry:
    """The adapter of a name.

    Raises:
        StateError: there is none.
    """
    if name not in library.entries:
        there = list(library.entries)
        shown = ", ".join(map(repr, there[:8])) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
        raise StateError(f"there is no adapter {name!r}; there are {shown}")
    return library.entries[name]


def check_not_routing(library: Library) -> None:
    """Whether adapters may be moved now: inside `route` they are all out of the model."""
    if library.routing:
        raise StateError("a mixed batch is being routed; leave `with route(...)` first")


def check_switch(model: nn.Module, library: Library) -> None:
    """Whether the active adapter can be taken out and put back."""
    check_not_routing(library)
    if any(map(is_sharded, model.parameters())):
        raise StateError("adapters cannot be switched while the model is spread over processes")
    if library.active is None:
        return
    entry = library.entries[library.active]
    mine = {id(p) for module in entry.modules or () for p in module.parameters()} | set(map(id, entry.base.values()))
    strange = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in mine]
    if strange:
        raise StateError(
            f"{strange[0]} trains, but not as a part of the adapter {library.active!r}, so it could not be told what "
            "the base has there. Freeze it, or inject with train=('head', 'norm', 'bias') as needed."
        )
