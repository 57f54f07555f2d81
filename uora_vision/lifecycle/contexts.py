"""Contexts: blocks in which other adapters sit in a model than before and after."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ..errors import warn
from ..structure.survey import Survey
from .library import Library, check_movable, library_of, strangers


class Context:
    """A `with` in which other adapters sit in a model than before.

    Args:
        kind: `disabled` or `route`.
        undo: what has to be done first to leave it; can be repeated.
    """

    def __init__(self, model: nn.Module, library: Library, kind: str, undo: Callable[[], None] | None = None) -> None:
        survey = Survey(model)
        check_movable(survey, library)
        self.model, self.library, self.kind, self.first = model, library, kind, undo
        self.before = library.active, library.owner
        if strange := strangers(survey, library):
            warn(
                f"{strange[0]} trains, but not as a part of the adapter {library.active!r}: it stays as it is where "
                f"the adapter is {'disabled' if kind == 'disabled' else 'routed'}. Name it in train= to have what the "
                "base has there."
            )

    def open(self) -> None:
        self.library.owner = threading.get_ident()
        self.library.contexts = [*self.library.contexts, self]

    def leave(self) -> None:
        """Everything as before; nothing if that is done already."""
        if self not in self.library.contexts:
            return
        name, owner = self.before
        with self.library.undo(self.model, name):
            if self.first:
                self.first()
            self.library.switch(self.model, name)
            self.library.contexts = [c for c in self.library.contexts if c is not self]
            self.library.owner = owner

    def leave_again(self) -> None:
        """If leaving was interrupted, once more. Where memory is so short that this fails as well, a model stays
        disabled, and says so; one with a mixed batch is lost."""
        try:
            self.leave()
        except BaseException:
            if self in self.library.contexts:
                self.library.contexts = [c for c in self.library.contexts if c is not self]
                self.library.broken |= self.kind == "route"
            raise


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model is the base, with its own head: `with disabled(model): model(x)`. Adapters can be activated
    there, but not added, merged or taken out; the one of before is active again afterwards. What trains and is no part
    of the adapter, as a part of the base that was unfrozen by hand, stays as it is, with a warning.

    Raises:
        StateError: the model is not injected, is spread over processes, has a mixed batch, or another thread has
            switched its adapters.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), rank=4)
        >>> x, linear = torch.randn(2, 5, 16), uora.adapters(model)["linear1"]
        >>> before = model(x)
        >>> _ = linear.b.data.normal_()
        >>> with uora.disabled(model):
        ...     torch.allclose(model(x), before, atol=1e-5)
        True
    """
    library = library_of(model)
    context = Context(model, library, "disabled")
    try:
        try:
            with library.undo(model):
                context.open()
                library.switch(model, None)
            yield model
        finally:
            context.leave()
    finally:
        context.leave_again()
