"""The description of a saved adapter: its fields, read strictly and written."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import UoraConfig
from ..errors import FormatError
from ..maths.redraw_log import GIVEN, check_log, draw_counts, pack_log, unpack_log
from ..weights.matrix import disjoint
from ..weights.role import ATTENTION, CONV, MLP, OTHER, Role
from .sections import SECTIONS, check_sections, read_sections
from .stored import Identity, Stored, StoredProjection

FORMAT = "uora_vision"

FORMAT_VERSION = 4

VECTORS, LOG, ENTRIES, ALPHA, BASE, ROWS, SHARED = (
    "vectors", "log/", "log/entries", "log/alpha", "base/", "banks/rows", "banks/shared",
)  # fmt: skip
"""Names of tensors in the file; `base/` is the beginning of the names of trained parts of the base, `log/` of those of
the log, of which `GIVEN` are there only with given rows."""

VECTOR_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Types that b and d can have: float32, unless the adapted model was converted as a whole."""

LIMIT = 2**31
"""No width, row or step reaches this."""

_KEY = re.compile(rf"(?:([0-9]{{1,9}})/)?({ATTENTION}|{MLP}|{CONV}|{OTHER})\.([\w-]{{1,200}})")


def to_config(stored: Stored) -> dict[str, Any]:
    """The description of an adapter, for JSON. `from_config` is its inverse."""
    i, names = stored.identity, pack_log(stored.log)[1]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": stored.versions,
        "base": {
            "class": i.class_name,
            "architecture": i.architecture,
            "name": i.name,
            "parameter_tensors": i.parameter_tensors,
            "fingerprint": i.fingerprint,
            "sketch": None if i.sketch is None else _pack_sketch(i.sketch),
        },
        "config": stored.config.to_dict(),
        "projections": [_to_entry(p) for p in stored.projections],
        "matrices": names,
        "bank_fingerprint": stored.bank_fingerprint,
        "trained": sorted(stored.parts),
        **{name: section.value for name, section in stored.sections.items()},
    }


def to_tensors(stored: Stored) -> dict[str, Tensor]:
    """The tensors of an adapter, by their name in the file."""
    log, _ = pack_log(stored.log)
    tensors = {VECTORS: stored.vector, ENTRIES: log["entries"], ALPHA: log["alpha"]}
    tensors |= {f"{BASE}{name}": t for name, t in stored.parts.items()}
    tensors |= {f"{name}/{key}": t for name, part in stored.sections.items() for key, t in part.tensors.items()}
    optional = {ROWS: stored.rows, SHARED: stored.shared} | {f"{LOG}{name}": log.get(name) for name in GIVEN}
    tensors |= {name: t for name, t in optional.items() if t is not None}
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def from_config(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Stored:
    """A saved adapter from its description and its tensors, all that needs no model checked.

    Raises:
        FormatError: something is missing, of another type, out of range, or does not fit the rest.
    """
    new = config["format_version"] > 3
    fields_of(
        "the configuration", config, "format", "format_version", "versions", "base", "config", "projections",
        "matrices", "bank_fingerprint", *(("trained",) if new else ()),
        optional=tuple(SECTIONS) if new else (),
    )  # fmt: skip
    options = to_options(config["config"])
    projections = _from_entries(json.dumps(config["projections"]))
    versions = config["versions"]
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise FormatError(f"versions must map names to versions, not {shortened(versions)}")
    rest = dict(tensors)
    for name, dtype, dims in ((VECTORS, None, 1), (ENTRIES, torch.int32, 2), (ALPHA, torch.float64, 1)):
        if name not in rest:
            raise FormatError(f"the tensor {name} is missing")
        _check_tensor(name, rest[name], dtype, dims)
    vector, log_tensors = rest.pop(VECTORS), {"entries": rest.pop(ENTRIES), "alpha": rest.pop(ALPHA)}
    log_tensors |= {name: rest.pop(f"{LOG}{name}") for name in GIVEN if f"{LOG}{name}" in rest}
    rows, shared = rest.pop(ROWS, None), rest.pop(SHARED, None)
    sections = read_sections(config, rest) if new else {}
    names = config["matrices"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(f"matrices must be a list of names, not {shortened(names)}")
    base = {}
    for name, t in rest.items():
        if not name.startswith(BASE) or name == BASE:
            raise FormatError(f"the tensor {shortened(name)} is not in its configuration")
        base[name.removeprefix(BASE)] = t
    trained = config.get("trained")
    if trained is not None:
        if not isinstance(trained, list) or not all(isinstance(name, str) for name in trained):
            raise FormatError(f"trained must be a list of names, not {shortened(trained)}")
        if odd := sorted(set(trained) ^ base.keys()):
            raise FormatError(f"its tensors are not those that it declares as trained: {shortened(odd[0])}")
    stored = Stored(
        options,
        projections,
        vector,
        base,
        unpack_log(log_tensors, names),
        _identity(config["base"]),
        _hex(config["bank_fingerprint"], "bank_fingerprint"),
        rows,
        shared,
        versions,
        None if trained is None else tuple(trained),
        sections,
    )
    check(stored)
    return stored


def check(stored: Stored) -> None:
    """Whether the parts of a saved adapter fit each other.

    Raises:
        FormatError: they do not.
    """
    rank, projections = stored.config.rank, stored.projections
    length = sum(p.length(rank) for p in projections)
    if len(stored.vector) != length:
        raise FormatError(
            f"vectors holds {len(stored.vector):,} numbers; the projections at rank {rank:,} need {length:,}"
        )
    _check_rows(projections)
    for name, t in (("vectors", stored.vector), *((BASE + name, t) for name, t in stored.parts.items())):
        if not t.isfinite().all():
            raise FormatError(f"{_where(stored, name)} holds NaN or infinite values")
    check_sections(stored)
    if stored.log:
        check_log(stored.log, rank, stored._widths())
    if stored.shared is not None and stored.rows is None:
        raise FormatError(f"{SHARED} is there without {ROWS}")
    if stored.rows is not None:
        _check_saved_rows(ROWS, stored.rows, _row_numbers(stored))
    if stored.shared is not None:
        _check_saved_rows(SHARED, stored.shared, rank * sum(stored.drawn.values()))


def to_options(values: Any) -> UoraConfig:
    """The options of an adapter.

    Raises:
        FormatError: they are none.
    """
    known = UoraConfig().to_dict()
    if isinstance(values, dict):
        values = {"token_sampling": 1} | values  # the one option that adapters of format 3 can be without
    fields_of("config", values, *known)
    for name in ("rank", "seed", "token_sampling"):
        if type(values[name]) is not int or not 0 <= values[name] < 2**63:
            raise FormatError(f"{name} must be a whole number, not {shortened(values[name])}")
    for name in ("d_init", "dropout"):
        if type(values[name]) not in (int, float) or not -LIMIT < values[name] < LIMIT:
            raise FormatError(f"{name} must be a number, not {shortened(values[name])}")
    for name in ("targets", "exclude", "train"):
        if not isinstance(values[name], list):
            raise FormatError(f"{name} must be a list of strings, not {shortened(values[name])}")
    if not isinstance(values["blocks"], list | None):
        raise FormatError(f"blocks must be a list of numbers or null, not {shortened(values['blocks'])}")
    if not all(isinstance(values[name], str) for name in ("layout", "init")):
        raise FormatError("layout and init must be strings")
    try:
        return UoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise FormatError(str(error)) from error


@lru_cache(maxsize=8)
def _check_rows(projections: tuple[StoredProjection, ...]) -> None:
    """Whether the roles of each projection can lie in one weight."""
    for p in projections:
        for role in p.roles:
            if role.rows < 1 or (role.block and (role.rows % role.block or role.stride < role.block)):
                raise FormatError(f"{shortened(p.path)} cannot have {role}")
        if p.rows >= LIMIT or not 0 < p.width < LIMIT:
            raise FormatError(f"{shortened(p.path)} cannot have {p.rows} rows of {p.width}")
        spans = sorted(role.span for role in p.roles)
        apart = all(one.end <= two.start for one, two in itertools.pairwise(spans))
        if not apart and not disjoint(spans):
            raise FormatError(f"the roles of {shortened(p.path)} share rows")
        if len({role.name for role in p.roles}) < len(p.roles):
            raise FormatError(f"two roles of {shortened(p.path)} have one name")


def _to_entry(p: StoredProjection) -> dict[str, Any]:
    roles = []
    for key, role in zip(p.keys, p.roles, strict=True):
        runs = {"block": role.block, "stride": role.stride} if role.block or role.stride else {}
        roles.append({"key": key, "start": role.start, "rows": role.rows, **runs})
    origin = {} if p.origin == p.path else {"origin": p.origin}
    return {"path": p.path, **origin, "in": p.width, "roles": roles}


@lru_cache(maxsize=8)
def _from_entries(text: str) -> tuple[StoredProjection, ...]:
    """The projections from JSON: once for a thousand adapters of the same weights."""
    entries = json.loads(text)
    if not isinstance(entries, list) or not entries:
        raise FormatError(f"projections must be a list that is not empty, not {shortened(entries)}")
    projections = tuple(_from_entry(entry) for entry in entries)
    for name in ("path", "origin"):
        count = Counter(getattr(p, name) for p in projections)
        if twice := [value for value, n in count.items() if n > 1]:
            raise FormatError(f"two projections have the {name} {shortened(twice[0])}")
    return projections


def _from_entry(entry: Any) -> StoredProjection:
    fields_of("a projection", entry, "path", "in", "roles", optional=("origin",))
    path, width, found = entry["path"], entry["in"], entry["roles"]
    origin = entry.get("origin", path)
    if not isinstance(path, str) or not isinstance(origin, str):
        raise FormatError(f"the path of a projection must be a string, not {shortened(path)}")
    if not isinstance(found, list) or not found:
        raise FormatError(f"the roles of {shortened(path)} must be a list that is not empty, not {shortened(found)}")
    roles, blocks = [], set()
    for role in found:
        fields_of(f"a role of {shortened(path)}", role, "key", "start", "rows", optional=("block", "stride"))
        key = _KEY.fullmatch(role["key"]) if isinstance(role["key"], str) else None
        if key is None:
            raise FormatError(f"a role's key looks like '3/attn.q', not {shortened(role['key'])}")
        numbers = [role["start"], role["rows"], role.get("block", 0), role.get("stride", 0), width]
        if not all(type(n) is int and 0 <= n < LIMIT for n in numbers):
            raise FormatError(f"rows and widths of {shortened(path)} must be whole numbers, not {shortened(numbers)}")
        blocks.add(key[1])
        roles.append(Role(key[3], key[2], *numbers[:4]))
    if len(blocks) > 1:
        raise FormatError(f"the roles of {shortened(path)} cannot be in several blocks")
    block = blocks.pop()
    return StoredProjection(path, origin, width, None if block is None else int(block), tuple(roles))


def _identity(base: Any) -> Identity:
    fields_of("base", base, "class", "architecture", "name", "parameter_tensors", "fingerprint", "sketch")
    if not isinstance(base["class"], str):
        raise FormatError(f"the class of the base must be a string, not {shortened(base['class'])}")
    for name in ("architecture", "name", "sketch"):
        if not isinstance(base[name], str | None):
            raise FormatError(f"{name} of the base must be a string or null, not {shortened(base[name])}")
    count = base["parameter_tensors"]
    if count is not None and (type(count) is not int or not 0 < count < LIMIT):
        raise FormatError(f"parameter_tensors must be a whole number, not {shortened(count)}")
    return Identity(
        base["class"],
        base["architecture"],
        base["name"],
        count,
        _hex(base["fingerprint"], "fingerprint of the base"),
        None if base["sketch"] is None else _unpack_sketch(base["sketch"]),
    )


def _pack_sketch(values: tuple[float, ...]) -> str:
    """bfloat16 values as hexadecimal digits, four each."""
    bits = torch.tensor(values, dtype=torch.bfloat16).view(torch.int16)
    return "".join(f"{n & 0xFFFF:04x}" for n in bits.tolist())


def _unpack_sketch(text: str) -> tuple[float, ...]:
    if not re.fullmatch(r"(?:[0-9a-f]{4}){1,4096}", text):
        raise FormatError(f"sketch must be bfloat16 numbers in hexadecimal digits, not {shortened(text)}")
    bits = [int(text[i : i + 4], 16) for i in range(0, len(text), 4)]
    values = torch.tensor([n - 65536 if n > 32767 else n for n in bits], dtype=torch.int16).view(torch.bfloat16)
    if not values.isfinite().all():
        raise FormatError("sketch holds NaN or infinite values")
    return tuple(values.tolist())


def _hex(value: Any, what: str) -> str | None:
    if value is not None and (not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{32}", value)):
        raise FormatError(f"{what} must be 32 hexadecimal digits or null, not {shortened(value)}")
    return value


def _check_saved_rows(name: str, t: Tensor, wanted: int) -> None:
    _check_tensor(name, t, torch.float32, 1)
    if len(t) != wanted or not t.isfinite().all():
        raise FormatError(f"{name} holds {len(t):,} numbers; {wanted:,} finite ones were expected")


def _row_numbers(stored: Stored) -> int:
    widths = stored._widths()
    return sum(int((d > 0).sum()) * widths[name] for name, d in draw_counts(stored.log, stored.config.rank).items())


def _where(stored: Stored, name: str) -> str:
    """Name of a tensor; of `vectors`, of the vector in it that is not finite."""
    if name != VECTORS:
        return name
    for p, (b, d) in zip(stored.projections, stored.vectors, strict=True):
        rows = [role.rows for role in p.roles]
        for role, part, directions in zip(p.roles, b.split(rows), d, strict=True):
            for letter, t in (("b", part), ("d", directions)):
                if not t.isfinite().all():
                    return f"{letter} of {p.path}.{role.name}"
    return name


def _check_tensor(name: str, t: Tensor, dtype: torch.dtype | None, dims: int) -> None:
    if t.dtype not in (VECTOR_TYPES if dtype is None else (dtype,)) or t.dim() != dims:
        wanted = "floating point" if dtype is None else dtype
        raise FormatError(
            f"the tensor {name} must have {dims} dimensions of {wanted}, not shape {tuple(t.shape)} of {t.dtype}"
        )


def fields_of(what: str, value: Any, *names: str, optional: tuple[str, ...] = ()) -> None:
    if not isinstance(value, dict):
        raise FormatError(f"{what} must be an object with {', '.join(names)}, not {shortened(value)}")
    if missing := [name for name in names if name not in value]:
        raise FormatError(f"{what} has no {missing[0]!r}")
    if odd := [name for name in value if name not in (*names, *optional)]:
        raise FormatError(f"{what} has an unknown {shortened(odd[0])}")


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
