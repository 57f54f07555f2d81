"""Torch functions by what they do to tensors: which of them multiply, and along which axes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .labels import pick, tensors_in, words

# These take shape, type or device from a tensor, and no values.
EXAMPLES = words("""zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty
    new_full new_tensor""")

SUMS = words("add sub radd rsub iadd isub lerp addcmul")

REDUCTIONS = words("mean amax amin max min sum")

WEIGHTED = words("linear conv1d conv2d conv3d")

PRODUCTS = words("matmul mm bmm addmm baddbmm addbmm grouped_mm grouped_mm_fallback einsum")

ATTENTIONS = words("scaled_dot_product_attention flex_attention multi_head_attention")


def name_of(func: Any) -> str:
    """`linear`; `getitem` for `Tensor.__getitem__`, `add` for `add_`, `T` for the getter of `Tensor.T`, `mm` for the
    overload `mm.default`."""
    name = getattr(func, "__name__", "")
    name = getattr(func.__self__, "__name__", "") if name == "__get__" else name
    name = name.partition(".")[0].strip("_")
    return "multi_head_attention" if "multi_head_attention" in name else name


def operands_of(name: str, args: Any, kwargs: Any) -> list[Tensor]:
    """The two tensors that are multiplied, the input first where the other is always a weight."""
    if name in WEIGHTED:
        return [pick(args, kwargs, 0, "input"), pick(args, kwargs, 1, "weight")]
    tensors = list(tensors_in((args, kwargs)))
    return tensors[1:3] if name in ("addmm", "baddbmm", "addbmm") else tensors[:2]


def free_axes(name: str, args: Any, operands: list[Tensor], out: Tensor) -> list[tuple[int, int, int]]:
    """Axes that only one operand has: (operand, its axis, the output's axis), counted from the end."""
    if name in WEIGHTED:
        weight = operands[1].dim()
        return [(1, -weight, -1 if name == "linear" else 1 - weight)]
    if name != "einsum":
        return [(0, -2, -2), (1, -1, -1)] if min(t.dim() for t in [*operands, out]) >= 2 else []
    inputs, _, output = str(args[0]).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or any("..." in term and not term.startswith("...") for term in (*terms, output)):
        return []
    alone = [(k, c) for k in range(2) for c in terms[k] if c in output and c not in terms[1 - k]]
    return [(k, terms[k].index(c) - len(terms[k]), output.index(c) - len(output)) for k, c in alone]
