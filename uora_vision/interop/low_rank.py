"""dW of an adapted weight as a product of two thin matrices, exact or of a smaller rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lifecycle.adapter import Adapter
from ..maths.forms import left_matrix


@torch.no_grad()
def factors(adapter: Adapter, out: int) -> tuple[Tensor, Tensor]:
    """L (out, n) and R (n, in) with dW = L R, float64. All d are in L, so roles of one weight share the rows of R.

    n is the rank of the adapter, and one more for each row that a role has of its own; directions that contribute
    nothing are left out, and n is never above the smaller side of the weight.

    Args:
        out: rows of the weight.
    """
    update = adapter.update().to(torch.float64)
    left, right = left_matrix(update, out), update.A[0]
    if len(update.A) > 1:
        left, right = _shared_and_own(
            left, update.A, adapter.bank.a(adapter.width, (adapter.origin, adapter.roles[0].name)).to(right)
        )
    used = left.any(dim=0)
    used[0] |= not used.any()
    left, right = left[:, used], right[used]
    if left.shape[1] <= min(out, adapter.width):
        return left, right
    delta = left @ right
    one = torch.eye(min(out, adapter.width), device=delta.device, dtype=delta.dtype)
    return (delta, one) if adapter.width < out else (one, delta)


def truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The closest product of a given rank, (out, k) and (k, in) with k <= rank, and its relative Frobenius distance.

    By the singular values of L R, which are those of a small matrix once both factors are made orthonormal by QR.
    """
    if rank >= left.shape[1]:
        return left, right, 0.0
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.t())
    u, s, v = torch.linalg.svd(r1 @ r2.t(), full_matrices=False)
    whole = s.norm()
    error = float(s[rank:].norm() / whole) if whole else 0.0
    root = s[:rank].sqrt()
    return q1 @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ q2.t(), error


def _shared_and_own(left: Tensor, a: tuple[Tensor, ...], shared: Tensor) -> tuple[Tensor, Tensor]:
    """L (out, roles r) and A of every role -> factors in which rows of A that all roles share are there once."""
    common = left.new_zeros(left.shape[0], len(shared))
    columns, rows = [], []
    for part, mine in zip(left.split(len(shared), dim=1), a, strict=True):
        own = (mine != shared).any(dim=1)
        common += part * ~own
        columns.append(part[:, own])
        rows.append(mine[own])
    return torch.cat([common, *columns], dim=1), torch.cat([shared, *rows])
