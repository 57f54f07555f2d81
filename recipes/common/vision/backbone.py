"""A pretrained timm model by name, with errors that say what to do."""

from __future__ import annotations

import difflib

import timm
import timm.data
from torch import nn

from uora_vision.predict.network import failing_fast

from ..data.augment import InputFormat
from ..errors import ModelError


def create_backbone(name: str, classes: int, keep_head: bool = False, img_size: int | None = None) -> nn.Module:
    """The pretrained model with a new head for `classes`, or with its own head.

    Args:
        name: a timm name, `hf-hub:OWNER/NAME`, or `local-dir:FOLDER` (what `timm.models.save_for_hf` wrote).
        classes: number of classes in the data.
        keep_head: train on from the model's own head.
        img_size: height and width of its images; None for what it was pretrained on.

    Raises:
        ModelError: unknown name, weights out of reach, or a kept head with fewer outputs than classes.
    """
    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() shows all."
        raise ModelError(f"no timm model is called {name!r}; {hint}")
    options = {} if keep_head else {"num_classes": classes}
    try:
        with failing_fast(not name.startswith("local-dir:")):
            model = _create(name, options, img_size)
    except Exception as error:  # the hub, safetensors and timm each raise types of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = (
            "Check the folder."
            if name.startswith("local-dir:")
            else "Without a network, give weights on disk with --model local-dir:FOLDER, or try --demo."
        )
        raise ModelError(f"cannot load pretrained weights for {name!r}: {reason} {advice}") from error
    if not keep_head:
        model.reset_classifier(classes)  # timm keeps a pretrained head that happens to have as many classes
    elif model.num_classes < classes:
        raise ModelError(
            f"the data has {classes} classes but the head of {name!r} has {model.num_classes}; "
            "choose fewer with --classes, or drop --keep-head to train a new head"
        )
    return model


def _create(name: str, options: dict[str, int], img_size: int | None) -> nn.Module:
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
