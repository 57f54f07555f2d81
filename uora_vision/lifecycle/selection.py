"""Which adapters a model has, and which of them computes, trains and is saved."""

from __future__ import annotations

import threading

from torch import nn

from ..errors import StateError
from ..structure.survey import Survey
from .library import check_outside, check_switch, known_name, library_of


def adapter_names(model: nn.Module) -> list[str]:
    """Names of a model's adapters, in the order in which they came.

    Raises:
        StateError: the model is not injected.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> model = uora.inject(model, rank=2, name="cats")
        >>> uora.adapter_names(model)
        ['default', 'cats']
    """
    return list(library_of(model).entries)


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter, None while all are disabled.

    Raises:
        StateError: the model is not injected.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> uora.active_adapter(model)
        'default'
        >>> with uora.disabled(model):
        ...     print(uora.active_adapter(model))
        None
    """
    return library_of(model).active


def activate(model: nn.Module, name: str) -> nn.Module:
    """Make another adapter the active one: the one that computes, trains and is saved.

    Its parameters are objects of their own: make a new optimizer and `Reinitializer` for it, or use those of its last
    training. Those of the adapter that was active stay valid for when it is active again.

    Returns:
        The same model.

    Raises:
        StateError: the model is not injected, has no adapter of that name, is spread over processes, or trains parts of
            the base that its active adapter does not know of.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> uora.active_adapter(uora.activate(uora.inject(model, rank=4, name="cats"), "default"))
        'default'
    """
    library = library_of(model)
    known_name(library, name)
    check_switch(Survey(model), library)
    with library.undo(model, name):
        library.owner = threading.get_ident()
        library.switch(model, name)
    return model


def delete(model: nn.Module, name: str) -> nn.Module:
    """Forget an adapter that is not active. `remove` takes out all.

    Returns:
        The same model.

    Raises:
        StateError: the model is not injected, has no adapter of that name, or it is active.

    Example:
        >>> import uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> model = uora.inject(model, rank=2, name="cats")
        >>> uora.adapter_names(uora.delete(model, "default"))
        ['cats']
    """
    library = library_of(model)
    check_outside(library)
    known_name(library, name)
    if library.active == name:
        raise StateError(f"the adapter {name!r} is active; activate() another one first, or remove() all")
    del library.entries[name]
    return model
