"""One reading of a model, which all that is done in one call shares."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..weights.kinds import check_module
from .candidates import Candidate, find_candidates
from .heads import Parts, head_names
from .hidden import Hidden, find_hidden, plain_copy
from .paths import joined, submodule
from .towers import find_towers
from .walk import Finding, walk


class Held(NamedTuple):
    """A parameter or buffer by its place: the tensor there may be another one later.

    Args:
        module: that holds it.
        key: its name in the module.
    """

    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        parameters = self.module._parameters
        tensor = parameters[self.key] if self.key in parameters else self.module._buffers[self.key]
        assert tensor is not None
        return tensor


class Survey:
    """What is in a model. Every part is found out when it is first asked for, and once: the tree of modules is walked a
    single time. It holds as long as the modules of the model do not change.

    Args:
        model: with or without adapters.

    Raises:
        OptionError: this is no model.
    """

    def __init__(self, model: nn.Module) -> None:
        check_module(model)
        self.model = model

    @classmethod
    def of(cls, model: nn.Module | Survey) -> Survey:
        """That of a model, or one that there is already."""
        return model if isinstance(model, Survey) else cls(model)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module once, by path, in the model's order."""
        return dict(self.model.named_modules())

    @cached_property
    def weights(self) -> dict[str, Held]:
        """Every parameter; a tied one under the name that each of its modules has for it."""
        return {
            joined(path, key): Held(module, key)
            for path, module in self.modules.items()
            for key, p in module._parameters.items()
            if p is not None
        }

    @cached_property
    def parameters(self) -> dict[str, Held]:
        """Every parameter once, under the first of its names, as `named_parameters` has them."""
        return _each_once(self.weights)

    @cached_property
    def buffers(self) -> dict[str, Held]:
        """Every buffer once, as `named_buffers` has them."""
        found = {
            joined(path, key): Held(module, key)
            for path, module in self.modules.items()
            for key, t in module._buffers.items()
            if t is not None
        }
        return _each_once(found)

    @cached_property
    def tensors(self) -> dict[str, Held]:
        """Parameters and buffers."""
        return self.parameters | self.buffers

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """The heads by name alone; saved adapters count parameters besides these. See `parts` for what trains."""
        return head_names(self.model, self.modules)

    @cached_property
    def hidden(self) -> tuple[Hidden, ...]:
        """Everything that hides a weight, in the model's order."""
        return tuple(find_hidden(self.modules))

    @cached_property
    def shown(self) -> Survey:
        """The model as the rules can look at it: this one or, where something is hidden, that of a stand-in on the meta
        device that has the same paths and classes and shows it."""
        scripted = any(isinstance(module, torch.jit.ScriptModule) for module in self.modules.values())
        return Survey(plain_copy(self.model, {})) if self.hidden or scripted else self

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        """Every weight that could be adapted, by path, in the model's order; those that nothing hides."""
        return {candidate.path: candidate for candidate in find_candidates(self.modules)}

    @cached_property
    def findings(self) -> dict[str, Finding]:
        """What the rules say of each candidate, by path."""
        return {finding.candidate.path: finding for finding in self._walked[0]}

    @cached_property
    def towers(self) -> dict[str, tuple[str, str]]:
        """The tower of each weight that could be adapted; see `find_towers`."""
        return find_towers(self.modules, (path for path, f in self.shown.findings.items() if f.roles))

    def tower(self, path: str) -> str:
        """The name of the tower that a weight is in; empty for one in none."""
        return self.towers.get(path, ("", ""))[0]

    @property
    def parts(self) -> Parts:
        """What heads there are; see `find_parts`."""
        return self.shown._walked[1]

    @cached_property
    def _walked(self) -> tuple[tuple[Finding, ...], Parts]:
        return walk(self.model, list(self.candidates.values()), self.modules)


def held_at(model: nn.Module, name: str) -> Held | None:
    """The parameter or buffer of a name, found without a walk; None if there is none."""
    path, _, key = name.rpartition(".")
    module = submodule(model, path)
    if module is None:
        return None
    # By `in`: the registers of scripted modules have no `get`.
    there = any(key in tensors and tensors[key] is not None for tensors in (module._parameters, module._buffers))
    return Held(module, key) if there else None


def _each_once(held: dict[str, Held]) -> dict[str, Held]:
    first: dict[int, str] = {}
    for name, place in held.items():
        first.setdefault(id(place.tensor), name)
    return {name: held[name] for name in first.values()}
