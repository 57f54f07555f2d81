"""Models by name, for the command line: `timm/NAME`, `open_clip/NAME`, `transformers/FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..storage.stored import Stored

FORMS = "timm/NAME, open_clip/NAME or transformers/FOLDER"


def on_meta(spec: str) -> tuple[nn.Module, Any]:
    """A model on the meta device, and an input for it.

    Raises:
        ConfigError: there is no such model.
    """
    import torch

    with torch.device("meta"):
        return _create(spec, None, None, False)


def with_weights(spec: str, stored: Stored, checkpoint: str | None = None) -> tuple[nn.Module, Any]:
    """A model in eval mode that a saved adapter can be loaded into, and an input of two samples for it.

    Args:
        stored: the adapter; the model gets as many classes as its trained head has.
        checkpoint: a file with the weights, as state dict (safetensors, or what torch.save wrote), or for open_clip the
            tag of published ones. None for those that timm or the folder has.

    Raises:
        ConfigError: there is no such model, or its weights are not to be had.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = _create(spec, stored, checkpoint, True)
    return model.eval(), example


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
        hint = "; --checkpoint gives its weights from a file" if weights and checkpoint is None else ""
        raise ConfigError(f"{spec} cannot be made: {reason.strip().rstrip('.')}{hint}") from error


def _timm(name: str, stored: Stored | None, checkpoint: str | None, weights: bool) -> tuple[nn.Module, Any]:
    import timm
    import torch

    options: dict[str, Any] = {}
    if stored is not None:
        heads: Any = getattr(timm.get_pretrained_cfg(name), "classifier", None)
        for head in [heads] if isinstance(heads, str) else heads or ():
            if (weight := stored.parts.get(f"{head}.weight")) is not None:
                options["num_classes"] = len(weight)
    model: Any = timm.create_model(name, pretrained=weights and checkpoint is None, **options)
    if checkpoint is not None:
        _fill(model, checkpoint, stored)
    return model, torch.randn(2 if weights else 1, *model.pretrained_cfg["input_size"])


def _open_clip(name: str, stored: Stored | None, checkpoint: str | None, weights: bool) -> tuple[nn.Module, Any]:
    import open_clip
    import torch

    if weights and checkpoint is None:
        raise ConfigError("open_clip needs --checkpoint with a file or the tag of published weights")
    device = "cpu" if weights else "meta"
    if checkpoint is not None and Path(checkpoint).exists():
        model: Any = open_clip.create_model(name, device=device)
        _fill(model, checkpoint, stored)
    else:
        model = open_clip.create_model(name, pretrained=checkpoint, device=device)
    size, length = model.visual.image_size, getattr(model, "context_length", 77)
    sides = size if isinstance(size, tuple) else (size, size)
    n = 2 if weights else 1
    return model, (torch.randn(n, 3, *sides), torch.zeros(n, length, dtype=torch.int64))


def _transformers(name: str, stored: Stored | None, checkpoint: str | None, weights: bool) -> tuple[nn.Module, Any]:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    known = [getattr(transformers, made, None) for made in config.architectures or ()]
    cls: Any = next((made for made in known if made is not None), None)
    if weights and checkpoint is None:
        model: Any = (cls or transformers.AutoModel).from_pretrained(name)
    else:
        model = cls(config) if cls is not None else transformers.AutoModel.from_config(config)
    if checkpoint is not None:
        _fill(model, checkpoint, stored)
    n = 2 if weights else 1
    tokens = torch.zeros(n, 8, dtype=torch.int64)
    if model.main_input_name == "pixel_values":
        return model, {"pixel_values": torch.randn(n, 3, config.image_size, config.image_size)}
    return model, {"input_ids": tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder else {})


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
