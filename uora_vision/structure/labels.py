"""Row numbers that follow the output of a projection through views and copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..private import tree_leaves, tree_map_only


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LIMIT = 1 << 25  # elements above which labels that would take memory are dropped

# Movements that leave every element in its place; that make views; that put tensors together; and others.
CASTS = words("to float half bfloat16 double type type_as cuda cpu contiguous clone detach requires_grad data real")

VIEWS = words("""view view_as permute transpose swapaxes swapdims adjoint t T mT unbind chunk split split_with_sizes
    tensor_split getitem select narrow squeeze unsqueeze expand expand_as broadcast_to movedim moveaxis diagonal unfold
    unflatten""")

JOINS = words("cat concat concatenate stack")

MOVES = words("""reshape reshape_as flatten ravel roll flip rot90 repeat repeat_interleave tile hstack vstack pad
    pixel_shuffle pixel_unshuffle channel_shuffle index_select gather view_as_complex view_as_real
    """).union(CASTS, VIEWS, JOINS)

# Labels of a tensor, each of its shape: numbers of the rows that its elements come from, 0 for none. All rows of all
# parameters are numbered through. On the CPU, floats since every movement takes those, and mostly expanded, so without
# memory. A sum of rows (rotary embedding) has several labels, as has a parameter: the row numbers along each axis.
Labels = tuple[Tensor, ...]


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def pick(args: Any, kwargs: Any, position: int, name: str) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)


def spread(column: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """(n,) laid along one axis of a shape that has n there."""
    view = [1] * len(shape)
    view[axis] = len(column)
    return column.view(view).expand(shape)


def thinned(rows: Tensor) -> Tensor:
    """The same values with every expanded axis cut to 1."""
    return rows[tuple([slice(1) if step == 0 else slice(None) for step in rows.stride()])]


def compact(rows: Tensor) -> Tensor:
    """The same, expanded along every axis along which it does not vary, where that saves much."""
    thin = thinned(rows)
    for axis in range(thin.dim()) if thin.numel() > 1 << 14 else ():
        first = thin.narrow(axis, 0, 1)
        thin = first if (thin == first).all() else thin
    return thin.expand(rows.shape)


def _cut(pieces: Sequence[Tensor], dim: int) -> list[Tensor]:
    """What is to be joined along an axis, with every other axis cut to 1 that is expanded in all of it."""
    axes = [k for k in range(pieces[0].dim()) if k != dim % pieces[0].dim()]
    cut = [k for k in axes if all(piece.stride(k) == 0 for piece in pieces)]
    return [piece[tuple([slice(1) if k in cut else slice(None) for k in range(piece.dim())])] for piece in pieces]


def along(rows: Tensor, axis: int) -> Tensor | None:
    """The row numbers along one axis, if it is there and there only that they vary."""
    lines = thinned(rows).movedim(axis, 0).flatten(1)
    column = lines[:, 0]
    varies = len(column) > 1 and bool((column != column[0]).any())
    return column if varies and bool((lines == column[:, None]).all()) else None


def collapsed(labels: Labels, out: Tensor, dim: Any, keepdim: bool) -> Labels:
    """Labels after an operation within axes along which they do not vary: a reduction, or one on space alone."""
    low, high = ([getattr(thinned(rows), f)(dim, keepdim) for rows in labels] for f in ("amin", "amax"))
    same = all(map(torch.equal, low, high)) and all(rows.dim() == out.dim() for rows in low)
    return tuple(rows.expand(out.shape) for rows in low) if same else ()


def labels_after(
    name: str, func: Any, args: Any, kwargs: Any, outs: list[Tensor], labels: dict[int, Labels]
) -> list[Labels]:
    """Labels of the outputs of a movement: what was done to the tensors is done to their labels, given by id."""
    if name in CASTS:
        return [tuple(rows for rows in next(iter(labels.values())) if rows.shape == out.shape) for out in outs]
    if name == "pad":  # whatever the value, it comes from no row
        args, kwargs = args[:3], {key: value for key, value in kwargs.items() if key != "value"}
    func = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}.get(name, func)  # labels lie otherwise in memory
    others = [t for t in tensors_in((args, kwargs)) if id(t) not in labels]  # indices, and shapes to follow
    large = sum(out.numel() for out in outs) > LIMIT and (name not in VIEWS or any(t.dim() for t in others))
    blind = any(t.is_meta for t in others) and not name.endswith("_as")  # an index without values
    results: list[Labels] = [() for _ in outs]
    for turn in range(0 if large or blind else max(map(len, labels.values()), default=0)):

        def swapped(t: Tensor, turn: int = turn) -> Tensor:
            if id(t) not in labels:
                return t if t.is_meta else t.cpu()
            known = labels[id(t)]
            return known[turn] if turn < len(known) else torch.zeros((), device="cpu").expand(t.shape)

        given, named = tree_map_only(Tensor, swapped, (args, kwargs))
        if name in JOINS and given:
            given = (_cut(given[0], pick(given, named, 1, "dim") or 0), *given[1:])
        for k, rows in enumerate(tensors_in(func(*given, **named))):
            rows = rows.expand(outs[k].shape) if name in JOINS else rows
            results[k] += (compact(rows),) if rows.shape == outs[k].shape else ()
    return results


def atoms(size: int, groups: Iterable[Tensor]) -> tuple[tuple[int, ...], ...]:
    """The coarsest partition of range(size) in which every group is a union of parts."""
    codes = torch.zeros(size, dtype=torch.long, device="cpu")
    for rows in groups:
        codes *= 2
        codes[rows] += 1
        codes = torch.unique(codes, return_inverse=True)[1]
    order, counts = torch.sort(codes, stable=True)[1], torch.bincount(codes)
    return tuple(sorted(tuple(part.tolist()) for part in order.split(counts.tolist())))
