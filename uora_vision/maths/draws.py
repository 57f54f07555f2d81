"""How the rows of the shared matrices are drawn from a seed: the laws, and the generators.

UORA (ACL 2025) draws A and B from the Haar law, VeRA (arXiv 2310.11454) Kaiming-uniform. Rows are directions: those of
A, and the columns of B.

Shapes: a matrix (r, width), a row (width,), float64.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Generator, Tensor

from ..config import Init, UoraConfig

P = ParamSpec("P")
R = TypeVar("R")

_DRAWING = threading.RLock()


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that says where its tensors lie, or means the CPU, whatever torch's default device is."""

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        # Inside of the context every function of torch takes several times as long.
        with nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu"):
            return function(*args, **options)

    return run


@contextmanager
def reproducible(threads: int = 1) -> Iterator[None]:
    """Draw on the CPU, in one thread: the last bits of a QR depend on the number of threads, which is one setting of
    the whole process, so that only one draws at a time."""
    with _DRAWING:
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            with torch.device("cpu"):
                yield
        finally:
            torch.set_num_threads(before)


class Law(NamedTuple):
    """A law of the shared matrices.

    Args:
        matrix: (rank, width, fan_in, generator) -> a whole matrix, (rank, width) float64.
        row: the same -> one fresh row, (width,) float64, of the law that a single row of such a matrix has.

    `fan_in` is the number of inputs of the product: `width` for A, `rank` for B.
    """

    matrix: Callable[[int, int, int, Generator], Tensor]
    row: Callable[[int, int, int, Generator], Tensor]


def haar_matrix(rank: int, width: int, fan_in: int, generator: Generator) -> Tensor:
    """Orthonormal rows, or orthonormal columns if there are more rows than columns."""
    shape = max(rank, width), min(rank, width)
    ortho = orthonormal_columns(torch.randn(shape, generator=generator, dtype=torch.float64))
    return ortho if rank >= width else ortho.t()


def haar_row(rank: int, width: int, fan_in: int, generator: Generator) -> Tensor:
    """The beginning of a uniform unit vector: all of it where rows are orthonormal, its first `width` of r coordinates
    where there are more rows than columns."""
    gauss = torch.randn(max(width, rank), generator=generator, dtype=torch.float64)
    return (gauss / gauss.norm())[:width]


def kaiming_matrix(rank: int, width: int, fan_in: int, generator: Generator) -> Tensor:
    """Uniform with variance 2 / fan_in, as VeRA's code draws it."""
    return (2 * torch.rand(rank, width, generator=generator, dtype=torch.float64) - 1) * (6 / fan_in) ** 0.5


def kaiming_row(rank: int, width: int, fan_in: int, generator: Generator) -> Tensor:
    return kaiming_matrix(1, width, fan_in, generator)[0]


LAWS: dict[Init, Law] = {"haar": Law(haar_matrix, haar_row), "kaiming": Law(kaiming_matrix, kaiming_row)}


def initial_rows(config: UoraConfig, name: str, width: int, threads: int = 1) -> Tensor:
    """A shared matrix as it is first drawn, (r, width) float32, keyed by (seed, name).

    Args:
        threads: in how many it is drawn; only adapters of earlier versions have matrices of more than one.
    """
    rank = config.rank
    with reproducible(threads):
        drawn = LAWS[config.init].matrix(rank, width, _fan_in(name, rank, width), keyed_generator(config.seed, name))
        return drawn.float().contiguous()


def fresh_row(config: UoraConfig, matrix: str, key: tuple[int, int], width: int) -> Tensor:
    """One row drawn again, (width,) float64, keyed by (seed, matrix, index, draw).

    Args:
        matrix: its name; that of a layer's own ends in `/A` or `/B`.
        key: index of the row, and how often it was drawn again.
    """
    rank = config.rank
    generator = keyed_generator(config.seed, matrix, *key)
    return LAWS[config.init].row(rank, width, _fan_in(matrix, rank, width), generator)


def _fan_in(matrix: str, rank: int, width: int) -> int:
    return width if matrix.rpartition("/")[2][0] == "A" else rank


def orthonormal_columns(gauss: Tensor) -> Tensor:
    """Haar-distributed orthonormal columns from Gaussian ones (Mezzadri 2007: QR with the signs of R made positive)."""
    q, r = torch.linalg.qr(gauss)
    del gauss
    return q.mul_(torch.where(r.diagonal() < 0, -1.0, 1.0).to(q))


def keyed_generator(seed: int, matrix: str, index: int = -1, draw: int = 0) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{matrix}/{index}/{draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
