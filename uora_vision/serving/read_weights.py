"""Weights that a model reads itself, seen where it multiplies by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from ..errors import StateError
from ..private import is_wrapped, seen_through, tree_leaves, unwrapped

AddUpdate = Callable[[Tensor, Tensor, tuple[int, int] | None], Tensor]
"""(x, y, (first row, rows) of the weight) -> y plus the update of x."""


class Reads(TorchFunctionMode):
    """Sees where the model multiplies by a weight that it reads itself.

    Args:
        weights: by the address of their memory: path, tensor, and what adds the update to a product.
    """

    def __init__(self, weights: dict[int, tuple[str, Tensor, AddUpdate]]) -> None:
        super().__init__()
        self.weights = weights

    def end(self) -> None:
        """Whatever becomes of this mode, it sees nothing any more."""
        self.weights = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = [t for t in tree_leaves((args, kwargs)) if self._site(t) is not None]
        if not used:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name != "__get__" and any(map(is_wrapped, used)):
            raise StateError(f"{self._site(used[0])[0]} is taken inside torch.vmap, which cannot be routed")  # type: ignore[index]
        if func is F.multi_head_attention_forward:
            with self:
                return _attention(*args, **kwargs)
        if name == "linear":
            return self._product(*args, **kwargs)
        if name in ("matmul", "__matmul__", "mm") and len(args) == 2 and self._site(args[0]) is None:
            return self._product(args[0], args[1].transpose(-1, -2))
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and self._site(t) is None]
        if made and name != "__get__":
            raise StateError(f"{self._site(used[0])[0]} is taken by {name}(), which cannot be routed")  # type: ignore[index]
        return out

    def _site(self, t: Any) -> tuple[str, Tensor, AddUpdate] | None:
        if not isinstance(t, Tensor) or t.device.type == "meta":
            return None
        t = unwrapped(t)  # inside torch.vmap
        return self.weights.get(t.untyped_storage().data_ptr()) if t.layout is torch.strided else None

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T of some rows of a weight, with the update of each sample."""
        found = self._site(weight)
        assert found is not None
        path, whole, add_update = found
        width = whole.shape[1]
        first, rest = divmod(int(weight.storage_offset() - whole.storage_offset()), width)
        if (
            weight.stride() != whole.stride()
            or weight.shape[1:] != whole.shape[1:]
            or rest
            or not whole.is_contiguous()
        ):
            raise StateError(f"the model takes a part of {path} that is not some of its rows: it cannot be routed")
        return add_update(input, linear(input, weight, bias), (first, len(weight)))


_attention = seen_through(F.multi_head_attention_forward)
