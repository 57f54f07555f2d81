"""Weights of nn.Linear that are stored quantised: by bitsandbytes (4-bit, 8-bit) or torchao.

Such a weight can be neither folded nor read, but its layer can be called: y = base(x) + branch. What it is, is told by
the class of the tensor, so that neither library is imported before a model of theirs is at hand.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..private import BITSANDBYTES_PACKS, packed_for_inference

_PLAIN = (Tensor, nn.Parameter)


def is_quantised(weight: object) -> bool:
    """Whether a tensor holds codes of a known kind. One that bitsandbytes has still to quantise (it does so when the
    model is moved to its device) does not yet."""
    if type(weight) in _PLAIN or not isinstance(weight, Tensor):
        return False
    known = _kind(type(weight))
    if known == "Params4bit":
        return getattr(weight, "quant_state", None) is not None
    return weight.dtype == torch.int8 if known == "Int8Params" else known is not None


def is_quantised_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and is_quantised(module._parameters.get("weight"))


def full_shape(module: nn.Module, weight: Tensor) -> torch.Size:
    """Shape of a weight before it was quantised: 4-bit codes are stored as (out * in / 2, 1)."""
    if isinstance(module, nn.Linear) and is_quantised(weight):
        return torch.Size((module.out_features, module.in_features))
    return weight.shape


def own_forward(module: Any, forward: Any, x: Tensor) -> Tensor:
    """What the quantised layer itself computes, with its own gradient for x.

    On CPUs with AVX512-BF16, bitsandbytes packs a 4-bit weight for inference at the first forward in eval mode, in
    place: its scales are rounded to bfloat16, and it gives no gradient any more. An adapted layer is kept from that.

    Raises:
        StateError: the weight was packed before it was adapted, and a gradient is asked for.
    """
    if torch.is_grad_enabled() and packed_for_inference(module._parameters["weight"]):
        raise StateError(
            "bitsandbytes has packed a 4-bit weight for inference on this CPU, which gives no gradient for the input. "
            "Inject the model before it is first called in eval mode, or load it again."
        )
    packs = module.__dict__.get(BITSANDBYTES_PACKS, False)
    if not packs:
        return cast(Tensor, forward(module, x))
    setattr(module, BITSANDBYTES_PACKS, False)
    try:
        return cast(Tensor, forward(module, x))
    finally:
        setattr(module, BITSANDBYTES_PACKS, packs)


def dequantised(module: Any) -> Tensor:
    """The weight that the codes stand for, (out, in) in float32.

    Raises:
        StateError: bitsandbytes has packed the weight for inference on a CPU.
    """
    weight: Any = module._parameters["weight"]
    if packed_for_inference(weight):
        raise StateError("bitsandbytes has packed a 4-bit weight for inference; state_dict() of the model unpacks it.")
    kind = _kind(weight.__class__)
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(weight.data, weight.quant_state)
    elif kind == "Int8Params":
        scales = module.state.SCB if weight.SCB is None else weight.SCB  # the first forward moves them
        dense = weight.data.float() * (scales.float() / 127)[:, None]
    else:
        dense = weight.dequantize()
    return dense.detach().float()


def float_type(weight: Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The type of the inputs that a quantised weight takes; bitsandbytes' take any, and get `otherwise`."""
    return weight.dtype if _kind(type(weight)) == "TorchAOBaseTensor" else otherwise


@cache
def _kind(cls: type) -> str | None:
    """Name of the library's class that a tensor's class is or comes from."""
    known = {("bitsandbytes", "Params4bit"), ("bitsandbytes", "Int8Params"), ("torchao", "TorchAOBaseTensor")}
    return next((c.__name__ for c in cls.__mro__ if (c.__module__.partition(".")[0], c.__name__) in known), None)
