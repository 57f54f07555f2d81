"""The frozen random matrices A and B that all layers of an adapter share, and their redrawn rows.

Nothing here is trained, and a state dict holds no matrices: they follow from (rank, seed, layout, init) and the widths
of the model, and their present state from those and the log of redraws, which a state dict holds. Draws are made on the
CPU in float64 by one thread, each from a generator keyed by what is drawn, so that neither the order of layers nor the
device changes them.

`draws.py` has the laws, `carried.py` how redraws go where the tensors of a model go. Shapes: A (r, in), B (rows, r), a
`state` or row buffer of either (r, width), indices and alpha (k,), draws (r,).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import UoraConfig
from ..errors import ConfigError
from .carried import Carried
from .draws import fresh_row, initial_rows, keyed_generator, orthonormal_columns, reproducible
from .mark import digest
from .redraw_log import BankState, Interpolation, Redraw, check_log
from .rounding import round_rows
from .widths import OwnMatrix, Side, Widths


class Follower(Protocol):
    """What holds tensors of a bank."""

    def renew(self) -> None: ...


class Bank(Carried):
    """A and B for every width of a model, as non-persistent buffers that follow `.to()`.

    Rows are directions in both: A is kept as (r, in) and B as (r, out) transposed on use, so that a direction is a row
    of either and one routine redraws both.

    Args:
        config: rank, seed, layout and init are used.
        widths: of the adapted projections.
        device: where the buffers lie.
        dtype: of the buffers; the draws are rounded to float32 first whatever it is.
        first: matrices by name, (r, width) float32 on the CPU, to use in place of the first draw: all of them, or the
            informed ones alone.
    """

    def __init__(
        self,
        config: UoraConfig,
        widths: Widths,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        first: Mapping[str, Tensor] | None = None,
    ) -> None:
        options: dict[str, Any] = {name: getattr(config, name) for name in ("rank", "seed", "layout", "init")}
        first = first or {}
        if first:
            options["given"] = _digest_of(first, widths.informed)
        super().__init__(options, widths.matrices(config.layout), device)
        self.config = config
        self.chosen: str | None = options.get("given")
        """A digest of the matrices that were not drawn."""
        self._given = frozenset(first) - set(widths.informed.values())
        self.taken: frozenset[str] = frozenset()
        """Names of the matrices that were taken from the weights of the base, and can be had from there again."""
        self.widths = widths
        # In float32 on the CPU: buffers may be moved, or rounded to a half type. Rows are redrawn from `_state`, where
        # a matrix is that of `_first` until one of its rows is redrawn.
        self._first: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._draws: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self._followers: tuple[Follower, ...] = ()
        for name, width in self.matrices.items():
            if torch.device(device).type == "meta":
                rows = torch.empty(config.rank, width, device="meta")
            else:
                drawn = name not in first
                rows = self._first[name] = initial_rows(config, name, width) if drawn else first[name]
            self.register_buffer(name, rows.to(device=device, dtype=dtype, copy=True), persistent=False)
        self._state = dict(self._first)

    @property
    def given(self) -> bool:
        """Whether it can neither be drawn again from the seed nor taken from the base."""
        return bool(self._given - self.taken)

    @property
    def by_path(self) -> bool:
        """Whether it has matrices for some weights alone, which are found by the path of the weight."""
        return bool(self.widths.informed or self.widths.of_weights)

    def follow(self, followers: Iterable[Follower]) -> None:
        """Have these renewed now, and whenever buffers are replaced by others."""
        self.__dict__["_followers"] = tuple(followers)
        self._renew()

    def _renew(self) -> None:
        for follower in self._followers:
            follower.renew()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bank:
        """As in nn.Module, which moves and casts buffers by it."""
        super()._apply(fn, recurse)
        self._renew()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The input: the bank is a child of the model, and an nn.Sequential runs all of its children."""
        return x

    def serves(self, config: UoraConfig, widths: Widths) -> bool:
        """Whether the matrices of these options and widths are those of this bank, before any redraw."""
        same = all(getattr(config, k) == getattr(self.config, k) for k in ("rank", "seed", "layout", "init"))
        same &= widths.informed == self.widths.informed
        return same and widths.matrices(config.layout).keys() <= self.matrices.keys()

    def matrix(self, side: Side, width: int, of: tuple[str, str] | None = None) -> str:
        """Name of the matrix that a projection uses, see `Widths.matrix`."""
        return self.widths.matrix(self.config.layout, side, width, of)

    def a(self, width: int, of: tuple[str, str] | None = None) -> Tensor:
        """A of an input width, (r, width); that of the projection of this origin and role, if it has one of its own."""
        return self._view("A", width, self.matrix("A", width, of))

    def b(self, width: int, of: tuple[str, str] | None = None) -> Tensor:
        """B of an output width, (width, r); that of the projection, if it has one of its own."""
        return self._view("B", width, self.matrix("B", width, of))

    def drawn(self, side: Side, width: int, of: tuple[str, str]) -> Tensor:
        """A that is not informed, (r, width), or B transposed, (r, width), before any redraw, on the CPU."""
        widths = self.widths._replace(informed={})
        return self._first[widths.matrix(self.config.layout, side, width, of)][:, :width]

    def _view(self, side: Side, width: int, name: str) -> Tensor:
        """The same tensor from one forward to the next. Compilers and tracers get a new one, from the buffer."""
        buffer: Tensor = getattr(self, name)  # sooner than get_buffer
        passing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        kept = None if passing else self._views.get((name, width))
        if kept is not None and kept[0] is buffer:
            return kept[1]
        view = buffer[:, :width] if side == "A" else buffer[:, :width].t()
        if not passing:
            self._views[name, width] = buffer, view
        return view

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without views."""
        return {**super().__getstate__(), "_views": {}, "_followers": ()}

    @property
    def log(self) -> list[Redraw]:
        """The redraws, in order."""
        self.settle(closely=True)
        return self._log

    def own(self, matrix: str) -> tuple[Tensor, Tensor]:
        """A layer's own copies: (indices (k,), rows (k, width)), float32 on the CPU."""
        return self._draws[matrix].nonzero().squeeze(1), self._own[matrix]

    def draws(self, matrix: str) -> Tensor:
        """How often each direction of a matrix has been drawn again, (r,) int64."""
        return self._draws.get(matrix, torch.zeros(self.config.rank, dtype=torch.int64, device="cpu"))

    def redraw(
        self,
        matrix: str | OwnMatrix,
        indices: Tensor,
        alpha: Tensor,
        step: int,
        interpolation: Interpolation | Tensor = "linear",
    ) -> Redraw:
        """Replace rows by a mix of the old and a fresh one, or by given ones, and log it.

        Args:
            matrix: the name of a shared one, or a layer's own copy.
            indices: (k,) directions, ascending and distinct.
            alpha: (k,) share of the old rows that is kept.
            step: optimizer step, for the log.
            interpolation: `linear`: alpha * old + (1 - alpha) * fresh. `spherical`: old rotated by (1 - alpha) * 90
                degrees towards a fresh row orthogonal to all, which keeps the rows orthonormal. Or the new rows
                themselves, (k, width) float32: rounded to int8 with a power of 2 for each, since the log holds them.

        Raises:
            ConfigError: there is no such matrix, it was redrawn at this step already (a log holds one redraw of a
                matrix per step), or it is too narrow for spherical interpolation.
        """
        self._settle_all()
        name = matrix.name if isinstance(matrix, OwnMatrix) else matrix
        if any(e.matrix == name for e in itertools.takewhile(lambda e: e.step == step, reversed(self._log))):
            raise ConfigError(f"{name} was redrawn at step {step} already; give all of its indices in one call")
        with reproducible(), torch.no_grad():
            event = self._redraw(matrix, indices.cpu(), alpha.to("cpu", torch.float64), step, interpolation)
            if name in self._state:
                self._write(name, event.indices)
        self._sign(digest(self.digest, [event]))
        return event

    def _redraw(
        self,
        matrix: str | OwnMatrix,
        indices: Tensor,
        alpha: Tensor,
        step: int,
        interpolation: Interpolation | Tensor,
    ) -> Redraw:
        """`redraw` of the rows on the CPU and of the log."""
        own = matrix if isinstance(matrix, OwnMatrix) else None
        matrix = matrix.name if isinstance(matrix, OwnMatrix) else matrix
        draws = self._draws.setdefault(matrix, torch.zeros(self.config.rank, dtype=torch.int64))
        if matrix in self._state:
            state = self._state[matrix]
            full = state.shape[1]
        elif own is not None and own.shared in self._state:
            shared = self._state[own.shared]
            state, full = shared[:, : own.width].clone(), shared.shape[1]
            if matrix in self._own:
                state[draws > 0] = self._own[matrix]
        else:
            raise ConfigError(f"no matrix {own.shared if own else matrix!r}; there are {', '.join(self._state)}")
        if interpolation == "spherical" and state.shape[1] <= self.config.rank:
            raise ConfigError(
                f"spherical interpolation needs a rank below every width; {matrix} is {state.shape[1]} wide, the rank "
                f"is {self.config.rank}. Use interpolation='linear' or a smaller rank."
            )
        draws[indices] += 1
        if state is self._first.get(matrix):
            state = self._state[matrix] = state.clone()
        rows, way = None, interpolation if isinstance(interpolation, str) else "given"
        if not isinstance(interpolation, str):
            rows = state[indices] = round_rows(interpolation, "int8")
        elif interpolation == "linear":
            fresh = torch.stack([fresh_row(self.config, matrix, (i, n), full) for i, n in _pairs(indices, draws)])
            fresh = fresh[:, : state.shape[1]]
            new = alpha[:, None] * state[indices] + (1 - alpha[:, None]) * fresh
            state[indices] = new.to(state.dtype)
        else:
            self._rotate(matrix, state, indices, alpha, (state.shape[1] / full) ** 0.5)
        if matrix not in self._state:
            self._own[matrix] = state[draws > 0]
        event = Redraw(step, matrix, indices.clone(), draws[indices].clone(), alpha.clone(), way, rows)
        self._log.append(event)
        return event

    def reset(self) -> None:
        """Back to the initial draw, with an empty log."""
        self.swap(BankState())

    def state(self) -> BankState:
        """What redraws have made of the bank. It shares the log with the bank, which goes on with it."""
        self.settle(closely=True)
        changed = {n: self._draws[n].nonzero().squeeze(1) for n in self._state if n in self._draws}
        rows = {n: (indices, self._state[n][indices]) for n, indices in changed.items()}
        signed = self._start, len(self._log), self.digest
        return BankState(self._log, self._draws, rows, self._own, signed)

    def swap(self, new: BankState) -> BankState:
        """Become what other redraws made of the same first draw: only matrices that differ are made, as new tensors,
        since a graph may hold the old ones. Nothing is changed unless all is.

        Returns:
            The state before.
        """
        self._settle_all()
        old = self.state()
        states, buffers = {}, {}
        for name in old.rows.keys() | new.rows.keys():
            state = self._first[name]
            if name in new.rows:
                state = state.index_copy(0, *new.rows[name])
            buffer = self.get_buffer(name).clone()
            for indices, _ in (held.rows[name] for held in (old, new) if name in held.rows):
                buffer[indices.to(buffer.device)] = state[indices].to(buffer)
            states[name], buffers[name] = state, buffer
        start, length, known = new.signed or (b"", 0, b"")
        if (start, length) != (self._start, len(new.log)):
            known = digest(self._start, new.log)
        self._log, self._draws, self._own = new.log, new.draws, new.own
        self._state |= states
        self._buffers.update(buffers)
        self._sign(known)
        self._renew()
        return old

    def has_given(self, digest: object) -> bool:
        informed = set(self.widths.informed.values())
        if digest is not None and digest == _digest_of(self._first, self.widths.informed):
            return True
        if self.widths.of_weights:
            return False
        drawn = {name: width for name, width in self.matrices.items() if name not in informed}
        rows = {name: t for name, t in self._first.items() if name in informed}
        if not self.given or digest != (_digest_of(rows, self.widths.informed) if rows else None):
            return False
        return all(torch.equal(self._first[n], initial_rows(self.config, n, width)) for n, width in drawn.items())

    def _write(self, name: str, indices: Tensor) -> None:
        """Rows of the float32 state into the buffer that the model computes with."""
        buffer = self.get_buffer(name)
        buffer[indices.to(buffer.device)] = self._state[name][indices].to(buffer)

    def _write_all(self) -> None:
        self._first = self._first or {n: initial_rows(self.config, n, w) for n, w in self.matrices.items()}
        self._state = self._first | self._state
        with torch.no_grad():
            for name, rows in self._state.items():
                self._write(name, torch.arange(len(rows), device="cpu"))
        self.changes += 1

    def replay(self, log: Iterable[Redraw], own: Mapping[str, OwnMatrix] | None = None) -> None:
        """The state after a log, from the initial draw; on an error the bank is as it was.

        Args:
            log: what `log` held.
            own: the matrices that layers may have of their own, by name; `layers` if None.

        Raises:
            FormatError: the log does not belong to this bank.
        """
        own, log = self.layers if own is None else own, list(log)
        check_log(log, self.config.rank, self.matrices | {name: matrix.width for name, matrix in own.items()})
        self._settle_all()
        known = len(self._log)
        if digest(self._start, log[:known]) != self.digest:
            known = 0
        before = self.swap(BankState()) if known == 0 else self.state()
        if known:  # redraws go on in what the state shares with the bank
            draws = {name: t.clone() for name, t in before.draws.items()}
            before = BankState(list(before.log), draws, before.rows, dict(before.own))
        try:
            for e in log[known:]:
                self.redraw(own.get(e.matrix, e.matrix), e.indices, e.alpha, e.step, _how(e))
        except BaseException:
            self.swap(before)
            raise
        self.changes += 1

    def _rotate(self, matrix: str, state: Tensor, indices: Tensor, alpha: Tensor, length: float) -> None:
        """Rotate rows towards fresh ones of the given length: 1, or what a slice has of a unit vector on average."""
        rank, width = state.shape
        draws = self._draws[matrix]
        for part, keep in zip(indices.split(width - rank), alpha.split(width - rank), strict=True):
            rows = state.to(torch.float64)
            gauss = torch.stack(
                [torch.randn(width, generator=keyed_generator(self.config.seed, matrix, i, n), dtype=torch.float64)
                 for i, n in _pairs(part, draws)]
            )  # fmt: skip
            basis = torch.linalg.qr(rows.t()).Q
            for _ in range(2):  # the second projection removes what rounding left of the first
                gauss = gauss - (gauss @ basis) @ basis.t()
            fresh = length * orthonormal_columns(gauss.t()).t()
            angle = (1 - keep[:, None]) * (torch.pi / 2)
            state[part] = (angle.cos() * rows[part] + angle.sin() * fresh).to(state.dtype)


def _digest_of(matrices: Mapping[str, Tensor], informed: Mapping[str, str]) -> str:
    found = hashlib.sha256(repr(sorted(informed.items())).encode() if informed else b"")
    for name, t in sorted(matrices.items()):
        found.update(name.encode() + t.contiguous().numpy().tobytes())
    return found.hexdigest()


def _how(event: Redraw) -> Interpolation | Tensor:
    if event.rows is not None:
        return event.rows
    return "spherical" if event.interpolation == "spherical" else "linear"


def _pairs(indices: Tensor, draws: Tensor) -> Iterable[tuple[int, int]]:
    return zip(indices.tolist(), draws[indices].tolist(), strict=True)
