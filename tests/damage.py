"""Damaging saved adapters, and what must come of it: an error of ours and an untouched model, or the same weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from golden import DATA, golden_model, state
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision.storage import folder as files
from uora_vision.storage.base import Base
from uora_vision.storage.folder import CONFIG_FILE, TENSOR_FILE

Place = tuple[str | int, ...]


class Target:
    """A model into which damaged adapters are loaded, and what the undamaged one gives."""

    def __init__(self, folder: Path) -> None:
        self.expected = state(uora.load(golden_model(), folder))
        self._renew()

    def _renew(self) -> None:
        self.model: nn.Module = golden_model()
        self.base = Base(self.model)
        self.before = snapshot(self.model)

    def outcome(self, folder: Path, unsealed: bool = False) -> str:
        """`refused` or `same`; anything else fails.

        Args:
            unsealed: of version 2, which has no checksum: a changed number cannot be told, and gives `other`.
        """
        try:
            uora.load(self.model, folder, base=self.base)
        except (uora.FormatError, uora.StateError) as error:
            text = str(error)
            assert text and "\n" not in text.strip() and len(text) < 700, text
            assert_same(self.before, self.model)
            return "refused"
        loaded = state(self.model)
        same = loaded.keys() == self.expected.keys() and all(t.equal(self.expected[name]) for name, t in loaded.items())
        assert same or unsealed, "other weights were loaded"
        self._renew()
        return "same" if same else "other"


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / TENSOR_FILE, framework="pt") as file:
        return file.metadata()


def rewrite(
    folder: Path,
    config: Callable[[dict[str, Any]], Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
    metadata: Callable[[dict[str, str]], Any] | None = None,
    seal: bool = True,
) -> None:
    """Change the tensor file, and give it the checksum that belongs to what it holds now."""
    values, info = load_file(folder / TENSOR_FILE), metadata_of(folder)
    if config is not None:
        described = json.loads(info["config"])
        config(described)
        info["config"] = json.dumps(described)
    if tensors is not None:
        tensors(values)
    if seal:
        info["sha256"] = files._PENDING
    if metadata is not None:
        metadata(info)
    content = to_bytes(values, info)
    (folder / TENSOR_FILE).write_bytes(files._seal(content) if seal else content)


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every field of a JSON value; of lists, the first and the last entry."""
    if at:
        yield at
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*at, name))
    elif isinstance(value, list):
        for i in sorted({0, len(value) - 1} if value else ()):
            yield from places(value[i], (*at, i))


def look(value: Any, at: Place) -> Any:
    for key in at:
        value = value[key]
    return value


def put(value: Any, at: Place, new: Any) -> None:
    look(value, at[:-1])[at[-1]] = copy.deepcopy(new)


def drop(value: Any, at: Place) -> None:
    del look(value, at[:-1])[at[-1]]


OLD = json.loads((DATA / "adapter_v2" / CONFIG_FILE).read_text())
JUNK: list[Any] = [
    None, True, -1, 0, 1, 3, 7, 2**31, 2**63, 10**400, 2.5, -0.0, 1e308, "q", "0" * 32, "f" * 512, [], [1], [[]], {},
    {"a": 1},
]  # fmt: skip
