"""A checkpoint is whole or it is the one before, and brings back everything that a run changes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from common.training import checkpoint
from common.training.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from torch import nn


def test_round_trip(tmp_path: Path) -> None:
    state = {"step": 3, "model": {"w": torch.randn(2, 3)}, "history": [{"loss": 0.5, "none": None}]}
    write_checkpoint(tmp_path / "new" / "c.pt", state)
    found = read_checkpoint(tmp_path / "new" / "c.pt")
    assert torch.equal(found["model"]["w"], state["model"]["w"])
    assert (found["step"], found["history"]) == (3, state["history"])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.pt"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file_says_so(tmp_path: Path, share: float) -> None:
    path = tmp_path / "c.pt"
    write_checkpoint(path, {"w": torch.randn(1000)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)


def test_missing_and_foreign_files_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "c.pt")
    torch.save({"model": {}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this recipe"):
        read_checkpoint(tmp_path / "c.pt")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", 99)
        write_checkpoint(tmp_path / "c.pt", {})
    with pytest.raises(CheckpointError, match="version 99"):
        read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failure_while_writing_leaves_the_last_one(
    tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    write_checkpoint(path, {"step": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="disk full"):
            write_checkpoint(path, {"step": 2})
    assert read_checkpoint(path)["step"] == 1
    write_checkpoint(path, {"step": 3})
    assert read_checkpoint(path)["step"] == 3


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_kill_at_any_moment_of_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    path, recipes = tmp_path / "c.pt", Path(checkpoint.__file__).parents[2]
    code = f"""
import sys; sys.path.insert(0, {str(recipes)!r})
import itertools, torch
from pathlib import Path
from common.training.checkpoint import write_checkpoint
for step in itertools.count():
    write_checkpoint(Path({str(path)!r}), {{"step": step, "w": torch.full((1_000_000,), float(step))}})
"""
    chance = random.Random(0)
    for _ in range(3):
        path.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", code]) as child:
            while not path.exists() and child.poll() is None:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            child.send_signal(signal.SIGKILL)
        found = read_checkpoint(path)
        assert (found["w"] == found["step"]).all()


def test_random_state_comes_back_for_all_generators() -> None:
    torch.rand(1), np.random.rand(1), random.gauss(0, 1)
    state = checkpoint.random_state()
    first = (torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random())
    checkpoint.set_random_state(state)
    assert (torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random()) == first


def test_changing_state_is_what_trains_and_saved_buffers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    state = checkpoint.changing_state(model)
    assert {name.split(".")[0] for name in state} == {"1", "2"}
    assert "1.running_mean" in state
    saved = {name: value.clone() for name, value in state.items()}
    model(torch.randn(8, 2)).sum().backward()
    with torch.no_grad():
        model[2].weight.add_(1)
    checkpoint.load_changing_state(model, saved)
    assert all(torch.equal(value, saved[name]) for name, value in checkpoint.changing_state(model).items())


def test_state_of_another_model_is_refused(make_vit: Callable[..., nn.Module]) -> None:
    state = checkpoint.changing_state(make_vit())
    with pytest.raises(CheckpointError, match="another model or method"):
        checkpoint.load_changing_state(make_vit(embed_dim=32), state)
