"""Holding a saved adapter against a model: where each of its projections is, and whether it was made for this base."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .checks import check_weights, plain
from .errors import FormatError, StateError
from .fingerprint import CLOSE, Weight, distance, sketch_of, weights_digest
from .layers import Adapter
from .library import LIBRARY
from .plan import Projection
from .sharded import class_name
from .sites import Site, find_sites
from .stored import Identity, Stored, StoredProjection
from .walker import Finding, head_names, walk


@dataclass(frozen=True)
class Fitted:
    """Where the parts of a saved adapter go.

    Args:
        projections: the adapted weights in this model, in the order of the file.
        names: of the trained parts of the base in this model, by their name in the file.
    """

    projections: tuple[Projection, ...]
    names: dict[str, str]


class Base:
    """What saved adapters are held against: the weights of a model, with or without adapters in it.

    Making it costs a walk over the model, so whoever loads many adapters makes it once. It holds as long as neither the
    modules nor the frozen weights of the model change.

    Args:
        model: the base.

    Raises:
        StateError: see `plan`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._plain = plain(model)
        self.sites: dict[str, Site] = {site.path: site for site in find_sites(self._plain)}
        self.modules = dict(model.named_modules())
        self._places: dict[tuple[StoredProjection, ...], tuple[Projection, ...]] = {}
        self._digests: dict[tuple[str, ...], str | None] = {}
        self._sketches: dict[tuple[str, ...], tuple[float, ...] | None] = {}

    @cached_property
    def findings(self) -> dict[str, Finding]:
        """What the rules say of each weight, by path."""
        return {finding.site.path: finding for finding in walk(self._plain)}

    @cached_property
    def held(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its name, without those of adapters."""
        vectors = {id(p) for m in self.model.modules() if isinstance(m, Adapter) for p in m.parameters()}
        parameters = {name: p for name, p in self.model.named_parameters() if id(p) not in vectors}
        return parameters | dict(self.model.named_buffers())

    @cached_property
    def architecture(self) -> str | None:
        """The model's name in timm."""
        config = getattr(self.model, "pretrained_cfg", None)
        found = config.get("architecture") if isinstance(config, dict) else None
        return found if isinstance(found, str) else None

    @cached_property
    def name(self) -> str | None:
        """Under which the weights were published, where the model tells it."""
        return published_name(self.model)

    @cached_property
    def parameter_tensors(self) -> int:
        """How many parameters there are besides the head: the same for any image size and number of classes."""
        heads = head_names(self.model)
        parameters = [name for name, t in self.held.items() if isinstance(t, nn.Parameter)]
        return sum(not any(name.startswith(head + ".") for head in heads) for name in parameters)

    def fingerprint(self, paths: tuple[str, ...]) -> str | None:
        """Of the weights at these paths; see `fingerprint.py`."""
        if paths not in self._digests:
            self._digests[paths] = weights_digest(self._weights(paths))
        return self._digests[paths]

    def sketch(self, paths: tuple[str, ...]) -> tuple[float, ...] | None:
        """Of the weights at these paths; see `fingerprint.py`."""
        if paths not in self._sketches:
            self._sketches[paths] = sketch_of(self._weights(paths))
        return self._sketches[paths]

    def identity(self, paths: tuple[str, ...]) -> Identity:
        """Of an adapter of these weights."""
        return Identity(
            class_name(self.model),
            self.architecture,
            self.name,
            self.parameter_tensors,
            self.fingerprint(paths),
            self.sketch(paths),
        )

    def places(self, stored: Stored) -> tuple[Projection, ...]:
        """Where the projections of a saved adapter are in this model.

        Raises:
            FormatError: one is not there.
            StateError, TargetError: one cannot be adapted as it is.
        """
        if stored.projections not in self._places:
            found = _places(stored, self)
            check_weights(self.model, found)
            self._places[stored.projections] = found
        return self._places[stored.projections]

    def _weights(self, paths: tuple[str, ...]) -> list[Weight]:
        return [Weight(self.modules[site.module_path], site.tensor) for site in (self.sites[p] for p in paths)]


def fit(stored: Stored, base: Base, check_base: bool = True) -> Fitted:
    """Hold a saved adapter against a model, without touching it.

    A projection is looked for at its path, and otherwise by its block and role, if one weight alone has these and the
    rows of the file. Trained parts of the base are looked for by name, and otherwise by the end of the name.

    Args:
        check_base: whether other weights than those that the adapter was trained on are an error.

    Raises:
        FormatError: the adapter does not fit this model, or was made for another base.
        StateError, TargetError: the model cannot be adapted as it is.
    """
    made_for = stored.identity
    known = made_for.architecture and base.architecture
    if check_base and known and made_for.architecture != base.architecture:
        raise FormatError(f"the adapter was made for {made_for.architecture}; this model is {base.architecture}")
    projections = base.places(stored)
    moved = [p.path for p in projections] != [p.path for p in stored.projections]
    if not moved and made_for.parameter_tensors not in (None, base.parameter_tensors):
        raise FormatError(
            f"the adapter was made for a {made_for.shown} of {made_for.parameter_tensors} parameter tensors besides "
            f"the head; this {base.architecture or class_name(base.model)} has {base.parameter_tensors}, so its depth "
            "or its parts are others"
        )
    names = _names(stored, base)
    if check_base:
        _check_weights(stored, base, tuple(p.path for p in projections))
    return Fitted(projections, names)


def published_name(model: nn.Module) -> str | None:
    """The name of a model's weights: of timm with its tag, of transformers as on the hub; None if it does not tell."""
    found: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(found, dict):
        architecture, tag = found.get("architecture"), found.get("tag")
        if isinstance(architecture, str):
            return f"timm/{architecture}.{tag}" if tag else f"timm/{architecture}"
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    return os.path.basename(name.rstrip("/")) if os.path.isabs(name) else name


def _places(stored: Stored, base: Base) -> tuple[Projection, ...]:
    found: list[Site | None] = []
    for p in stored.projections:
        site = base.sites.get(p.path)
        found.append(site if site is not None and _holds(site, p) else None)
    taken = {site.path for site in found if site is not None}
    for i, p in enumerate(stored.projections):
        if found[i] is not None:
            continue
        same = [f.site for f in base.findings.values() if f.site.path not in taken and _alike(f, p)]
        if len(same) != 1:
            raise _not_there(stored, base, p, len(same))
        found[i] = same[0]
        taken.add(same[0].path)
    return tuple(
        Projection(s.module_path, s.tensor, s.form, s.shape, p.roles, "saved", p.block, s.read, (),
            None if p.origin == s.path else p.origin)
        for s, p in zip(found, stored.projections, strict=True) if s is not None
    )  # fmt: skip


def _holds(site: Site, p: StoredProjection) -> bool:
    out, width = site.shape
    return width == p.width and out >= p.rows


def _alike(finding: Finding, p: StoredProjection) -> bool:
    return finding.block == p.block and _holds(finding.site, p) and set(p.roles) <= set(finding.roles)


def _not_there(stored: Stored, base: Base, p: StoredProjection, alike: int) -> FormatError:
    site = base.sites.get(p.path)
    here = "{} x {}".format(*site.shape) if site is not None else "not there"
    also = f", and {alike} others there have its block and role {p.keys[0]}" if alike else ""
    return FormatError(
        f"the adapter was made for {stored.identity.shown}: it adapts {p.path}, at least {p.rows} x {p.width}, which "
        f"in this {class_name(base.model)} is {here}{also}. Load it into the architecture that it was trained on."
    )


def _names(stored: Stored, base: Base) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, t in stored.base.items():
        held = base.held.get(name)
        if held is not None and (held.shape == t.shape or _other_classes(base.model, name, held, t)):
            names[name] = name
    taken = set(names.values())
    for name, t in stored.base.items():
        if name in names:
            continue
        same = {other: _common_end(name, other) for other, o in base.held.items() if o.shape == t.shape} if (
            name not in base.held
        ) else {}  # fmt: skip
        longest = max(same.values(), default=0)
        best = [other for other, length in same.items() if length == longest and other not in taken]
        if longest < 2 or len(best) != 1:
            here = f"has shape {tuple(base.held[name].shape)}" if name in base.held else "does not exist"
            raise FormatError(
                f"the adapter holds a trained {name} of shape {tuple(t.shape)}, which in this model {here}. Create the "
                "model with the same number of classes (num_classes=...)."
            )
        names[name] = best[0]
        taken.add(best[0])
    return names


def _other_classes(model: nn.Module, name: str, held: Tensor, t: Tensor) -> bool:
    """Whether a trained part is a head for another number of classes, on a model that has adapters already: there each
    has its own, and no code outside has yet been told how many classes there are."""
    path, _, key = name.rpartition(".")
    if LIBRARY not in model.__dict__ or key not in ("weight", "bias") or held.shape[1:] != t.shape[1:]:
        return False
    in_head = any(f"{path}.".startswith(f"{head}.") for head in head_names(model))
    return in_head and isinstance(model.get_submodule(path), nn.Linear)


def _common_end(one: str, two: str) -> int:
    """How many parts of two dotted names are the same, from the end."""
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(two.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count


def _check_weights(stored: Stored, base: Base, paths: tuple[str, ...]) -> None:
    made_for = stored.identity
    if made_for.fingerprint is None and made_for.sketch is None:
        return
    error = FormatError(
        f"the adapter was made for other weights than this {class_name(base.model)} has: for {made_for.shown}, "
        f"fingerprint {made_for.fingerprint}. Load it into that base, or, if you know that this one will do, with "
        "check_base=False."
    )
    here = base.fingerprint(paths)
    if here is not None and made_for.fingerprint is not None:
        if here != made_for.fingerprint:
            raise error
        return
    try:
        sketch = base.sketch(paths)
    except (StateError, ImportError, RuntimeError) as reason:
        warnings.warn(
            f"whether this is the base that the adapter was made for could not be told: {reason}", stacklevel=4
        )
        return
    if sketch is not None and made_for.sketch is not None and distance(sketch, made_for.sketch) > CLOSE:
        raise error
