"""The formula of the update: how the vectors scale B. All that depends on it is here; `forms.py` and `linear.py` only
know that dW = L A.

Shapes: L = diag(b) B diag(d) (rows of all roles, r), P = g^T u of the same shape, u = x A^T (N, r), y and g (N, out);
those of an update are in `update.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .update import Update


def lefts(update: Update, wide: torch.dtype, dtype: torch.dtype | None = None) -> Tensor:
    """diag(b) B diag(d) of each role, (sum of rows, r), span after span, computed in the type `wide`.

    Given a `dtype`, it is rounded to that as it is written, and not differentiable.
    """
    b, d, spans, _, B = update
    b, d = in_type(b, wide), in_type(d, wide)
    if len(B) == 1:
        # As B^T lies in the bank, row after row: the other way round the roles would be copied together.
        rows, roles = B[0].t(), len(d)
        part = rows * b if roles == 1 else rows[:, None, :] * b.view(roles, -1)
        d = d.t() if roles == 1 else d.t()[:, :, None]
        left = part * d if dtype in (None, part.dtype) else torch.mul(part, d, out=torch.empty_like(part, dtype=dtype))
        return left.t() if roles == 1 else left.flatten(1).t()
    parts = b.split([span.rows for span in spans])
    left = torch.cat([(part[:, None] * m) * d[k] for k, (part, m) in enumerate(zip(parts, B, strict=True))])
    return left if dtype is None else left.to(dtype)


def vector_gradients(p: Tensor, update: Update) -> tuple[Tensor, Tensor]:
    """Gradients of b and d from P = g^T u, (sum of rows, r), span after span: rowsum(P*d*B) and colsum(b*B*P)."""
    b, d, spans, _, B = update
    if torch.promote_types(p.dtype, b.dtype) != b.dtype:
        p = p.to(b.dtype)  # otherwise the product with B is of that type, whatever P is stored in
    if len(B) == 1:
        roles, rank = d.shape
        if roles == 1:
            product = p * in_type(B[0], b.dtype)
            return product @ d[0], (b @ product)[None]
        product = p.view(roles, -1, rank) * in_type(B[0], b.dtype)
        return (product @ d[:, :, None]).flatten(), (b.view(roles, 1, -1) @ product).squeeze(1)
    sizes = [span.rows for span in spans]
    products = [part * in_type(m, b.dtype) for part, m in zip(p.split(sizes), B, strict=True)]
    grad_b = torch.cat([product @ d[k] for k, product in enumerate(products)])
    grad_d = torch.stack([part @ product for part, product in zip(b.split(sizes), products, strict=True)])
    return grad_b, grad_d


def expand(u: Tensor, update: Update, y: Tensor) -> Tensor:
    """y + u L^T without L, for roles that share A and B and are the whole matrix in order: u (N, r) -> (N, out)."""
    z = (u[:, None] * in_type(update.d, u.dtype)) @ in_type(update.B[0], u.dtype).t()
    return torch.addcmul(y, z.flatten(1), in_type(update.b, u.dtype))


def reduce(g: Tensor, update: Update) -> Tensor:
    """g L without L, where `expand` is used: (N, out) -> (N, r)."""
    h = (g * in_type(update.b, g.dtype)).view(len(g), len(update.d), update.b.numel() // len(update.d)) @ in_type(
        update.B[0], g.dtype
    )
    return (h * in_type(update.d, g.dtype)).sum(dim=1)


def in_type(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a type: itself if it is, without the time that `to` takes to find out."""
    return t if t.dtype == dtype else t.to(dtype)
