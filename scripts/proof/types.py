"""Every model type of transformers, torchvision and diffusers, at its default widths on the meta device."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torchvision
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

OPTIONS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 24},
    "informer": {"prediction_length": 24},
    "time_series_transformer": {"prediction_length": 24},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
}
"""What a type needs beside its defaults."""


def names() -> list[str]:
    """Every model type of transformers by its name, those of the other packages behind the name of the package."""
    found = sorted(CONFIG_MAPPING_NAMES)
    found += [f"torchvision/{name}" for name in torchvision.models.list_models() if not name.startswith("quantized_")]
    return found + [f"diffusers/{name}" for name in _diffusers()]


def build(name: str) -> nn.Module:
    """The base model of a type, or the first other class that there is for it, on the meta device.

    Raises:
        LookupError: there is no model class for this type.
    """
    package, _, own = name.rpartition("/")
    if package == "torchvision":
        takes = inspect.signature(torchvision.models.get_model_builder(own)).parameters
        bare = {"weights_backbone": None} if "weights_backbone" in takes else {}
        try:
            with torch.device("meta"):
                return torchvision.models.get_model(own, weights=None, **bare)
        except NotImplementedError:  # RegNet computes its widths with tensors
            return torchvision.models.get_model(own, weights=None, **bare).to("meta")
    if package == "diffusers":
        with torch.device("meta"):
            return _diffusers()[own]()
    return _of_transformers(name)


@cache
def _diffusers() -> dict[str, type[nn.Module]]:
    """The classes of models of diffusers, by name; {} where it is not installed."""
    try:
        import diffusers
    except ImportError:
        return {}
    found = {}
    for name in dir(diffusers):
        with contextlib.suppress(Exception):  # some want packages of their own
            cls = getattr(diffusers, name)
            if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin) and cls is not diffusers.ModelMixin:
                found[name] = cls
    return found


def _of_transformers(name: str) -> nn.Module:
    config, errors = CONFIG_MAPPING[name](**OPTIONS.get(name, {})), []
    classes = list(_classes(name, type(config)))
    if not classes:
        raise LookupError(f"{name} has no model class")
    for cls in classes[:4]:
        try:
            with torch.device("meta"), _uninitialised():
                model = cls(config)
            return model.to("meta")  # some make their tensors past the default device
        except Exception as error:  # the next class may do
            errors.append(f"{cls.__name__}: {type(error).__name__}: {str(error)[:200]}")
    raise LookupError("; ".join(errors))


def _classes(name: str, config: type) -> Iterator[Any]:
    """Base model first, then the classes with heads."""
    tables = ["MODEL_MAPPING_NAMES", *(t for t in dir(modeling_auto) if t.startswith("MODEL_FOR_"))]
    seen = set()
    for table in (t for t in tables if t.endswith("_MAPPING_NAMES")):
        found = getattr(modeling_auto, table).get(name, ())
        for word in (found,) if isinstance(found, str) else found:
            cls = getattr(transformers, word, None)
            if cls is not None and word not in seen and getattr(cls, "config_class", None) is not None:
                seen.add(word)
                yield cls


@contextlib.contextmanager
def _uninitialised() -> Iterator[None]:
    with transformers.initialization.no_init_weights():
        yield
