"""A PEFT VeRA adapter put into a model."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UoraConfig
from ..errors import ConfigError, FormatError
from ..lifecycle.apply import apply_plan, bank_for
from ..lifecycle.inference_mode import outside_inference_mode
from ..lifecycle.library import DEFAULT, check_room
from ..maths.draws import on_cpu
from ..storage.base import Base
from ..storage.fit import as_held, converted
from ..storage.folder import CONFIG_FILE, TENSOR_FILE, content_of, folder_path, tensors_of
from ..storage.strict_json import parse
from ..structure.checks import check_whole
from ..structure.planning import Plan
from ..structure.survey import Survey
from ..structure.targets import Projection
from ..weights.role import Role

PREFIX, LAMBDA_B, LAMBDA_D = "base_model.model.", ".vera_lambda_b", ".vera_lambda_d"


@outside_inference_mode
@on_cpu
def from_peft_vera(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str = DEFAULT, activate: bool = True
) -> nn.Module:
    """Put a VeRA adapter that PEFT saved into a model, in place: it computes what PEFT's model computes.

    Every weight is one projection with one d, also where it holds q, k and v, as PEFT has it. A and B are those of the
    folder; of a folder without them (`save_projection=False`) they are drawn again by PEFT's law, which gives the same
    where torch draws the same numbers. `save` puts them into its file, since no seed of this library gives them.

    Args:
        model: a plain base, or one with adapters of other names.
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        name: of the adapter in the model.
        activate: whether the model computes with it from now on.

    Returns:
        The same model, with PEFT's `modules_to_save` (the head) as its trained parts.

    Raises:
        StateError: the model has an adapter of that name, or is spread over processes.
        FormatError: the folder holds no VeRA adapter, is damaged, or does not fit this model.
        ConfigError, OptionError: this can be no folder.

    Example:
        >>> import tempfile, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), rank=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = uora.export.to_peft_vera(model, folder)
        ...     other = uora.export.from_peft_vera(uora.remove(model), folder)
        >>> list(uora.adapters(other))
        ['0', '2']
    """
    survey = Survey(model)
    check_room(survey, name)
    check_whole(survey)
    source = folder_path(folder)
    options = _options(source)
    tensors = _tensors(source)
    paths = [key.removeprefix(PREFIX).removesuffix(LAMBDA_B) for key in tensors if key.endswith(LAMBDA_B)]
    if not paths:
        raise FormatError(f"{source / TENSOR_FILE} holds no VeRA adapter")
    base = Base(survey)
    order = [path for path in survey.shown.candidates if path in set(paths)]
    if missing := sorted(set(paths) - set(order)):
        raise FormatError(f"{source} adapts {missing[0]}, which is no layer of this {type(model).__name__}")
    try:
        config = UoraConfig(
            rank=options["r"], targets=order, layout="slice", init="kaiming", seed=options["projection_prng_key"],
            d_init=options["d_initial"] or 0.1, dropout=options["vera_dropout"], train=(),
        )  # fmt: skip
    except ConfigError as error:
        raise FormatError(f"{source / CONFIG_FILE} has options that no adapter can have here: {error}") from error
    vectors, projections = [], []
    for path in order:
        b, d = (_floats(source, f"{PREFIX}{path}{end}", tensors) for end in (LAMBDA_B, LAMBDA_D))
        projections.append(_projection(base, path))
        out = projections[-1].shape[0]
        if b.shape != (out,) or d.shape != (options["r"],):
            raise FormatError(
                f"{source}: {path} has b of {tuple(b.shape)} and d of {tuple(d.shape)}; this model needs ({out},) and "
                f"({options['r']},)"
            )
        if projections[-1].read and b.any():
            raise FormatError(
                f"{source} changes {path}, which this model reads without calling its layer: PEFT computes without it"
            )
        vectors += [b, d]
    a, bm = _matrices(source, options, tensors, projections)
    what = Plan(config, tuple(projections), ())
    first = {f"A{a.shape[1]}": a, f"B{bm.shape[1]}": bm}
    parts = _parts(source, base, tensors)
    apply_plan(survey, what, name, torch.cat(vectors), parts, None, activate, bank_for(model, what, first))
    return model


def _options(source: Path) -> dict[str, Any]:
    content = content_of(source / CONFIG_FILE)
    try:
        config = parse(content)
    except FormatError as error:
        raise FormatError(f"{source / CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "VERA":
        raise FormatError(f"{source} is not a VeRA adapter of PEFT")
    defaults = {"r": 256, "projection_prng_key": 0, "save_projection": True, "d_initial": 0.1, "vera_dropout": 0.0}
    options = defaults | config
    for name in ("r", "projection_prng_key"):
        if type(options[name]) is not int or options[name] < (name == "r"):
            raise FormatError(f"{source / CONFIG_FILE}: {name}, the {_MEANING[name]}, must be a whole number")
    if type(options["d_initial"]) not in (int, float):
        raise FormatError(f"{source / CONFIG_FILE}: d_initial must be a number")
    if type(options["vera_dropout"]) not in (int, float) or not 0 <= options["vera_dropout"] < 1:
        raise FormatError(f"{source / CONFIG_FILE}: vera_dropout must be in [0, 1)")
    return options


_MEANING = {"r": "rank", "projection_prng_key": "seed"}


def _tensors(source: Path) -> dict[str, Tensor]:
    path = source / TENSOR_FILE
    if not path.exists():
        raise FormatError(
            f"{path} does not exist; adapters in pickled files (.bin) are not read: save them with PEFT again"
        )
    tensors = tensors_of(path, content_of(path))
    if broken := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise FormatError(f"{path}: {broken[0]} holds NaN or infinite values")
    return tensors


def _projection(base: Base, path: str) -> Projection:
    """A weight as one projection, of the name that the rules have for it, or its layer's."""
    candidate, finding = base.survey.shown.candidates[path], base.survey.shown.findings.get(path)
    roles = finding.roles if finding else ()
    name = roles[0].name if len(roles) == 1 else path.rpartition(".")[2]
    role = Role(name, roles[0].group if roles else "other", 0, candidate.shape[0])
    block = finding.block if finding else None
    return Projection(
        candidate.module_path,
        candidate.tensor,
        candidate.form,
        candidate.shape,
        (role,),
        "saved",
        block,
        candidate.read,
    )


def _matrices(
    source: Path, options: dict[str, Any], tensors: dict[str, Tensor], projections: list[Projection]
) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (r, out) of the largest widths, float32."""
    out, width = (max(p.shape[i] for p in projections) for i in (0, 1))
    rank = options["r"]
    a, b = (_floats(source, f"base_model.vera_{side}", tensors) for side in "AB")
    if a.numel() == 0 or b.numel() == 0:
        if options["save_projection"]:
            raise FormatError(f"{source / TENSOR_FILE} lacks vera_A and vera_B, which its configuration promises")
        # As PEFT 0.21.2 draws them: tuners/vera/model.py, _kaiming_init.
        generator = torch.Generator().manual_seed(options["projection_prng_key"])
        a, b = _drawn((rank, width), generator), _drawn((out, rank), generator)
    fit = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] == rank
    if not fit or a.shape[1] < width or len(b) < out:
        raise FormatError(
            f"{source}: vera_A of {tuple(a.shape)} and vera_B of {tuple(b.shape)} do not serve rank {rank} and layers "
            f"of up to {out} x {width}"
        )
    return a[:, :width].contiguous(), b[:out].t().contiguous()


def _floats(source: Path, name: str, tensors: dict[str, Tensor]) -> Tensor:
    """A tensor of the file in float32, which is not in `tensors` any more; an empty one if there is none."""
    t = tensors.pop(name, torch.empty(0))
    if not t.is_floating_point():
        raise FormatError(f"{source}: {name} is of {t.dtype}, not of floats")
    return converted(f"{source}: {name}", t, torch.float32)


def _drawn(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))  # in PEFT's order, for the last bit
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _parts(source: Path, base: Base, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other tensors of the file as trained parts of the base."""
    parts: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        held = base.held[name].tensor if name in base.held else None
        if held is None or held.shape != value.shape:
            here = "does not have it" if held is None else f"has it in shape {tuple(held.shape)}"
            raise FormatError(f"{source} holds {name} of shape {tuple(value.shape)}; this model {here}")
        parts[name] = as_held(f"{source}: {name}", value, held)
    return parts
