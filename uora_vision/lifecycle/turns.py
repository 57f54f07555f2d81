"""When an adapter was the active one, so that a checkpoint is not recomputed with another than its forward ran with."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import StateError
from ..private import in_backward, node_in_backward

_KEPT = 64
"""How many turns are remembered. A backward of a graph that is older is refused as one of another adapter."""


class Turns:
    """The times at which an adapter was active, in the count that autograd keeps of operations."""

    def __init__(self) -> None:
        self._turns: list[tuple[int, float]] = [(0, float("inf"))]
        """Of each: the first operation, and the one past the last."""
        self._always = True
        """Whether no other adapter was ever active, as of most models: nothing is to be asked then."""

    def __reduce__(self) -> Any:
        """The count is of one process and thread; copies and pickles start anew."""
        return Turns, ()

    def begin(self, first: bool) -> None:
        """The adapter becomes the active one.

        Args:
            first: whether it is the model's only one.
        """
        if self._always and first:
            return
        past = [] if self._always else self._turns
        self._turns, self._always = [*past, (_now(), float("inf"))][-_KEPT:], False

    def end(self) -> None:
        """Another one does, or none."""
        self._turns = [*self._turns[:-1], (self._turns[-1][0], min(self._turns[-1][1], _now()))]
        self._always = False

    def check(self) -> None:
        """Whether a forward inside a backward, so of a checkpoint, is of a time at which this adapter was active.

        Raises:
            StateError: it is not.
        """
        if torch.compiler.is_compiling() or self._always or not in_backward():
            return
        node = node_in_backward()
        if node is not None:
            now = node._sequence_nr()  # type: ignore[attr-defined]
            if not any(first <= now < end for first, end in self._turns):
                raise StateError(
                    "a checkpoint is recomputed while another adapter is active than in its forward, which would give "
                    "that one the gradient. Call backward() before activate(), or do without checkpointing there."
                )


def _now() -> int:
    with torch.inference_mode(False), torch.enable_grad():
        made: Any = torch.zeros(1, device="cpu", requires_grad=True) * 1
        return int(made.grad_fn._sequence_nr())
