"""Adapters of earlier format versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..maths.redraw_log import unpack_log
from ..weights.role import Role
from . import strict_json
from .schema import VECTOR_TYPES, check, fields_of, shortened, to_options
from .stored import Identity, Stored, StoredProjection


def from_v2(source: Path, config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]) -> Stored:
    """An adapter of version 2: two tensors per role, and half of the description in either file.

    Raises:
        FormatError: it is damaged.
    """
    try:
        if config["format_version"] != 2:
            raise FormatError(f"the tensors are of version 2, the configuration of {config['format_version']}")
        if strict_json.parse(metadata["config"]) != config.get("config"):
            raise FormatError("its two files are of different adapters, as after a save that was interrupted")
        fields_of("the configuration", config, "format", "format_version", "base", "config", "projections", "versions")
        options = to_options(config["config"])
        entries, versions, base = config["projections"], config["versions"], config["base"]
        if not isinstance(entries, list) or not entries:
            raise FormatError(f"projections must be a list that is not empty, not {shortened(entries)}")
        if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
            raise FormatError(f"versions must map names to versions, not {shortened(versions)}")
        fields_of("base", base, "class", "architecture", "parameter_tensors")
        count, architecture = base["parameter_tensors"], base["architecture"]
        if not isinstance(base["class"], str) or not isinstance(architecture, str | None):
            raise FormatError("class and architecture of the base must be strings")
        if type(count) is not int or count < 1:
            raise FormatError(f"parameter_tensors must be a whole number, not {shortened(count)}")
        projections = tuple(_projection(entry) for entry in entries)
        rest = dict(tensors)
        log = {name: _taken(rest, f"log/{name}", types) for name, types in _LOG.items()}
        names = strict_json.parse(metadata["matrices"]) if "matrices" in metadata else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError("matrices must be a list of names")
        parts = [part for p in projections for part in _vectors(p, rest, options.rank)]
        if odd := [name for name in rest if not name.startswith("base/")]:
            raise FormatError(f"the tensor {shortened(odd[0])} is not in its configuration")
        adapter = Stored(
            options,
            projections,
            torch.cat(parts),
            {name.removeprefix("base/"): t for name, t in rest.items()},
            unpack_log(log, names),
            Identity(base["class"], architecture, None, count),
            versions=versions,
        )
        check(adapter)
    except FormatError as error:
        raise FormatError(f"{source} is damaged: {error}") from error
    return adapter


_LOG = {"entries": (torch.int32,), "alpha": (torch.float64,)}


def _projection(entry: Any) -> StoredProjection:
    fields_of("a projection", entry, "path", "in", "roles")
    path, width, found = entry["path"], entry["in"], entry["roles"]
    if not isinstance(path, str) or type(width) is not int or not isinstance(found, list) or not found:
        raise FormatError(f"{shortened(entry)} is no projection")
    roles = []
    for role in found:
        fields_of("a role", role, "name", "group", "start", "rows", "block", "stride")
        numbers = [role[name] for name in ("start", "rows", "block", "stride")]
        if not all(isinstance(role[name], str) for name in ("name", "group")):
            raise FormatError(f"{shortened(role)} is no role")
        if not all(type(n) is int and n >= 0 for n in numbers):
            raise FormatError(f"{shortened(role)} is no role")
        roles.append(Role(role["name"], role["group"], *numbers))
    return StoredProjection(path, path, width, None, tuple(roles))


def _vectors(p: StoredProjection, tensors: dict[str, Tensor], rank: int) -> list[Tensor]:
    """b of every role, then d of every role."""
    b = [_taken(tensors, f"vectors/{p.path}/{r.name}.b", VECTOR_TYPES, (r.rows,)) for r in p.roles]
    d = [_taken(tensors, f"vectors/{p.path}/{r.name}.d", VECTOR_TYPES, (rank,)) for r in p.roles]
    return b + d


def _taken(
    tensors: dict[str, Tensor], name: str, types: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None
) -> Tensor:
    if name not in tensors:
        raise FormatError(f"{shortened(name)} is missing")
    t = tensors.pop(name)
    if t.dtype not in types or (shape is not None and tuple(t.shape) != shape):
        wanted = f"{'any' if shape is None else shape}, {types[0]}"
        raise FormatError(f"{shortened(name)} has shape {tuple(t.shape)} and type {t.dtype}, expected {wanted}")
    return t
