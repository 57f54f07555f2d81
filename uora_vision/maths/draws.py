"""How the shared matrices are drawn from a seed: orthonormal or Kaiming, and the generators of redraws."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..config import UoraConfig


def initial_rows(config: UoraConfig, name: str, side: str, width: int) -> Tensor:
    """Rows of A, (r, in), or columns of B as rows, (r, out)."""
    generator = keyed_generator(config.seed, name)
    if config.init == "kaiming":
        return kaiming((config.rank, width), fan_in(side, config.rank, width), generator).float()
    shape = max(config.rank, width), min(config.rank, width)
    ortho = orthonormal_columns(torch.randn(shape, generator=generator, dtype=torch.float64))
    return (ortho if config.rank >= width else ortho.t()).float().contiguous()


def fan_in(matrix: str, rank: int, width: int) -> int:
    side = matrix.rpartition("/")[2][0]
    return width if side == "A" else rank


def kaiming(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """Uniform with variance 2 / fan_in, as VeRA's code draws it."""
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * (6 / fan_in) ** 0.5


def orthonormal_columns(gauss: Tensor) -> Tensor:
    """Haar-distributed orthonormal columns from Gaussian ones (Mezzadri 2007: QR with the signs of R made positive)."""
    q, r = torch.linalg.qr(gauss)
    del gauss
    return q.mul_(torch.where(r.diagonal() < 0, -1.0, 1.0).to(q))


def keyed_generator(seed: int, matrix: str, index: int = -1, draw: int = 0) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{matrix}/{index}/{draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
