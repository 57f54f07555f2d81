"""From what an adapter says of itself to its base, and to the task that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..storage.stored import Stored
from .models import FORMS, named, with_weights
from .tasks import (
    CLIP,
    GENERATION,
    IMAGES,
    NUMBERS,
    TASKS,
    TEXTS,
    VALUES,
    ImageClassification,
    Task,
    ZeroShotClassification,
)  # fmt: skip


def task_of(stored: Stored) -> str:
    """The task of an adapter, as the hub names it.

    Raises:
        ConfigError: it does not say, or this version does not predict for that task.
    """
    found = stored.about.get("preprocessing", {}).get("task")
    if found is None and stored.identity.architecture is not None:
        return IMAGES
    if found is None:
        raise ConfigError(
            f"the adapter does not say what it is for; it was made for {stored.identity.shown}. Save it again with "
            "save(model, folder, labels=..., preprocessing={'task': ...})"
        )
    if found not in TASKS:
        raise ConfigError(f"the adapter is of the task {found}, which is none of {', '.join(TASKS)}")
    return str(found)


def labels_of(stored: Stored, given: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes.

    Raises:
        ConfigError: none are there, or those that are given are not as many as those that are.
    """
    known, task = stored.about.get("labels"), task_of(stored)
    if task in (NUMBERS, VALUES, GENERATION):
        if given is not None:
            raise ConfigError(f"the task {task} has no classes, so there are none to name")
        return ()
    if task == CLIP and given is not None:
        return tuple(given)
    if given is not None and known is not None and len(given) != len(known):
        raise ConfigError(f"{len(given)} names of classes were given; the adapter tells {len(known)} apart")
    found = given if given is not None else known
    if found is None:
        raise ConfigError(
            "the adapter was saved without names of its classes; give them in the order of the outputs with --classes "
            "FILE, one a line (classes=)"
        )
    return tuple(found)


def make_task(
    stored: Stored, folder: Path | None, classes: Sequence[str], model: str | nn.Module | None, checkpoint: str | None
) -> tuple[nn.Module, Task]:
    """The base of an adapter, which is not in it yet, and the task that runs it.

    Args:
        folder: of the adapter; None if it is not of this machine.
        classes: their names.
        model, checkpoint: as `load_predictor` takes them.

    Raises:
        ConfigError: the base is not to be had.
    """
    config, task = dict(stored.about.get("preprocessing", {})), task_of(stored)
    if task == CLIP:
        from .dual import fill, load_dual

        dual = load_dual(*_named(stored, folder, model, checkpoint)).eval()
        known = config.get("prompts") if list(classes) == stored.about.get("labels") else None
        return dual.model, ZeroShotClassification(
            dual, dual.form.config() | config, known or fill(config.get("template", "a photo of a {}"), classes)
        )
    if task in (TEXTS, VALUES, GENERATION):
        from .texts import TextClassification, TextGeneration, load_tokenizer, tokenizer_name

        spec, weights = _named(stored, folder, model, checkpoint)
        tokenizer = load_tokenizer(tokenizer_name(spec))
        made: Any = with_weights(spec, stored, weights)[0]
        if made.dtype in (torch.bfloat16, torch.float16):
            made.float()  # as recipes train: answers of half types depend on what else is in a batch
        kind = TextGeneration if task == GENERATION else TextClassification
        return made, kind(made, tokenizer, config)
    if isinstance(model, nn.Module):
        made = model
    else:
        spec, weights = _named(stored, folder, model, checkpoint)
        made, _ = with_weights(spec, stored, weights)
    if not {"input_size", "mean", "std"} <= config.keys():
        if getattr(made, "pretrained_cfg", None) is None:
            raise ConfigError(
                f"the adapter does not say how images are prepared for {stored.identity.shown}; save it again with "
                "save(model, folder, preprocessing={'input_size': ..., 'mean': ..., 'std': ...})"
            )
        config = data_config(made) | config
    return made, ImageClassification(made, config)


def data_config(model: Any) -> dict[str, Any]:
    """How images are prepared for a model of timm."""
    from timm.data import resolve_model_data_config

    known: dict[str, Any] = resolve_model_data_config(model)
    if (size := getattr(getattr(model, "patch_embed", None), "img_size", None)) is not None:
        known["input_size"] = (known["input_size"][0], *size)  # older ones tell that of the pretrained weights
    return known


def _named(
    stored: Stored, folder: Path | None, model: str | nn.Module | None, checkpoint: str | None
) -> tuple[str, str | None]:
    """A model by name, and a checkpoint: those that are given, else those of the adapter."""
    if isinstance(model, nn.Module):
        raise ConfigError(f"the task {task_of(stored)} needs more than a model: give its name, {FORMS}")
    return named(stored, folder, model, checkpoint)
