"""What saved adapters are held against: the weights of a model, with or without adapters in it."""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..errors import FormatError
from ..lifecycle.adapter import Adapter
from ..lifecycle.library import LIBRARY
from ..maths.bank import Bank
from ..private import name_or_path
from ..structure.candidates import Candidate
from ..structure.checks import check_model, check_weights
from ..structure.paths import joined, lies_within
from ..structure.survey import Held, Survey
from ..structure.targets import Projection
from ..structure.walk import Finding
from ..weights.sharded import class_name, whole
from .fingerprint import Weight, sketch_of, weights_digest
from .stored import Identity, Stored, StoredProjection


class Base:
    """What saved adapters are held against: the weights of a model, with or without adapters in it.

    Making it costs a walk over the model, so whoever loads many adapters makes it once. It holds as long as neither the
    modules nor the frozen weights of the model change.

    Args:
        model: the base, or a survey of it.

    Raises:
        StateError: see `plan`.

    Example:
        >>> import tempfile, uora_vision as uora
        >>> from torch import Tensor, nn
        >>> model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = uora.save(uora.inject(model, rank=4), folder)
        ...     base = uora.Base(uora.remove(model))
        ...     for name in ("a", "b"):
        ...         model = uora.load(model, folder, name=name, activate=False, base=base)
        >>> uora.adapter_names(model)
        ['a', 'b']
    """

    def __init__(self, model: nn.Module | Survey) -> None:
        self.survey = Survey.of(model)
        self.model = self.survey.model
        check_model(self.survey)
        self._projections_of: dict[tuple[StoredProjection, ...], tuple[Projection, ...]] = {}
        self._digests: dict[tuple[str, ...], str | None] = {}
        self._sketches: dict[tuple[str, ...], tuple[float, ...] | None] = {}

    @cached_property
    def held(self) -> dict[str, Held]:
        """Every parameter and buffer by its name, without those of adapters and banks."""
        return {n: held for n, held in self.survey.tensors.items() if not isinstance(held.module, Adapter | Bank)}

    @cached_property
    def architecture(self) -> str | None:
        """The model's name in timm."""
        config = getattr(self.model, "pretrained_cfg", None)
        found = config.get("architecture") if isinstance(config, dict) else None
        return found if isinstance(found, str) else None

    @cached_property
    def name(self) -> str | None:
        """Under which the weights were published, where the model tells it."""
        return published_name(self.survey)

    @cached_property
    def parameter_tensors(self) -> int:
        """How many parameters there are besides the head: the same for any image size and number of classes."""
        return sum(
            isinstance(held.tensor, nn.Parameter) and not lies_within(name, self.survey.heads)
            for name, held in self.held.items()
        )

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

    def weight_name(self, path: str) -> str:
        """Name of the parameter at the path of a projection."""
        site = self.survey.shown.candidates[path]
        return joined(site.module_path, site.tensor)

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

    def projections_of(self, stored: Stored) -> tuple[Projection, ...]:
        """Where the projections of a saved adapter are in this model.

        Raises:
            FormatError: one is not there.
            StateError, TargetError: one cannot be adapted as it is.
        """
        if stored.projections not in self._projections_of:
            found = _projections_of(stored, self)
            check_weights(self.survey, found)
            self._projections_of[stored.projections] = found
        return self._projections_of[stored.projections]

    def _weights(self, paths: tuple[str, ...]) -> list[Weight]:
        candidates = [self.survey.shown.candidates[path] for path in paths]
        return [Weight(self.survey.modules[candidate.module_path], candidate.tensor) for candidate in candidates]


def published_name(of: nn.Module | Survey) -> str | None:
    """The name of a model's weights: of timm with its tag, of a repository on the hub, or the last part of the path of
    the folder or file that they came from. None if the model does not tell, or if they were never trained."""
    survey = Survey.of(of)
    model = survey.model
    if _as_initialised(survey):
        return None
    found: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(found, dict):
        architecture, tag, file = found.get("architecture"), found.get("tag"), found.get("file")
        if file or found.get("state_dict"):
            return _last_part(file) if isinstance(file, str | os.PathLike) else None
        if found.get("source") == "hf-hub" and isinstance(found.get("hf_hub_id"), str):
            return str(found["hf_hub_id"])
        if isinstance(architecture, str):
            return f"timm/{architecture}.{tag}" if tag else f"timm/{architecture}"
    name = name_or_path(model)
    return _last_part(name) if name is not None and (os.path.isabs(name) or os.path.isdir(name)) else name


def _last_part(path: str | os.PathLike[str]) -> str | None:
    name = os.path.basename(os.path.abspath(path))
    return name if name.isprintable() else None


def _as_initialised(survey: Survey) -> bool:
    """Whether the norms of the base are all as they start, which no training leaves them: it was made without its
    pretrained weights, whatever its configuration names."""
    library = survey.model.__dict__.get(LIBRARY)
    own = library.base_parts if library else {}  # of what the adapter trains
    norms = [(path, m) for path, m in survey.modules.items() if "norm" in type(m).__name__.lower()]
    found = [(n, own.get(joined(path, n), p)) for path, m in norms for n, p in m._parameters.items() if p is not None]
    if not found or any(p.is_meta for _, p in found):
        return False
    return all(_is_constant(p, (0.0,) if name == "bias" else (0.0, 1.0)) for name, p in found)


def _is_constant(t: Tensor, values: tuple[float, ...]) -> bool:
    return any(bool((whole(t) == value).all()) for value in values)


def _projections_of(stored: Stored, base: Base) -> tuple[Projection, ...]:
    found: list[Candidate | None] = []
    shown = base.survey.shown
    for p in stored.projections:
        candidate = shown.candidates.get(p.path)
        found.append(candidate if candidate is not None and _holds(candidate, p) else None)
    taken = {candidate.path for candidate in found if candidate is not None}
    for i, p in enumerate(stored.projections):
        if found[i] is not None:
            continue
        same = [f.candidate for f in shown.findings.values() if f.candidate.path not in taken and _alike(f, p)]
        if len(same) != 1:
            raise _not_there(stored, base, p, len(same))
        found[i] = same[0]
        taken.add(same[0].path)
    return tuple(
        Projection(s.module_path, s.tensor, s.form, s.shape, p.roles, "saved", p.block, s.read, (),
            None if p.origin == s.path else p.origin)
        for s, p in zip(found, stored.projections, strict=True) if s is not None
    )  # fmt: skip


def _holds(candidate: Candidate, p: StoredProjection) -> bool:
    out, width = candidate.shape
    return width == p.width and out >= p.rows


def _alike(finding: Finding, p: StoredProjection) -> bool:
    return finding.block == p.block and _holds(finding.candidate, p) and set(p.roles) <= set(finding.roles)


def _not_there(stored: Stored, base: Base, p: StoredProjection, alike: int) -> FormatError:
    candidate = base.survey.shown.candidates.get(p.path)
    here = "{} x {}".format(*candidate.shape) if candidate is not None else "not there"
    also = f", and {alike} others there have its block and role {p.keys[0]}" if alike else ""
    return FormatError(
        f"the adapter was made for {stored.identity.shown}: it adapts {p.path}, at least {p.rows} x {p.width}, which "
        f"in this {class_name(base.model)} is {here}{also}. Load it into the architecture that it was trained on."
    )
