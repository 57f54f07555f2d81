"""States of a run that lack a field, or have another in its place, are refused, with nothing of them taken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common.errors import CheckpointError
from common.training.checkpoint import read_checkpoint, write_checkpoint
from damage import JUNK, drop, places, put
from redrawn import Net, X, made, out
from torch import nn

import uora_vision as uora
from uora_vision.integrations.state import (
    changing_state,
    frozen_names,
    keep_missing_base,
    load_changing_state,
    read_saved,
    rows_of,
)  # fmt: skip


def redrawn(scope: Any) -> tuple[nn.Module, uora.Reinitializer]:
    model = made()
    for adapter in uora.adapters(model).values():
        adapter.d.data[:, 1:3] = 0
    reinit = uora.Reinitializer(model, scope=scope)
    assert reinit.step() == 8
    return model, reinit


@pytest.mark.parametrize("scope", ["shared", "layer"])
@pytest.mark.slow
def test_of_a_reinitializer(scope: Any) -> None:
    state = redrawn(scope)[1].state_dict()
    model = uora.inject(Net(), rank=4, targets="all")
    reinit = uora.Reinitializer(model, scope=scope)
    before, want = reinit.state_dict(), out(model)
    junk = [*JUNK, torch.zeros(3), torch.zeros(0, 5, dtype=torch.int32), torch.tensor(-1)]
    lacking = [copy.deepcopy(state) for _ in places(state)]
    for at, one in zip(places(state), lacking, strict=True):
        drop(one, at)
    other: list[Any] = [*lacking, *JUNK]
    for at in places(state):
        for value in junk:
            one = copy.deepcopy(state)
            put(one, at, value)
            same = at == ("banks", "seed") and repr(value) == "0"
            if not same and not (at == ("steps",) and type(value) is int and 0 < value < 2**31):
                other.append(one)
    for name, change in (("counts", -1), ("history", -1), ("history", 100)):
        other.append({**state, name: state[name] * 0 + change})
    for one in other:
        with pytest.raises(uora.FormatError):
            reinit.load_state_dict(one)
    assert torch.equal(out(model), want) and str(reinit.state_dict()) == str(before)
    reinit.load_state_dict(state)
    assert reinit.firings == 8 and reinit.steps == 1


def test_of_what_trains() -> None:
    state = changing_state(redrawn("layer")[0])
    model = uora.inject(Net(), rank=4, targets="all")
    want = out(model)
    others: list[Callable[[torch.Tensor], Any]] = [
        lambda t: None,
        lambda t: [1],
        lambda t: t[..., None],
        lambda t: t.to(torch.int8 if t.is_floating_point() else torch.half),
    ]
    for name in state:
        damaged = [{n: t for n, t in state.items() if n != name}, *({**state, name: f(state[name])} for f in others)]
        for one in damaged:
            with pytest.raises(uora.FormatError, match="of another model or method"):
                load_changing_state(model, one)
    for one in JUNK:
        with pytest.raises(uora.FormatError):
            load_changing_state(model, one)
    assert torch.equal(out(model), want)


def test_of_informed_rows() -> None:
    model = uora.inject(Net(), rank=4, targets="all")
    uora.inform(model, [X], lambda model, x: model(x).square().mean())
    state, fresh = changing_state(model), uora.inject(Net(), rank=4, targets="all")
    name = next(name for name in state if ".rows/" in name)
    for value in (None, state[name][:2], state[name][:, :3], state[name].double(), state[name] * torch.inf):
        with pytest.raises(uora.FormatError, match="none of this adapter"):
            load_changing_state(fresh, {**state, name: value})
    other = name.replace("blocks", "others")
    with pytest.raises(uora.FormatError, match="none of this adapter"):
        load_changing_state(fresh, {n if n != name else other: t for n, t in state.items()})
    load_changing_state(fresh, state)
    assert torch.equal(out(fresh), out(model))


@pytest.mark.parametrize("strict", [True, False])
def test_of_a_checkpoint_of_lightning(strict: bool) -> None:
    trained = uora.inject(Net(), rank=4, targets="all")
    uora.inform(trained, [X], lambda model, x: model(x).square().mean())
    for adapter in uora.adapters(trained).values():
        adapter.d.data[:, 1] = 0
    uora.Reinitializer(trained).step()
    frozen = frozen_names(trained)
    state = {f"net.{n}": t for n, t in trained.state_dict().items() if n not in frozen}
    state |= {f"net.{n}": t for n, t in rows_of(trained).items()}
    wrapper = nn.ModuleDict({"net": uora.inject(Net(), rank=4, targets="all")})
    keep_missing_base(wrapper["net"])
    want, own = out(wrapper["net"]), wrapper["net"].state_dict()
    others: list[Callable[[torch.Tensor], Any]] = [lambda t: None, lambda t: t[..., None]]
    for name in state:
        damaged = [{**state, name: f(state[name])} for f in others]
        if strict and ".rows/" not in name:
            damaged.append({n: t for n, t in state.items() if n != name})
        for one in damaged:
            with pytest.raises(uora.FormatError):
                wrapper.load_state_dict(one, strict=strict)
    assert torch.equal(out(wrapper["net"]), want) and not rows_of(wrapper)
    assert all(torch.equal(t, own[n]) for n, t in wrapper["net"].state_dict().items())
    wrapper.load_state_dict(state, strict=strict)
    assert torch.equal(out(wrapper["net"]), out(trained))


def test_of_a_recipe(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint.pt", {"total": 3})
    assert read_checkpoint(tmp_path / "checkpoint.pt", ["total"])["total"] == 3
    with pytest.raises(CheckpointError, match="lacks model, progress"):
        read_checkpoint(tmp_path / "checkpoint.pt", ["total", "model", "progress"])


def test_of_the_callback_of_transformers(tmp_path: Path) -> None:
    from uora_vision.integrations.transformers import REINIT_FILE, UoraCallback

    model, reinit = redrawn("shared")
    callback, args = UoraCallback(), SimpleNamespace(output_dir=str(tmp_path), run_name=None)
    callback.reinit = uora.Reinitializer(model)
    whole = {
        "d": torch.cat([a.d.detach().flatten() for a in uora.adapters(model).values()]),
        "reinit": reinit.state_dict(),
    }
    for one in ({"d": whole["d"]}, {"reinit": whole["reinit"]}, {**whole, "d": None}, [1]):
        torch.save(one, tmp_path / REINIT_FILE)
        with pytest.raises(uora.FormatError, match="lacks d or reinit"):
            callback._load(model, [tmp_path], args, 1)  # type: ignore[arg-type]
    torch.save(whole, tmp_path / REINIT_FILE)
    content = (tmp_path / REINIT_FILE).read_bytes()
    for damaged in (b"", content[:-40], b"\x80\x04." + content, b"no file of torch"):
        (tmp_path / REINIT_FILE).write_bytes(damaged)
        with pytest.raises(uora.FormatError, match="damaged, or was not written by"):
            read_saved(tmp_path / REINIT_FILE)
    (tmp_path / REINIT_FILE).write_bytes(content)
    callback._load(model, [tmp_path], args, 1)  # type: ignore[arg-type]
    assert callback.reinit.steps == 1
