"""Parameters that torch's `fully_shard` (FSDP2) spreads over processes: DTensors, of which each process holds a shard.

A DTensor is known by its methods here, so that nothing of torch.distributed is imported where there are none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(t: Tensor) -> bool:
    return hasattr(t, "full_tensor")


def whole(t: Tensor) -> Tensor:
    """The full tensor. Of a sharded one every process must ask for it: they exchange their shards."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined]


def joined(tensors: list[Tensor]) -> Tensor:
    """torch.cat of the full tensors, for all processes in one exchange however many there are."""
    if not any(map(is_sharded, tensors)):
        return torch.cat(tensors)
    from torch.distributed.tensor import Shard

    first: Any = tensors[0]
    mesh, placements = first.device_mesh, first.placements
    axis = [k for k, placement in enumerate(placements) if not placement.is_replicate()]
    alike = all(is_sharded(t) and (t.device_mesh, t.placements) == (mesh, placements) for t in tensors)  # type: ignore[attr-defined]
    if not alike or len(axis) != 1 or placements[axis[0]] != Shard(0):
        return torch.cat([whole(t) for t in tensors])
    count, mine = mesh.size(axis[0]), mesh.get_local_rank(axis[0])
    out = torch.zeros(sum(map(len, tensors)), *first.shape[1:], dtype=first.dtype, device=first.device)
    row = 0
    for t in tensors:
        shard, rows = t.to_local(), len(t)  # type: ignore[attr-defined]
        start = row + mine * -(-rows // count)  # shards are as torch.chunk makes them; the last may be empty
        if shard.numel():
            out[start : start + len(shard)] = shard
        row += rows
    torch.distributed.all_reduce(out, group=mesh.get_group(axis[0]))  # each row is 0 in all processes but one
    return out


def clear(t: Tensor, mask: Tensor) -> None:
    """Set entries to 0 in place; the mask is of the full tensor, and the same in every process."""
    mask = mask.to(t.device)
    if is_sharded(t):
        from torch.distributed.tensor import DTensor, Replicate

        where: Any = t
        replicated = DTensor.from_local(mask, where.device_mesh, [Replicate()] * where.device_mesh.ndim)
        mask = replicated.redistribute(placements=where.placements).to_local()  # each its part; nothing is sent
        t = where.to_local()  # older versions of torch cannot fill a DTensor
    t.masked_fill_(mask, 0)


def writes(tensors: list[Tensor]) -> bool:
    """Whether this process writes a file of these tensors: any, unless they are sharded, then the first."""
    return not any(map(is_sharded, tensors)) or torch.distributed.get_rank() == 0


def class_name(model: nn.Module) -> str:
    """Name of the model's class; `fully_shard` puts a subclass of FSDPModule and of it in its place."""
    classes = type(model).__mro__
    own = next((i for i, c in enumerate(classes) if c.__name__ == "FSDPModule"), -1) + 1
    return classes[own].__name__
