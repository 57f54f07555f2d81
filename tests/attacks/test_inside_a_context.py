"""Whatever is done inside `disabled()` or `route()` works or is refused at the call; the model is then as before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from redrawn import Net, X
from torch import Tensor, nn

import uora_vision as uora

Change = Callable[[nn.Module, Path], Any]
CHANGES: dict[str, Change] = {
    "merge": lambda m, _: uora.merge(m),
    "unmerge": lambda m, _: uora.unmerge(m),
    "remove": lambda m, _: uora.remove(m),
    "delete the active one": lambda m, _: uora.delete(m, "b"),
    "delete another": lambda m, _: uora.delete(m, "a"),
    "activate": lambda m, _: uora.activate(m, "a"),
    "inject": lambda m, _: uora.inject(m, rank=4, targets="all", name="c"),
    "inject again": lambda m, _: uora.inject(m, rank=4, targets="all", name="b"),
    "load": lambda m, folder: uora.load(m, folder, name="c"),
    "load beside": lambda m, folder: uora.load(m, folder, name="c", activate=False),
    "save": lambda m, folder: uora.save(m, folder / "other"),
    "inform": lambda m, _: uora.inform(m, [X], lambda model, x: model(x).square().mean()),
    "strength": lambda m, _: uora.strength(m, 0.5, "b"),
    "redraw": lambda m, _: uora.Reinitializer(m, threshold=10.0).step(),
}
CONTEXTS: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "disabled": uora.disabled,
    "route": lambda m: uora.route(m, list("ababababab"[: len(X)])),
}


def two(folder: Path) -> nn.Module:
    """A model with "a" and "b", which is active; `folder` has an adapter of another one."""
    model = Net()
    for seed, name in enumerate("abc"):
        uora.inject(model, rank=4, targets="all", name=name, seed=seed)
        torch.manual_seed(seed)
        for adapter in uora.adapters(model).values():
            nn.init.normal_(adapter.b, std=0.3)
    uora.save(model, folder)
    uora.activate(model, "b")
    uora.delete(model, "c")
    return model


def answers(model: nn.Module) -> dict[str, Tensor]:
    """What each adapter and the base compute, and which is active."""
    found = {}
    active = uora.active_adapter(model)
    for name in uora.adapter_names(model):
        uora.activate(model, name)
        found[name] = model(X).detach()
    uora.activate(model, active)
    with uora.disabled(model):
        found["base"] = model(X).detach()
    return found | {"active": found[str(active)]}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change(change: str, context: str, tmp_path: Path) -> None:
    model = two(tmp_path)
    want = answers(model)
    with CONTEXTS[context](model):
        inside = model(X).detach()
        try:
            CHANGES[change](model, tmp_path)
        except uora.StateError:
            pass
        else:  # only what leaves all that is there alone may work, and to activate where nothing is active
            assert change in ("load beside", "save") or (change, context) == ("activate", "disabled")
        assert torch.equal(model(X), want["a"] if (change, context) == ("activate", "disabled") else inside)
    found = answers(model)
    found.pop("c", None)
    assert found.keys() == want.keys() and all(torch.equal(found[name], t) for name, t in want.items())


@pytest.mark.parametrize("first", CONTEXTS)
@pytest.mark.parametrize("second", CONTEXTS)
def test_an_error_of_the_user_comes_out_as_it_is(first: str, second: str, tmp_path: Path) -> None:
    model = two(tmp_path)
    want, error = answers(model), KeyError("of the user")
    with pytest.raises(KeyError) as raised:  # noqa: SIM117
        with CONTEXTS[first](model):
            try:
                within = CONTEXTS[second](model)
                within.__enter__()
            except uora.StateError:
                raise error from None
            try:
                raise error
            finally:
                within.__exit__(KeyError, error, None)
    assert raised.value is error
    found = answers(model)
    assert all(torch.equal(found[name], t) for name, t in want.items())
