"""The product that projections of one input have in common: q, k and v of an attention, gate and up of an MLP.

Shapes: x (..., in), A (r, in), u = x A^T (N, r).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor


class Reduced:
    """u = x A^T of the last input.

    Only results of operations that take part in the gradient are remembered. An input that the caller holds could come
    back in another forward, after A was redrawn or while a graph is captured; these cannot.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, Any, tuple[Any, ...], Tensor] | None = None

    def __reduce__(self) -> Any:
        """Copies and pickles start empty."""
        return Reduced, ()

    def __call__(self, source: Tensor, x: Tensor, a: Sequence[Tensor]) -> Tensor | None:
        """(..., in) -> u (N, r); None if it is not to be shared.

        Args:
            source: what the projections have in common.
            x: `source` in the type in which u is computed.
            a: A, if the roles share it.
        """
        if len(a) > 1 or torch.compiler.is_compiling() or source.grad_fn is None or torch.jit.is_tracing():
            return None
        key = (source._version, x.dtype, a[0].data_ptr(), a[0]._version)
        last = self._last  # read once: replicas of DataParallel run in threads
        if last is not None and last[0]() is source and last[1]() is a[0] and last[2] == key:
            return last[3]
        u = x.detach().reshape(-1, x.shape[-1]) @ a[0].to(x.dtype).t()
        self._last = (ref(source), ref(a[0]), key, u)
        return u
