"""Errors raised on purpose derive from `UoraError` and the built-in type that fits; warnings are `UoraWarning`s."""

import sys
import warnings


class UoraWarning(UserWarning):
    """Something works, and probably not as it was meant: a part that stays frozen, a vector that decays.

    Example:
        >>> import warnings, uora_vision as uora
        >>> from torch import nn
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", uora.UoraWarning)  # stop at them
        ...     uora.inject(nn.TransformerEncoderLayer(16, 2, 32).bfloat16(), rank=4)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        uora_vision.errors.UoraWarning: 4 weights (self_attn.in_proj_weight, ...) are read by the ...
    """


class UoraError(Exception):
    """Base of all errors of uora_vision.

    Example:
        >>> import uora_vision as uora
        >>> try:
        ...     uora.UoraConfig(rank=0)
        ... except uora.UoraError as error:
        ...     print(error)
        rank must be a whole number of at least 1, got 0
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UoraError, ValueError):
    """An option has a value that cannot be used.

    Example:
        >>> import uora_vision as uora
        >>> uora.UoraConfig(dropout=1.5)
        Traceback (most recent call last):
        uora_vision.errors.ConfigError: dropout must be in [0, 1), got 1.5
    """


class OptionError(UoraError, TypeError):
    """An option does not exist, or has the wrong type.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), r=8)
        Traceback (most recent call last):
        uora_vision.errors.OptionError: no option 'r'; did you mean 'rank'?
    """


class TargetError(UoraError, ValueError):
    """What was asked to be adapted is not in the model.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), targets="q_porj")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        uora_vision.errors.TargetError: no projection matched 'q_porj'; this model has: attn.q (1), attn.k (1), ...
    """


class StateError(UoraError, RuntimeError):
    """The model is not in a state in which this can be done: already injected, or not injected.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> uora.merge(nn.Linear(4, 4))
        Traceback (most recent call last):
        uora_vision.errors.StateError: this Linear has no adapter; call inject() or load() on it first
    """


class DeadAdapterError(UoraError, RuntimeError):
    """Some adapters receive no gradient: they would train nothing.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
        >>> model.forward = lambda x: model["used"](x)
        >>> uora.inject(model, rank=2, targets="other", example_input=torch.randn(3, 4))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        uora_vision.errors.DeadAdapterError: 1 of 2 adapters would not train on this input: unused...
    """


class HubError(UoraError, OSError):
    """A repository on the Hugging Face hub cannot be read or written.

    Example:
        >>> import uora_vision as uora
        >>> isinstance(uora.HubError("no network"), OSError)
        True
    """


class ExportError(UoraError, ValueError):
    """An adapter cannot be written in the form that was asked for.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> from uora_vision import export
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> export.to_peft_lora(model, "adapter")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        uora_vision.errors.ExportError: PEFT's LoRA cannot express this adapter. ...
    """


class DataError(UoraError, ValueError):
    """Data cannot be used: an image that cannot be read, a table without the column that is needed.

    Example:
        >>> import uora_vision as uora
        >>> from uora_vision.predict.pixels import pixels
        >>> pixels(b"no image", "cat.jpg")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        uora_vision.errors.DataError: cannot read cat.jpg: ...
    """


class FormatError(UoraError, ValueError):
    """A saved adapter is damaged, of another version, or made for another model.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> uora.load(nn.Linear(4, 4), "nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        uora_vision.errors.FormatError: nowhere/adapter_model.safetensors does not exist; ...
    """


def printable(text: str, most: int = 4000) -> str:
    """A text that may hold strings out of foreign files, for a terminal: control characters and what no encoding has
    are shown as escapes, and of a very long text the beginning."""
    shown = text if len(text) <= most else f"{text[:most]}..."
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in shown)


def warn(message: str) -> None:
    """Warn by a `UoraWarning` at the line that called this package, however deep in it this is."""
    level, frame = 2, sys._getframe(1)
    ours = (__package__, "contextlib")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ours:
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(message), UoraWarning, stacklevel=level)
