"""What a bad day does to files: masks, devices, wrappers, other models, buffers that move."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

import pytest
import torch
from redrawn import Net, made, out
from torch import nn

import uora_vision as uora
from uora_vision.storage.folder import read_folder
from uora_vision.storage.snapshot import put_back


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_follow_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        uora.save(made(), tmp_path / "a")
    finally:
        assert os.umask(old) == mask
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "a").iterdir()} == {mode}


def test_what_save_would_refuse_is_refused_when_it_is_asked_for() -> None:
    with pytest.raises(uora.ConfigError, match="below"):
        uora.inject(Net(), rank=4, targets="all", seed=2**63)
    for alpha in (lambda n: n + 1.5, lambda n: n * float("nan"), lambda _: torch.ones(1)):
        model = made()
        reinit = uora.Reinitializer(model, alpha=alpha)
        for adapter in uora.adapters(model).values():
            adapter.d.data[:, 1:3] = 0
        with pytest.raises(uora.ConfigError, match=r"shares in \[0, 1\]"):
            reinit.step()
        assert not model.uora.log


def test_what_was_found_out_about_another_model_is_refused(tmp_path: Path) -> None:
    uora.save(made(), tmp_path)
    with pytest.raises(uora.StateError, match="another model"):
        uora.load(Net(), tmp_path, base=uora.Base(Net()))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, nn.Sequential])
def test_inside_a_wrapper_the_message_says_what_to_pass(wrap: type, tmp_path: Path) -> None:
    model = made()
    wrapped = wrap(model)
    path = next(n for n, m in wrapped.named_modules() if m is model)
    for call in (
        lambda m: uora.save(m, tmp_path),
        uora.adapters,
        uora.merge,
        uora.summary,
        uora.remove,
        uora.Reinitializer,
    ):
        with pytest.raises(uora.StateError, match=f"pass that, model.{path}"):
            call(wrapped)


def test_an_adapter_lives_under_another_default_device(tmp_path: Path) -> None:
    base = Net()
    with torch.device("meta"):
        model = uora.inject(base, rank=4, targets="all")
    for adapter in uora.adapters(model).values():
        nn.init.constant_(adapter.b, 0.3)
        adapter.d.data[:, 1:3] = 0
    for scope in ("shared", "layer"):
        with torch.device("meta"):
            reinit = uora.Reinitializer(model, scope=scope)
            assert reinit.step() == 8
        with torch.device("cpu"):
            want = out(model)
        with torch.device("meta"):
            state, kept = model.state_dict(), reinit.state_dict()
            model.load_state_dict(state)
            reinit.load_state_dict(kept)
        assert torch.equal(out(model), want)


class Centred(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(12))
        self.register_buffer("cache", torch.zeros(12), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - self.center)


def test_buffers_that_moved_are_saved_and_others_are_not(tmp_path: Path) -> None:
    model = uora.inject(Centred(), rank=4, targets="all")
    uora.save(model, tmp_path / "still")
    model.center += 1
    model.cache += 1
    want = out(model)
    uora.save(model, tmp_path / "moved")
    assert {"center", "cache"} & read_folder(tmp_path / "still").parts.keys() == set()
    assert {"center", "cache"} & read_folder(tmp_path / "moved").parts.keys() == {"center"}
    assert torch.equal(out(uora.load(Centred(), tmp_path / "moved")), want)
    for name, value in (("still", 0), ("moved", 1)):
        put_back(model, read_folder(tmp_path / name))
        assert (model.center == value).all()


class Queued(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.arange(2**20 + 7, dtype=torch.float32).clone())
        self.register_buffer("table", torch.ones(2**21, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.queue[-1]


@pytest.mark.parametrize("how", ["one number", "rows change places", "another tensor"])
@pytest.mark.slow
def test_large_buffers_that_moved_are_saved_too(how: str, tmp_path: Path) -> None:
    model = uora.inject(Queued(), rank=4, targets="all")
    uora.save(model, tmp_path / "still")
    model.queue, model.table = model.queue.clone(), model.table.clone()  # as .to() makes them
    if how == "one number":
        model.queue[-1] += 1
    elif how == "rows change places":
        model.queue[-2:] = model.queue[-2:].flip(0)
    else:
        model.queue = model.queue * 2
    want = out(model)
    uora.save(model, tmp_path / "moved")
    assert {"queue", "table"} & read_folder(tmp_path / "still").parts.keys() == set()
    assert {"queue", "table"} & read_folder(tmp_path / "moved").parts.keys() == {"queue"}
    again = uora.load(Queued(), tmp_path / "moved")
    assert torch.equal(out(again), want) and torch.equal(again.queue, model.queue)
    with pytest.raises(uora.FormatError, match="queue has moved since"):
        put_back(model, read_folder(tmp_path / "still"))
    put_back(uora.inject(Queued(), rank=4, targets="all"), read_folder(tmp_path / "moved"))


def test_large_buffers_that_were_cast_are_told(tmp_path: Path) -> None:
    model = uora.inject(Queued(), rank=4, targets="all").double()
    with pytest.warns(uora.UoraWarning, match=r"1 large buffers of the base \(queue\)"):
        uora.save(model, tmp_path)


@pytest.mark.parametrize("idle", ["no b", "no d", "one d", "a head", "statistics"])
def test_an_adapter_that_changes_nothing_is_told(idle: str, tmp_path: Path) -> None:
    model = made(train="head")
    for adapter in uora.adapters(model).values():
        (adapter.d if idle == "no d" else adapter.b).data.zero_()
    if idle == "one d":
        next(iter(uora.adapters(model).values())).b.data[3] = 0.1
    elif idle == "a head":
        model.head.bias.data[0] += 1
    elif idle == "statistics":
        model.norm.running_mean += 1
    uora.save(model, tmp_path)
    before, after = Net(), Net()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        uora.load(after, tmp_path)
    assert torch.equal(out(before), out(after)) == bool(told) == (idle in ("no b", "no d"))
    assert all("changes no output" in str(one.message) for one in told)


def test_weights_that_were_unfrozen_by_hand_come_back(tmp_path: Path) -> None:
    model = made()
    for p in (model.blocks[0][0].weight, model.norm.weight, model.blocks[1][2].bias):
        p.requires_grad_(True)
        p.data += 0.1
    uora.save(model, tmp_path)
    again = uora.load(Net(), tmp_path)
    assert torch.equal(out(again), out(model)) and again.blocks[0][0].weight.requires_grad
    uora.save(again, tmp_path / "again")
    assert torch.equal(out(uora.load(Net(), tmp_path / "again")), out(model))
    other = Net()
    other.blocks[1][0].weight.data += 0.1
    with pytest.raises(uora.FormatError, match="other weights"):
        uora.load(other, tmp_path)
