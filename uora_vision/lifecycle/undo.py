"""Operations on a model that are done wholly or not at all, whatever interrupts them.

An interrupt from the keyboard, a memory error or an error of torch can come at any line. So each operation first notes
how the model and its library are, which costs no copy of any tensor, and anything that is raised before its end puts
them back.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..structure.survey import Survey


class Undo:
    """`with Undo(survey, ...):` an operation that is undone if it does not come to its end. Where one operation is part
    of another, both can be inside the same one.

    Args:
        survey: of the model as it is. Its modules are noted: their classes, attributes, hooks, parameters and buffers,
            and what trains. None if nothing of the model changes.
        others: objects that the operation changes besides, and modules outside the model.
    """

    def __init__(self, survey: Survey | None, others: Iterable[Any] = ()) -> None:
        modules, parameters = (survey.modules.values(), survey.parameters.values()) if survey else ((), ())
        objects = dict.fromkeys([*modules, *others])
        self._noted = [(x, type(x), dict(vars(x)), _copies(x)) for x in objects]
        self._training = [(held.tensor, held.tensor.requires_grad) for held in parameters]
        self._written: list[tuple[Tensor, Tensor]] = []
        self._broken: Any = None

    def or_break(self, library: Any) -> Undo:
        """What is marked `broken` if undoing fails as well."""
        self._broken = library
        return self

    def write(self, target: Tensor, value: Tensor) -> None:
        """Give a tensor other values in place."""
        self._written.append((target, target.detach().clone()))
        with torch.no_grad():
            target.copy_(value)

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            return
        for last in (False, False, True):  # a second interrupt can come meanwhile
            try:
                self.back()
                return
            except BaseException:
                if last:
                    if self._broken is not None:
                        self._broken.broken = True
                    raise

    def back(self) -> None:
        """Put everything back; can be repeated."""
        with torch.inference_mode(False), torch.no_grad():
            for target, value in reversed(self._written):
                target.copy_(value)
        for x, cls, attributes, copies in self._noted:
            for held, copy in copies:
                held.clear()
                held.update(copy)
            vars(x).clear()
            vars(x).update(attributes)
            if type(x) is not cls:
                x.__class__ = cls
        for p, trains in self._training:
            if p.requires_grad != trains:
                p.requires_grad_(trains)


def _copies(x: Any) -> list[tuple[Any, Any]]:
    """The dicts and sets among the attributes of an object, and what is in them."""
    return [(v, v.copy() if v else ()) for v in vars(x).values() if type(v) in (dict, OrderedDict, set)]


def is_other_thread(ident: int | None) -> bool:
    """Whether this is another thread than the present one, and still runs."""
    mine = ident is None or ident == threading.get_ident()
    return not mine and any(t.ident == ident for t in threading.enumerate())
