"""The adapters of one model: any number of them by name, of which one is active.

Only the active adapter is part of the model: its vectors are parameters, its redrawn rows are in the bank, its head is
the model's head. The others wait as plain tensors, beside the base, whose weights are never copied. A switch changes
pointers, and the rows in which the banks of the two differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError, StateError
from ..maths.bank import Bank
from ..maths.redraw_log import BankState
from ..private import TORCH_UNSENT
from ..structure.paths import joined
from ..structure.survey import Survey, held_at
from ..weights.kinds import check_module, is_adapted
from ..weights.sharded import is_sharded
from .adapter import CHILD, Adapter, child, own_matrices
from .banks import check_redraws, house, housed, take_redraws
from .base_buffers import BaseBuffers
from .entry import Entry, holders, replace_tensor
from .fusing import allow_fusing, forbid_fusing
from .inference_mode import outside_inference_mode
from .surgery import adapters_of, attach, detach
from .undo import Undo, is_other_thread


def check_room(survey: Survey, name: str) -> Library | None:
    """The adapters that a model has already, None if it has none.

    Raises:
        StateError: there is no room for one of that name.
        OptionError: this is no model, or no name.
    """
    model = survey.model
    if not isinstance(name, str) or not name:
        raise OptionError(f"the name of an adapter must be a string that is not empty, got {name!r}")
    if LIBRARY in model.__dict__:
        library = library_of(model)
        check_outside(library)
        if name in library.entries:
            raise StateError(
                f"this model already has an adapter {name!r}; add this one under another name=..., or merge() or "
                "remove() what is there"
            )
        return library
    if any(MERGED in m.__dict__ for m in survey.modules.values()):
        raise StateError("the adapters of this model are merged reversibly; unmerge() them first")
    if any(map(is_adapted, survey.modules.values())):
        raise StateError("a part of this model already has an adapter; merge() or remove() it first")
    if hasattr(model, CHILD):
        raise StateError(f"{type(model).__name__} has an attribute {CHILD!r} of its own, where the bank would go")
    return None


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

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> for path, adapter in uora.adapters(model).items():
        ...     print(path, tuple(adapter.b.shape), tuple(adapter.d.shape))
        self_attn.in_proj_weight (48,) (3, 4)
        self_attn.out_proj (16,) (1, 4)
        linear1 (32,) (1, 4)
        linear2 (16,) (1, 4)
    """
    return adapters_in(Survey(model))


def adapters_in(survey: Survey) -> dict[str, Adapter]:
    """See `adapters`."""
    active_entry(survey.model)
    return {adapter.name: adapter for m in survey.modules.values() for adapter in adapters_of(m).values()}


def active_entry(model: nn.Module) -> Entry:
    """The active adapter, as the library has it.

    Raises:
        StateError: the model is not injected, or its adapters are disabled.
    """
    library = library_of(model)
    if library.active is None:
        raise StateError("the adapters of this model are disabled; activate() one first")
    return library.entries[library.active]


LIBRARY = "_uora_library"
"""Attribute of an injected model that holds its `Library`."""

MERGED = "_uora_merged"
"""Attribute of a model that was merged reversibly; see `merge.Merged`."""

DEFAULT = "default"
"""Name of an adapter that was given none."""


class Library:
    """All adapters of a model.

    Args:
        survey: of a model that has none yet.
    """

    def __init__(self, survey: Survey) -> None:
        self.entries: dict[str, Entry] = {}
        self.active: str | None = None
        self.base_parts: dict[str, Tensor] = {}
        """The base's own values of the parts that some adapter trains."""
        self.buffers = BaseBuffers(survey)
        self.flags = {name: held.tensor.requires_grad for name, held in survey.parameters.items()}
        self.unsent: set[str] = set()
        self.hooks: tuple[Any, ...] = ()
        """On loading a state dict."""
        self.contexts: list[Any] = []
        """Those that are open, the innermost last."""
        self.owner: int | None = None
        """The thread that switches: what it computes with must not change under it."""
        self.broken = False
        self.patterns: dict[Any, Any] = {}
        """What routing found out about the inputs of layers, by kind of call."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles belong to no thread, and no `with disabled(...)` ends for them."""
        return {**self.__dict__, "owner": None, "contexts": [c for c in self.contexts if c.kind == "route"]}

    @property
    def routing(self) -> bool:
        return any(context.kind == "route" for context in self.contexts)

    def undo(self, model: nn.Module, *names: str | None) -> Undo:
        """`with library.undo(model, name):` what is done inside is done wholly or not at all.

        Args:
            names: of the adapters that are put in or taken out besides the active one.
        """
        entries = [self.entries[n] for n in {self.active, *names} if n in self.entries]
        modules = [m for e in entries for m in (e.bank, *(e.modules or ()))]
        return Undo(Survey(model), [self, *entries, *modules]).or_break(self)

    @outside_inference_mode
    def switch(self, model: nn.Module, name: str | None) -> None:
        """Make an adapter the active one, or none; to be called inside `undo`."""
        old = self.entries[self.active] if self.active is not None else None
        new = self.entries[name] if name is not None else None
        if old is new:
            return
        survey, modules = Survey(model), new.materialise() if new else ()
        self._swap_banks(model, old, new)
        if new and not new.settled:
            for module in modules:
                module.take_own()
            new.settled = True
        if old and new and old.placement is new.placement:
            for p, owner, module in zip(new.placement.projections, new.placement.modules, modules, strict=True):
                owner._modules[child(p.tensor)] = module
        else:
            if old:
                self.detach(survey)
            if new:
                self.attach(model, new, modules)
        self._swap_parts(survey, old.parts if old else {}, new.parts if new else {})
        if old:
            old.turns.end()
        if new:
            new.turns.begin(first=len(self.entries) == 1)
        self.active = name

    def attach(self, model: nn.Module, entry: Entry, modules: tuple[Any, ...]) -> None:
        """Put modules of an entry's placement where its adapters sit."""
        placement = entry.placement
        for p, owner, module in zip(placement.projections, placement.modules, modules, strict=True):
            attach(owner, p.tensor, module, p.read)
        forbid_fusing(model, (p.module_path for p in placement.projections))
        self.hooks = (
            model.register_load_state_dict_pre_hook(check_redraws),
            model.register_load_state_dict_post_hook(take_redraws),
        )
        self.keep_from_sending(model)

    def detach(self, survey: Survey) -> None:
        """Take out whatever sits in the model."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = ()
        for module in survey.modules.values():
            allow_fusing(module)
            detach(module)
        model = survey.model
        left = set(getattr(model, TORCH_UNSENT, ())) - self.unsent
        if left:
            setattr(model, TORCH_UNSENT, left)
        elif hasattr(model, TORCH_UNSENT):
            delattr(model, TORCH_UNSENT)

    def values(self, entry: Entry) -> Mapping[str, Tensor]:
        """The base's parts as this entry has them."""
        return {name: entry.parts.get(name, value) for name, value in self.base_parts.items()}

    def state(self, entry: Entry) -> BankState:
        """What redraws made of an entry's bank."""
        active = self.active is not None and self.entries[self.active] is entry
        return entry.bank.state() if active else entry.state

    def _swap_banks(self, model: nn.Module, old: Entry | None, new: Entry | None) -> None:
        if old:
            old.state = old.bank.swap(new.state if new and new.bank is old.bank else BankState())
        if new and (old is None or new.bank is not old.bank):
            new.bank.swap(new.state)
        if new:
            if old is None or (old.bank, old.placement) != (new.bank, new.placement):
                new.bank.layers = own_matrices(new.modules or ())
            device = next(p.device for m in new.placement.modules for p in m._parameters.values() if p is not None)
            house(model, new.bank.to(device), new.modules or ())
            new.bank.config = new.config
        elif isinstance(model._modules.get(CHILD), Bank):
            del model._modules[CHILD]

    def _swap_parts(self, survey: Survey, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
        if not (changed := old.keys() | new.keys()):
            return
        there = {name: held_at(survey.model, name) for name in changed}
        if gone := [name for name, held in there.items() if held is None]:
            raise StateError(
                f"an adapter trains {gone[0]} of the base, which this {type(survey.model).__name__} has no more: put "
                "it back, or delete() the adapter"
            )
        tensors = {name: held.tensor for name, held in there.items() if held is not None}
        for name in changed:
            if isinstance(tensors[name], nn.Parameter) and name in new and not isinstance(new[name], nn.Parameter):
                new[name] = nn.Parameter(new[name])
        values = {name: new.get(name, self.base_parts[name]) for name in changed}
        different = [name for name, value in values.items() if value is not tensors[name]]
        for name, places in holders(survey, different).items() if different else ():
            for module, key in places:
                replace_tensor(module, key, values[name])

    def keep_from_sending(self, model: nn.Module) -> None:
        """Tell DistributedDataParallel to leave the matrices alone: by default it sends every buffer of the first
        process to the others before each forward, and every process makes and redraws its own, equal ones."""
        path, bank = housed(model)
        names = {joined(path, name) for name, _ in bank.named_buffers()}
        there = set(getattr(model, TORCH_UNSENT, ()))
        self.unsent |= names - there
        setattr(model, TORCH_UNSENT, there | names)


def library_of(model: nn.Module) -> Library:
    """The adapters of an injected model.

    Raises:
        StateError: there are none.
    """
    check_module(model)
    library = model.__dict__.get(LIBRARY)
    if MERGED in model.__dict__:
        raise StateError(f"the adapters of this {type(model).__name__} are merged reversibly; unmerge() it first")
    if not isinstance(library, Library):
        inside = [path for path, m in model.named_modules() if path and LIBRARY in m.__dict__]
        hint = f"a part of it has; pass that, model.{inside[0]}" if inside else "call inject() or load() on it first"
        raise StateError(f"this {type(model).__name__} has no adapter; {hint}")
    if library.broken:
        raise StateError(
            f"an operation on the adapters of this {type(model).__name__} was interrupted and could not be undone, so "
            "what it computes is not known. load() its adapters into a fresh base."
        )
    return library


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


def check_owner(library: Library) -> None:
    """Whether adapters may be moved by this thread.

    Raises:
        StateError: another one computes with them.
    """
    if is_other_thread(library.owner):
        raise StateError(
            "another thread has switched the adapters of this model, and computes with them. Switch in one thread, or "
            "give each its own copy.deepcopy(model)."
        )


def check_outside(library: Library) -> None:
    """Whether adapters may be added, merged and taken out now.

    Raises:
        StateError: a context has them out of the model, or another thread computes with them.
    """
    check_owner(library)
    check_not_routing(library)
    if library.contexts:
        raise StateError("the adapters of this model are disabled; leave `with disabled(...)` first")


def check_not_routing(library: Library) -> None:
    """Whether adapters may be moved now: inside `route` they are all out of the model."""
    if library.routing:
        raise StateError("a mixed batch is being routed; leave `with route(...)` first")


def strangers(survey: Survey, library: Library) -> list[str]:
    """What trains beside the active adapter and is no part of it: the base's value of it is not known."""
    if library.active is None:
        return []
    entry = library.entries[library.active]
    mine = {id(p) for module in entry.modules or () for p in module.parameters()} | set(map(id, entry.parts.values()))
    trained = ((name, held.tensor) for name, held in survey.parameters.items() if held.tensor.requires_grad)
    return [name for name, p in trained if id(p) not in mine]


def renew_parts(survey: Survey, entry: Entry) -> None:
    """What was put in the place of a part of the active adapter is its part from then on, as the new head is that
    `reset_classifier` of timm makes; what was taken out is none."""
    for name, tensor in list(entry.parts.items()):
        held = held_at(survey.model, name)
        if held is None:
            del entry.parts[name]
        elif held.tensor is not tensor:
            entry.parts[name] = held.tensor


def check_movable(survey: Survey, library: Library) -> None:
    """Whether the active adapter can be taken out, and put back as it was."""
    check_owner(library)
    check_not_routing(library)
    if library.active is not None:
        renew_parts(survey, library.entries[library.active])
    if any(is_sharded(held.tensor) for held in survey.parameters.values()):
        raise StateError("adapters cannot be switched while the model is spread over processes")


def check_switch(survey: Survey, library: Library) -> None:
    """Whether another adapter can become the active one."""
    check_movable(survey, library)
    if strange := strangers(survey, library):
        raise StateError(
            f"{strange[0]} trains, but not as a part of the adapter {library.active!r}, so it could not be told what "
            "the base has there. Freeze it, or inject with train=('head', 'norm', 'bias') as needed."
        )
