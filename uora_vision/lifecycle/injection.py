"""Putting an adapter into a model and taking it out again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

from torch import nn

from ..config import Init, Layout, UoraConfig, chosen
from ..errors import warn
from ..options import UNSET, hinting
from ..structure.checks import check_whole
from ..structure.planning import planned
from ..structure.survey import Survey
from .apply import apply_plan, take_out
from .contexts import disabled
from .inference_mode import outside_inference_mode
from .library import DEFAULT, check_outside, check_room, library_of
from .undo import Undo
from .verification import verify


@hinting
@outside_inference_mode
def inject(
    model: nn.Module,
    config: UoraConfig | None = None,
    *,
    name: str = DEFAULT,
    example_input: Any = None,
    rank: int = UNSET,
    targets: str | Iterable[str] = UNSET,
    exclude: str | Iterable[str] = UNSET,
    blocks: Iterable[int] | None = UNSET,
    d_init: float = UNSET,
    seed: int = UNSET,
    layout: Layout = UNSET,
    init: Init = UNSET,
    dropout: float = UNSET,
    token_sampling: int = UNSET,
    train: str | Iterable[str] = UNSET,
) -> nn.Module:
    """Adapt a model in place: freeze it, and give every chosen projection its trained vectors.

    The model computes what it did before, since b starts at 0: to the last bit over a float32 or float64 base; over a
    base stored in bfloat16 or float16 to within rounding of that type.

    Args:
        model: of timm, open_clip, transformers or one's own; see `plan` for what would be adapted. It may have adapters
            already: the new one is added under its name and made the active one.
        config: options; the keyword arguments change single ones. See `UoraConfig`.
        name: of the adapter.
        example_input: if given, a trace of it corrects the rules (see `plan`), and `verify` is run on it; the model is
            left as it was when that fails.

    Returns:
        The same model.

    Raises:
        StateError: the model already has an adapter of that name.
        ConfigError, OptionError, TargetError: see `plan`.
        DeadAdapterError: see `verify`.

    Warns:
        UoraWarning: parts of the model look new and do not train wholly; all are named, with the option that trains
            them. `train=()` says that this is meant.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
        >>> before = model(x)
        >>> model = uora.inject(model, rank=4, targets="attention+mlp", example_input=x)
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
        >>> uora.summary(model).trained
        136
    """
    options = chosen(
        config, rank=rank, targets=targets, exclude=exclude, blocks=blocks, d_init=d_init, seed=seed, layout=layout,
        init=init, dropout=dropout, token_sampling=token_sampling, train=train,
    )  # fmt: skip
    survey = Survey(model)
    library = check_room(survey, name)
    with library.undo(model) if library else Undo(survey) as undo:
        with disabled(model) if library else nullcontext():
            what = planned(survey, options, example_input)
        apply_plan(survey, what, name, undo=undo)
        if what.new:
            warn(what.news)
        if example_input is not None:
            verify(model, example_input)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take all adapters out without merging: the base as it was, with its own head, its parameters trainable as they
    were.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> uora.remove(model) is model
        True
        >>> sorted(name for name, _ in model.named_parameters() if "uora" in name)
        []
    """
    library = library_of(model)
    check_outside(library)
    check_whole(Survey(model))
    with library.undo(model) as undo:
        if library.active is not None:
            # In place, since optimizers and tied weights know the base by its tensors.
            parts = library.entries[library.active].parts
            if any(t.shape != library.base_parts[name].shape for name, t in parts.items()):
                library.switch(model, None)
            for name, t in parts.items() if library.active is not None else ():
                undo.write(t, library.base_parts[name])
        return take_out(model, library)
