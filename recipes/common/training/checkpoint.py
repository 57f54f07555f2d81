"""One file that holds all of a training run, written so that a crash at any moment leaves a whole one behind."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from uora_vision.errors import FormatError
from uora_vision.integrations.state import changing_state
from uora_vision.integrations.state import load_changing_state as _load_changing_state

from ..errors import CheckpointError

__all__ = [
    "changing_state", "load_changing_state", "random_state", "read_checkpoint", "set_random_state", "write_checkpoint",
]  # fmt: skip

VERSION = 3
END = b"uora-vision sha256 "
"""Stands before the digest of all bytes above it, with which a file ends."""


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values), replacing an older file only once the new one is on disk.

    A digest is the file's end: torch does not look at the checksums of what it loads.
    """
    content = io.BytesIO()
    torch.save({"version": VERSION, **state}, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        file.write(content.getbuffer())
        file.write(END + hashlib.sha256(content.getbuffer()).digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    if os.name == "posix":  # the new name is on disk only when the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def read_checkpoint(path: Path, fields: Iterable[str] = ()) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote.

    Args:
        fields: that it must have.

    Raises:
        CheckpointError: there is no file, or it is damaged, or something else.
    """
    if not path.is_file():
        raise CheckpointError(f"--resume needs {path}, which does not exist; start the run without --resume")
    content = path.read_bytes()
    whole, end = content[: -len(END) - 32], content[-len(END) - 32 :]
    if not end.startswith(END):
        raise CheckpointError(f"{path} is damaged or not a checkpoint of this recipe; delete it and start again")
    if hashlib.sha256(whole).digest() != end[len(END) :]:
        raise CheckpointError(f"{path} is damaged: its content is not what was written; delete it and start again")
    state = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    if state.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {state.get('version')}, this recipe reads version {VERSION}")
    if lacking := [name for name in fields if name not in state]:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)}: it is not of this recipe; start again")
    return state


def load_changing_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Inverse of `changing_state`.

    Raises:
        CheckpointError: the model has other trained parameters.
    """
    try:
        _load_changing_state(model, state)
    except FormatError as error:
        raise CheckpointError(str(error)) from error


def random_state() -> dict[str, Any]:
    """State of the generators of torch, numpy and python."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {**state, "python": random.getstate()}


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
