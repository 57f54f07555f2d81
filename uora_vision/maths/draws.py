"""How the rows of the matrices are drawn from a seed, or taken from frozen weights: the laws, and the generators.

UORA (ACL 2025) draws A and B from the Haar law, VeRA (arXiv 2310.11454) Kaiming-uniform. Rows are directions: those of
A, and the columns of B.

Shapes: a matrix (r, width), a row (width,), a weight W (out, in), float64.
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
from ..errors import ConfigError
from .rounding import round_rows

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
        of_weight: (W, rank, generator) -> A (rank, in) and B transposed (rank, out), float64: of a law that takes both
            from the frozen weight of each projection, in place of `matrix`.

    `fan_in` is the number of inputs of the product: `width` for A, `rank` for B.
    """

    matrix: Callable[[int, int, int, Generator], Tensor]
    row: Callable[[int, int, int, Generator], Tensor]
    of_weight: Callable[[Tensor, int, Generator], tuple[Tensor, Tensor]] | None = None


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


def singular_rows(weight: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The leading right and left singular vectors, as rows; random ones beside them where W has a lower rank.

    By the eigenvectors of the smaller of W W^T and W^T W, which takes less time than an SVD. Where singular values are
    as good as equal, any basis of their vectors is one, and last bits would decide: there it is that which comes of a
    random matrix projected on their span. Signs are those of products with a random vector.
    """
    short = weight if len(weight) <= weight.shape[1] else weight.t()
    values, vectors = torch.linalg.eigh(short @ short.t())
    values, one = values.flip(0), vectors.flip(1).t()
    found = int((values[:rank] > _NO_VALUE * values[0]).sum())
    borders = (-values.diff() > _CLOSE * values[0]).nonzero().squeeze(1).add(1).tolist()
    parts, start = [], 0
    for end in (*borders, len(values)):
        if start >= found:
            break
        part = one[start:end]
        gauss = torch.randn(len(short), len(part), generator=generator, dtype=torch.float64)
        if len(part) > 1:
            part = orthonormal_columns(part.t() @ (part @ gauss)).t()
        elif (part @ gauss).item() < 0:
            part = -part
        parts.append(part)
        start = end
    one = torch.cat([weight.new_zeros(0, len(short)), *parts])[:found]
    both = [one, orthonormal_columns((one @ short).t()).t()]
    for k, rows in enumerate(both if found < rank else ()):
        gauss = torch.randn(rank - found, rows.shape[1], generator=generator, dtype=torch.float64)
        both[k] = torch.cat([rows, orthonormal_columns(without(gauss, rows).t()).t()])
    return (both[1], both[0]) if short is weight else (both[0], both[1])


_CLOSE, _NO_VALUE = 1e-8, 1e-7
"""Of squared singular values, as shares of the largest: the difference of such as are taken for equal, and the size of
such as are taken for none. Vectors are wrong by some 1e-16 divided by the difference."""

LAWS: dict[Init, Law] = {
    "haar": Law(haar_matrix, haar_row),
    "kaiming": Law(kaiming_matrix, kaiming_row),
    "svd": Law(haar_matrix, haar_row, singular_rows),
}


def rows_of_weight(config: UoraConfig, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """A (r, in) and B transposed (r, out) of a projection, by a law that takes them from its weight, float32.

    The weight is rounded to bfloat16 first, so that they are those of a base in float64, float32 and bfloat16, and they
    are rounded to int8 with a power of 2 for each row: in that, last bits of the decomposition, which hang on the
    processor, are lost but for the rarest of cases.

    Args:
        weight: (out, in).
        name: of the projection, by which what is random is keyed.
    """
    law = LAWS[config.init].of_weight
    assert law is not None
    with reproducible():
        w = weight.detach().to("cpu", torch.bfloat16).double()
        a, b = law(w, config.rank, keyed_generator(config.seed, name))
        return round_rows(a.float().contiguous(), "int8"), round_rows(b.float().contiguous(), "int8")


def initial_rows(config: UoraConfig, name: str, width: int, threads: int = 1) -> Tensor:
    """A shared matrix as it is first drawn, (r, width) float32, keyed by (seed, name).

    Args:
        threads: in how many it is drawn; only adapters of earlier versions have matrices of more than one.
    """
    rank, law = config.rank, LAWS[config.init]
    if law.of_weight is not None:
        raise ConfigError(f"A and B of init={config.init!r} are taken from the weights of the base, not drawn")
    with reproducible(threads):
        drawn = law.matrix(rank, width, _fan_in(name, rank, width), keyed_generator(config.seed, name))
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


def without(matrix: Tensor, rows: Tensor) -> Tensor:
    """What a matrix (n, in) has orthogonal to orthonormal rows (m, in)."""
    for _ in range(2):  # the second projection removes what rounding left of the first
        matrix = matrix - (matrix @ rows.t()) @ rows
    return matrix


def orthonormal_columns(gauss: Tensor) -> Tensor:
    """Haar-distributed orthonormal columns from Gaussian ones (Mezzadri 2007: QR with the signs of R made positive)."""
    q, r = torch.linalg.qr(gauss)
    del gauss
    return q.mul_(torch.where(r.diagonal() < 0, -1.0, 1.0).to(q))


def keyed_generator(seed: int, matrix: str, index: int = -1, draw: int = 0) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{matrix}/{index}/{draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
