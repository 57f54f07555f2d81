"""Models by name: `timm/NAME`, `open_clip/NAME`, `transformers/NAME`, each also a folder, with the head that a saved
adapter brings along."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..storage.stored import Stored

FORMS = "timm/NAME, timm/local-dir:FOLDER, open_clip/NAME or transformers/FOLDER"

CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "image-multilabel-classification": "AutoModelForImageClassification",
    "image-regression": "AutoModelForImageClassification",
    "image-ordinal-regression": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "text-regression": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
}
"""The class of transformers that makes a model for a task."""


def on_meta(spec: str) -> tuple[nn.Module, Any]:
    """A model on the meta device, and an input for it.

    Raises:
        ConfigError: there is no such model.
    """
    import torch

    with torch.device("meta"):
        return _create(spec, None, None, False)


def with_weights(spec: str, stored: Stored | None, checkpoint: str | None = None) -> tuple[nn.Module, Any]:
    """A model in eval mode that a saved adapter can be loaded into, and an input of two samples for it.

    Args:
        stored: the adapter; the model gets as many classes as its trained head has. None for its own.
        checkpoint: a file with the weights, as state dict (safetensors, or what torch.save wrote), or for open_clip the
            tag of published ones. None for those that timm or the folder has.

    Raises:
        ConfigError: there is no such model, or its weights are not to be had.
    """
    import torch

    from .network import failing_fast

    with failing_fast(not Path(_parts(spec)[1]).is_dir()), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = _create(spec, stored, checkpoint, True)
    return model.eval(), example


def source_of(stored: Stored, folder: Path | None) -> tuple[str, str | None]:
    """Where the base of an adapter is to be had: a model for `with_weights`, and a checkpoint.

    Args:
        folder: of the adapter, to which folders of models are relative; None if it is not of this machine.

    Raises:
        ConfigError: the adapter does not tell.
    """
    about, name = stored.about.get("preprocessing", {}), stored.identity.name
    found = about.get("model")
    if found is None and name is not None:
        found = name if name.startswith("timm/") else f"transformers/{name}"
    if found is None or (folder is None and _is_folder(found)):
        raise ConfigError(
            f"the adapter does not say where its base is to be had; it was made for {stored.identity.shown} "
            f"({stored.identity.class_name}). Give it with --model (model=): {FORMS}"
        )
    checkpoint = about.get("checkpoint")
    if folder is not None:
        found = _resolved(found, folder)
        checkpoint = checkpoint and _resolved(checkpoint, folder)
    return found, checkpoint


def named(stored: Stored, folder: Path | None, model: str | None, checkpoint: str | None) -> tuple[str, str | None]:
    """A model by name, and a checkpoint: those that are given, else those of the adapter; see `source_of`."""
    if model is not None:
        return model, checkpoint
    found, known = source_of(stored, folder)
    return found, checkpoint or known


def relative_source(spec: str, folder: str | os.PathLike[str]) -> str:
    """A model or a checkpoint as an adapter names it: what is a path on this machine, relative to its folder."""
    head, path = _parts(spec)
    if (spec.startswith(("timm/", "open_clip/")) and not head) or not Path(path).exists():
        return spec
    relative = os.path.relpath(Path(path).resolve(), Path(folder).resolve())
    return head + (relative if relative.startswith(".") else f"./{relative}")


def _parts(spec: str) -> tuple[str, str]:
    """`timm/local-dir:FOLDER` as `timm/local-dir:` and `FOLDER`."""
    for head in ("timm/local-dir:", "open_clip/local-dir:", "transformers/"):
        if spec.startswith(head):
            return head, spec.removeprefix(head)
    return "", spec


def _is_folder(spec: str) -> bool:
    return _parts(spec)[1].startswith(("./", "../", "/"))


def _resolved(spec: str, folder: Path) -> str:
    head, path = _parts(spec)
    return head + os.path.normpath(folder / path) if path.startswith(("./", "../")) else spec


def _create(spec: str, stored: Stored | None, checkpoint: str | None, weights: bool) -> tuple[nn.Module, Any]:
    library, _, name = spec.partition("/")
    makers = {"timm": _timm, "open_clip": _open_clip, "transformers": _transformers}
    if library not in makers or not name:
        raise ConfigError(f"{spec!r} is not of the form {FORMS}")
    try:
        return makers[library](name, stored, checkpoint, weights)
    except Exception as error:  # of three libraries, a network and files: whatever it is, the name is what to look at
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        reason = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        more = weights and checkpoint is None
        hint = "; --checkpoint gives its weights from a file, --model a base on disk" if more else ""
        raise ConfigError(f"{spec} cannot be made: {reason.strip().rstrip('.')}{hint}") from error


def _timm(name: str, stored: Stored | None, checkpoint: str | None, weights: bool) -> tuple[nn.Module, Any]:
    import timm
    import torch

    from ..structure.heads import head_names

    about = _about(stored)
    model: Any = timm.create_model(name, pretrained=weights and checkpoint is None)
    size = tuple(about.get("input_size") or model.pretrained_cfg["input_size"])
    if size[1:] != tuple(model.pretrained_cfg["input_size"])[1:]:
        model = _of_size(name, size, weights and checkpoint is None)
    for head in head_names(model) if stored is not None else ():
        weight = stored.parts.get(f"{head}.weight") if stored is not None else None
        if weight is not None and weight.dim() == 2 and len(weight) != model.num_classes:
            model.reset_classifier(len(weight))
            break
    if checkpoint is not None:
        _fill(model, checkpoint, stored)
    return model, torch.randn(2 if weights else 1, *size)


def _of_size(name: str, size: tuple[int, ...], weights: bool) -> Any:
    """For images of another size, where that makes another model."""
    import timm

    try:
        return timm.create_model(name, pretrained=weights, img_size=size[1:])
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, pretrained=weights)  # a convolutional network reads any size


def _open_clip(name: str, stored: Stored | None, checkpoint: str | None, weights: bool) -> tuple[nn.Module, Any]:
    import open_clip
    import torch

    local = name.startswith(("local-dir:", "hf-hub:"))
    if weights and checkpoint is None and not local:
        raise ConfigError("open_clip needs --checkpoint with a file or the tag of published weights")
    device = "cpu" if weights else "meta"
    if checkpoint is not None and Path(checkpoint).exists():
        model: Any = open_clip.create_model(name, device=device)
        _fill(model, checkpoint, stored)
    else:
        model = open_clip.create_model(name, pretrained=checkpoint, device=device, require_pretrained=weights)
    size, length = model.visual.image_size, getattr(model, "context_length", 77)
    sides = size if isinstance(size, tuple) else (size, size)
    n = 2 if weights else 1
    return model, (torch.randn(n, 3, *sides), torch.zeros(n, length, dtype=torch.int64))


def _transformers(name: str, stored: Stored | None, checkpoint: str | None, weights: bool) -> tuple[nn.Module, Any]:
    import torch
    import transformers

    model: Any
    config = transformers.AutoConfig.from_pretrained(name)
    about, labels = _about(stored), stored.about.get("labels") if stored is not None else None
    known = [getattr(transformers, made, None) for made in config.architectures or ()]
    cls: Any = next((made for made in known if made is not None), None)
    if about.get("task") in CLASSES:
        cls = getattr(transformers, CLASSES[about["task"]])
        steps = about["task"] == "image-ordinal-regression"  # from each class to the next
        config.num_labels = len(about.get("targets") or labels or (None,)) - steps
    if weights and checkpoint is None:
        with _quiet():
            model, told = (cls or transformers.AutoModel).from_pretrained(
                name, config=config, ignore_mismatched_sizes=True, output_loading_info=True
            )
        _check_whole(name, told, set(stored.parts) if stored is not None else set())
    elif cls is not None and hasattr(cls, "from_config"):
        model = cls.from_config(config)
    else:
        model = cls(config) if cls is not None else transformers.AutoModel.from_config(config)
    if checkpoint is not None:
        _fill(model, checkpoint, stored)
    n = 2 if weights else 1
    tokens = torch.zeros(n, 8, dtype=torch.int64)
    if model.main_input_name == "pixel_values":
        return model, {"pixel_values": torch.randn(n, 3, config.image_size, config.image_size)}
    return model, {"input_ids": tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})


def _check_whole(name: str, told: Mapping[str, Any], brought: set[str]) -> None:
    """Whether a base has all weights that the adapter does not bring: others would be random, in every process anew.

    Raises:
        ConfigError: it has not.
    """
    other = [pair[0] for pair in told.get("mismatched_keys", ())]
    if new := sorted({*told.get("missing_keys", ()), *other} - brought):
        raise ConfigError(f"{name} lacks {new[0]}, or has it in another shape, and the adapter does not bring it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and its report of a new head, which the adapter fills."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _about(stored: Stored | None) -> Mapping[str, Any]:
    """What an adapter says of its task."""
    return stored.about.get("preprocessing", {}) if stored is not None else {}


def _fill(model: nn.Module, checkpoint: str, stored: Stored | None) -> None:
    """Give a model the weights of a file; parts that the adapter brings along may be missing or of another shape."""
    state = _state_dict(Path(checkpoint))
    there = model.state_dict()
    brought = set(stored.parts) if stored is not None else set()
    state = {name: t for name, t in state.items() if name not in brought or t.shape == there[name].shape}
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if name not in brought]
    if missing or result.unexpected_keys:
        what = f"lacks {missing[0]}" if missing else f"has {result.unexpected_keys[0]}, which the model has not"
        raise ConfigError(f"{checkpoint} is not of this model: it {what}")


def _state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return loaded.get("state_dict", loaded)
