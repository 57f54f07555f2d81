"""Where the bank sits in a model, and what a state dict says of its redraws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import warn
from ..maths.bank import Bank
from ..structure.paths import joined
from .adapter import CHILD, Adapter


def house(model: nn.Module, bank: Bank, modules: Sequence[nn.Module]) -> None:
    """Make a bank a child of the model, so that it moves with it; of the first adapter, where the children of the model
    are the members of a container, or where the model is the adapted layer itself and has its adapter of that name."""
    whole = any(isinstance(m, Adapter) and m.name == "" for m in modules)
    if whole or isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        modules[0]._modules["shared"] = bank
    else:
        model._modules[CHILD] = bank
    bank.follow([m for m in modules if isinstance(m, Adapter)] if bank.by_path else ())


def housed(model: nn.Module) -> tuple[str, Bank]:
    """The path of the bank in a model, and the bank."""
    bank = model._modules.get(CHILD)
    if isinstance(bank, Bank):
        return CHILD, bank
    return next((path, m) for path, m in model.named_modules() if isinstance(m, Bank))


def check_redraws(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: whether its redraws are some of this model's banks.

    Raises:
        FormatError, StateError: see `Carried.read_extra_state`.
    """
    path, bank = housed(model)
    name = f"{prefix}{joined(path, '_extra_state')}"
    if name in state:
        bank.read_extra_state(state[name])
    elif any(f"{prefix}{at}.b" in state for at, m in model.named_modules() if isinstance(m, Adapter)):
        warn(
            f"this state dict holds vectors of an adapter but not its redraws ({name}): if directions were redrawn in "
            "the model that it is of, this one computes something else. Keep that key, or use save() and load()."
        )


def take_redraws(model: nn.Module, _: Any) -> None:
    """After a state dict was loaded: a compiled forward does not look whether there are other redraws."""
    for module in model.modules():
        if isinstance(module, Adapter):
            module.settle()
