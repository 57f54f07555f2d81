"""What the integrations share: which part of a model changes, when an optimizer has stepped, and how a run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import FormatError, StateError
from ..lifecycle.adapter import CHILD
from ..lifecycle.banks import check_redraws
from ..lifecycle.informing import informed_rows, put_informed_rows
from ..lifecycle.library import adapters, library_of
from ..maths.bank import Bank
from ..private import run_first
from ..storage.folder import read_folder
from ..storage.snapshot import put_back
from ..structure.paths import joined
from ..weights.sharded import whole

ROWS = f"{CHILD}.rows/"
"""Begins the names of informed rows among the tensors of a state: the weight, a slash and the matrix follow."""


def injected_in(module: nn.Module) -> nn.Module:
    """The injected model inside a wrapper: a LightningModule, DistributedDataParallel, a compiled module.

    Raises:
        StateError: there is none, or more than one.
    """
    found = [m for _, m in _injected(module)]
    if len(found) != 1:
        raise StateError(
            f"{type(module).__name__} holds {len(found)} models with an adapter, not one; call inject() or load() "
            "before training starts"
        )
    return found[0]


def trained_d(model: nn.Module) -> Tensor:
    """Every d of an injected model in one vector on the CPU, to tell two states of a run apart."""
    return torch.cat([whole(adapter.d).detach().flatten().cpu() for adapter in adapters(model).values()])


def frozen_names(model: nn.Module) -> set[str]:
    """The names in a model's state_dict of what does not train, with the parts of a packed weight."""
    # A tied weight is in the state_dict under each of its names.
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {n for n in model.state_dict() if n in frozen or any(n[:i] in frozen for i in _dots(n))}


def changing_state(model: nn.Module) -> dict[str, Tensor]:
    """All that training can change: trained parameters, saved buffers and informed rows, by name."""
    frozen = frozen_names(model)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items() if name not in frozen}
    return state | rows_of(model)


def rows_of(module: nn.Module) -> dict[str, Tensor]:
    """Informed rows of the injected models in a module, as tensors of its state."""
    found = {}
    for path, model in _injected(module):
        held = informed_rows(model)
        for origin, name in held.get("names", {}).items():
            found[joined(path, f"{ROWS}{origin}/{name}")] = held["rows"][name]
    return found


@contextmanager
def _with_rows(module: nn.Module, state: dict[str, Any], prefix: str = "") -> Iterator[None]:
    """Give the injected models in a module the informed rows of a state, which then holds them no more; if what is done
    inside fails, they have their own again."""
    with ExitStack() as stack:
        for path, model in _injected(module):
            stack.enter_context(library_of(model).undo(model))
            begin = prefix + joined(path, ROWS)
            found = {name.removeprefix(begin): state.pop(name) for name in list(state) if name.startswith(begin)}
            if found:
                names = dict(name.rsplit("/", 1) for name in found)
                rows = {name.rpartition("/")[2]: tensor for name, tensor in found.items()}
                put_informed_rows(model, {"names": names, "rows": rows})
        yield


def _injected(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, m) for path, m in module.named_modules() if isinstance(m._modules.get(CHILD), Bank)]


def load_changing_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Inverse of `changing_state`.

    Raises:
        FormatError: the model has other trained parameters, or the state is not whole.
    """

    if not isinstance(state, dict):
        raise FormatError(f"the checkpoint holds a {type(state).__name__} in place of trained tensors by name")
    both = changing_state(model), state
    wanted, found = ({n: _kind(n, t) for n, t in of.items() if ROWS not in n} for of in both)
    if wanted != found:
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise FormatError(f"the checkpoint is of another model or method: {odd[0]} differs, and {len(odd) - 1} more")
    state = dict(state)
    with _with_rows(model, state):
        model.load_state_dict(state, strict=False)


def read_saved(path: Path) -> Any:
    """What torch.save wrote of tensors and plain values.

    Raises:
        FormatError: it is damaged, or something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever reading a zip, a pickle or a tensor gives
        raise FormatError(f"{path} is damaged, or was not written by torch.save: {type(error).__name__}") from error


def keep_missing_base(model: nn.Module) -> RemovableHandle:
    """Let load_state_dict, a strict one too, take informed rows, and leave frozen weights that the state lacks.

    Its FormatError for a state of another model comes before anything of the model is changed.
    """

    def fill(module: nn.Module, state: dict[str, Any], prefix: str, _: Any, strict: bool, *__: Any) -> None:
        held, frozen = module.state_dict(), frozen_names(module)
        for name in held:
            if prefix + name in state and _kind(name, state[prefix + name]) != _kind(name, held[name]):
                raise FormatError(f"the checkpoint is of another model or method: {prefix}{name} differs")
            if strict and prefix + name not in state and name not in frozen:
                raise FormatError(f"the checkpoint is of another model or method: it has no {prefix}{name}")
        with _with_rows(module, state, prefix):
            check_redraws(module, state, prefix)
        for name in frozen:
            state.setdefault(prefix + name, held[name])

    return run_first(model.register_load_state_dict_pre_hook(fill))  # before redraws are looked at


def restore(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put what `save` wrote back into a model that has this adapter already: vectors, trained base and banks.

    Raises:
        StateError: the model is not injected, or is spread over processes.
        FormatError: the file is missing, damaged, or of another adapter.
    """
    put_back(model, read_folder(folder))


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside those that Accelerate, Lightning and DeepSpeed wrap around it."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def after_step(optimizer: Any, call: Callable[[], Any]) -> Callable[[], None]:
    """Have `call` run after each step that the optimizer takes: not after one that a gradient scaler skips.

    Returns:
        Call it to end this.
    """
    depth = 0

    def before(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def after(stepped: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal depth
        depth -= 1  # a step that calls its parent class's step runs the hooks of both
        # A fused optimizer is called for a skipped step too, and skips it on the device.
        overflow = getattr(stepped, "found_inf", None)
        if depth == 0 and (overflow is None or not overflow.item()):
            call()

    inner = innermost(optimizer)
    handles = [inner.register_step_pre_hook(before), inner.register_step_post_hook(after)]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _kind(name: str, t: Any) -> object:
    """What two states of one model have in common."""
    if not isinstance(t, Tensor):
        return type(t)
    # An extra state grows with its content.
    return t.is_floating_point(), t.dim() if name.endswith("_extra_state") else t.shape


def _dots(name: str) -> list[int]:
    return [i for i, letter in enumerate(name) if letter == "."]
