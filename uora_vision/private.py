"""Private parts of other libraries on which this package leans: here and nowhere else, each with its reason.

Tried with torch 2.6 to 2.15, transformers 5.8 to 5.24 and bitsandbytes 0.49. `tests/house/test_private.py` fails
when one of them goes away. Not listed are the three registries of nn.Module, `_parameters`, `_buffers` and `_modules`:
torch's own `parametrize` and `fully_shard` write to them as well, and every file that puts adapters on modules does.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx import _symbolic_trace
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only
from torch.utils.hooks import RemovableHandle

__all__ = [
    "BITSANDBYTES_PACKS",
    "TORCH_UNSENT",
    "ComputedFlatWeights",
    "forget_flat_weights",
    "in_backward",
    "in_symbolic_trace",
    "in_transform",
    "is_wrapped",
    "name_or_path",
    "no_steps_in_backward",
    "no_view",
    "node_in_backward",
    "packed_for_inference",
    "pads",
    "renew_flat_weights",
    "run_first",
    "seen_through",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "unseen",
    "unseen_by_subclasses",
    "unwrapped",
]

TORCH_UNSENT = "_ddp_params_and_buffers_to_ignore"
"""Where DistributedDataParallel looks for names of tensors that it shall not send. Its public method for the same sets
this attribute on a model that is wrapped already."""

BITSANDBYTES_PACKS = "support_avx512bf16_for_cpu"
"""Attribute by which a 4-bit layer of bitsandbytes knows that it may pack its weight for inference on a CPU."""


def packed_for_inference(weight: Any) -> bool:
    """Whether bitsandbytes has packed a 4-bit weight for inference on a CPU. No public attribute says so."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def name_or_path(model: nn.Module) -> str | None:
    """Where a model of transformers was loaded from. Its config keeps that in a private attribute only."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def run_first(handle: RemovableHandle) -> RemovableHandle:
    """Have a hook of nn.Module run before those of its kind that were registered earlier. load_state_dict's have no
    option for it."""
    hooks = handle.hooks_dict_ref()
    assert hooks is not None
    hooks.move_to_end(handle.id, last=False)
    return handle


def is_wrapped(t: Tensor) -> bool:
    """Whether a tensor is one that torch.vmap or torch.func.grad made to stand for another."""
    return is_functorch_wrapped_tensor(t)


def unwrapped(t: Tensor) -> Tensor:
    """The tensor that one inside torch.vmap or torch.func.grad stands for. There is no public way to its memory."""
    while is_functorch_wrapped_tensor(t):
        t = get_unwrapped(t)
    return t


def seen_through(function: Any) -> Any:
    """A function of torch.nn.functional that runs its own code while a TorchFunctionMode is active.

    Functions that torch lets others override ask `has_torch_function` first and hand themselves as a whole to an active
    mode, so the mode never sees the products inside. torch has no public way to ask for those: with the mode off the
    products are not seen, with it on the function comes back to the mode without end. A copy of the function whose
    globals answer that question with no is seen from inside; the function itself, which other threads may be running,
    stays as it is. To write attention again here would be the other way, and would follow torch's in nothing but hope.
    """
    own = {**function.__globals__, "has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@contextmanager
def no_steps_in_backward(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, a backward pass does not run what was registered to happen after a gradient is added up, as the step of
    an optimizer is that keeps no gradients. torch gives no public way to take such a hook off that another registered.
    """
    there = [hooks for p in parameters if (hooks := getattr(p, "_post_accumulate_grad_hooks", None))]
    before = [dict(hooks) for hooks in there]
    for hooks in there:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, known in zip(there, before, strict=True):
            hooks.update(known)


unseen = torch._C.DisableTorchFunction
"""A context in which no TorchFunctionMode sees anything; torch has no public one."""


unseen_by_subclasses = torch._C.DisableTorchFunctionSubclass
"""A context in which tensor subclasses do not see the functions that are called on them."""


def in_transform() -> bool:
    """Whether torch.vmap, torch.func.grad or another transform of torch.func runs."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def in_symbolic_trace() -> bool:
    """Whether torch.fx traces a model with stand-ins for its tensors. Its own name for that question has changed."""
    return getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)()


def in_backward() -> bool:
    """Whether a backward pass runs in this thread. A checkpoint recomputes its forward there."""
    return torch._C._current_graph_task_id() != -1


def node_in_backward() -> Any:
    """The node of the graph whose backward runs in this thread."""
    return torch._C._current_autograd_node()


def no_view(y: Tensor) -> Tensor:
    """A tensor that autograd takes for no view, of the same memory: a view that a Function returns may not be changed
    in place, and torch has no public way to say that the memory is the Function's own."""
    return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]


def pads(convolution: Any) -> list[int]:
    """How a convolution pads its input where it does not do so by zeros on both sides alike, as F.pad takes it."""
    return convolution._reversed_padding_repeated_twice


class ComputedFlatWeights:
    """A mixin for torch's LSTM and GRU, which read their tensors from a list that they keep: here it is made anew at
    every access, by the names under which the tensors are attributes of the module."""

    @property
    def _flat_weights(self: Any) -> list[Tensor | None]:
        there = self._parameters.keys() | self.__dict__.keys()  # a replica gets its tensors one by one
        return [getattr(self, name) if name in there else None for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        """torch renews the list when the module is moved; it is made from the parameters here."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        nn.Module.__setattr__(self, name, value)  # torch's own would keep the list up to date


def forget_flat_weights(module: nn.Module) -> None:
    """Take away the list of a module that has the mixin from now on."""
    if isinstance(module, torch.nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


def renew_flat_weights(module: nn.Module) -> None:
    """Make the list of a module that has the mixin no more."""
    if isinstance(module, torch.nn.RNNBase):
        module._init_flat_weights()
