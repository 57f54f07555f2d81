"""Options as keyword parameters that editors complete: left out, misspelled, or named as another library names them."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from .errors import OptionError

P = ParamSpec("P")
T = TypeVar("T")


class _Unset:
    def __repr__(self) -> str:
        return "<unset>"


UNSET: Any = _Unset()
"""Default of a parameter whose default is told elsewhere, once; None would be a value."""

PEFT = {
    "r": "rank", "target_modules": "targets", "exclude_modules": "exclude", "layers_to_transform": "blocks",
    "lora_alpha": "d_init", "d_initial": "d_init", "modules_to_save": "train", "bias": "train",
    "lora_dropout": "dropout", "vera_dropout": "dropout", "projection_prng_key": "seed", "init_lora_weights": "init",
    "init_weights": "init", "adapter_name": "name",
}  # fmt: skip
"""Names of options in PEFT's configurations, and what comes closest to them here."""


def given(**options: Any) -> dict[str, Any]:
    """The options that are not `UNSET`."""
    return {name: value for name, value in options.items() if value is not UNSET}


def hinting(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which answers an unknown keyword with an `OptionError` that names the one which was meant."""
    parameters = inspect.signature(function).parameters.values()
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                raise OptionError(f"no option {name!r}; {_hint(name, known)}")
        return function(*args, **kwargs)

    return checked


def _hint(name: str, known: set[str]) -> str:
    if name == "lora_alpha" and "d_init" in known:
        return "did you mean 'd_init'? There is no alpha: the scale of an update is trained, as d, and starts at d_init"
    near = [PEFT[name]] if PEFT.get(name) in known else difflib.get_close_matches(name, sorted(known), 1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
