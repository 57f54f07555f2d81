"""A pretrained timm model by name, with errors that say what to do."""

from __future__ import annotations

import difflib
from typing import Any

import timm
import timm.data
from timm.layers import DropPath
from torch import nn

from uora_vision.predict.network import failing_fast

from ..data.augment import InputFormat
from ..errors import ModelError

NO_DROP_PATH = "{!r} has no blocks that --drop-path could skip; leave it out"


def create_backbone(
    name: str, classes: int, keep_head: bool = False, img_size: int | None = None, drop_path: float = 0.0
) -> nn.Module:
    """The pretrained model with a new head for `classes`, or with its own head.

    Args:
        name: a timm name, `hf-hub:OWNER/NAME`, or `local-dir:FOLDER` (what `timm.models.save_for_hf` wrote).
        classes: number of classes in the data.
        keep_head: train on from the model's own head.
        img_size: height and width of its images; None for what it was pretrained on.
        drop_path: the rate at which blocks are skipped in training, in the last one; in the first it is 0.

    Raises:
        ModelError: unknown name, weights out of reach, a kept head with fewer outputs than classes, or no block that
            could be skipped.
    """
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() shows all."
        raise ModelError(f"no timm model is called {name!r}; {hint}")
    options: dict[str, Any] = {} if keep_head else {"num_classes": classes}
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        with failing_fast(not name.startswith("local-dir:")):
            model = _create(name, options, img_size)
    except Exception as error:  # the hub, safetensors and timm each raise types of their own
        if "drop_path_rate" in str(error):
            raise ModelError(NO_DROP_PATH.format(name)) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = (
            "Check the folder."
            if name.startswith("local-dir:")
            else "Without a network, give weights on disk with --model local-dir:FOLDER, or try --demo."
        )
        raise ModelError(f"cannot load pretrained weights for {name!r}: {reason} {advice}") from error
    if drop_path and not any(getattr(m, "drop_prob", 0) for m in model.modules() if isinstance(m, DropPath)):
        raise ModelError(NO_DROP_PATH.format(name))
    if not keep_head:
        model.reset_classifier(classes)  # timm keeps a pretrained head that happens to have as many classes
    elif model.num_classes < classes:
        raise ModelError(
            f"the data has {classes} classes but the head of {name!r} has {model.num_classes}; "
            "choose fewer with --classes, or drop --keep-head to train a new head"
        )
    return model


def _create(name: str, options: dict[str, Any], img_size: int | None) -> nn.Module:
    if img_size is None:
        return timm.create_model(name, pretrained=True, **options)
    try:
        model = timm.create_model(name, pretrained=True, img_size=img_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, pretrained=True, **options)  # a convolutional network reads any size
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, img_size, img_size)}
    return model


def input_format(model: nn.Module) -> InputFormat:
    """What the model was made to read."""
    config = timm.data.resolve_model_data_config(model)
    if config["input_size"][0] != 3:
        raise ModelError(f"the model reads {config['input_size'][0]} channels; this recipe has images of 3")
    return InputFormat(config["input_size"][1:], config["mean"], config["std"], config["interpolation"])


def crop_share(model: nn.Module) -> float:
    """The share of an image's shorter side that the model was measured on when it was pretrained."""
    return float(timm.data.resolve_model_data_config(model)["crop_pct"])
