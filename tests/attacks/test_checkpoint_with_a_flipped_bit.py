"""One bit of a recipe's checkpoint is not what was written: the run is not resumed to other weights in silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common.errors import CheckpointError
from common.training.checkpoint import read_checkpoint, write_checkpoint
from common.training.trainer import DIGESTS, digests_of, last_whole

FLIPS = 300


def flips(path: Path, count: int = FLIPS):
    """The file with one bit flipped, at places from its first to its last byte; it is whole again afterwards."""
    whole = path.read_bytes()
    for place in np.linspace(0, 8 * len(whole) - 1, count).astype(int).tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        yield place
    path.write_bytes(whole)


def test_of_our_own_loop(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    state = {"model": {"b": torch.randn(50), "d": torch.randn(20)}, "progress": {"step": 3, "loss": 0.5}}
    write_checkpoint(path, state)
    for place in flips(path):
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(path)
            pytest.fail(f"bit {place} can be flipped")
    assert torch.equal(read_checkpoint(path)["model"]["b"], state["model"]["b"])


def test_of_the_trainer_of_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-7"
    (folder / "adapter").mkdir(parents=True)
    torch.save({"state": torch.randn(30)}, folder / "optimizer.pt")
    (folder / "adapter" / "x.safetensors").write_bytes(bytes(range(200)))
    (folder / DIGESTS).write_text(json.dumps(digests_of(folder)))
    assert last_whole(tmp_path) == folder
    for file in filter(Path.is_file, sorted(folder.rglob("*"))):
        for place in flips(file, 40):
            with pytest.raises(CheckpointError, match="damaged"):
                last_whole(tmp_path)
                pytest.fail(f"bit {place} of {file.name} can be flipped")
    assert last_whole(tmp_path) == folder


def test_a_checkpoint_that_was_not_finished_is_none(tmp_path: Path) -> None:
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"state")
    with pytest.raises(CheckpointError, match="needs a whole checkpoint"):
        last_whole(tmp_path)
    done = tmp_path / "checkpoint-9"
    (done / DIGESTS).write_text(json.dumps(digests_of(done)))
    assert last_whole(tmp_path) == done
