"""The frozen random matrices A and B that all layers of an adapter share, and their redrawn rows.

Nothing here is trained or saved: the matrices follow from (rank, seed, layout, init) and the widths of the model, and
their present state from those and the log of redraws. Draws are made on the CPU in float64, each from a generator keyed
by what is drawn, so that neither the order of layers nor the device changes them.

`draws.py` has the laws. Shapes: A (r, in), B (rows, r), a `state` or row buffer of either (r, width), indices and alpha
(k,), draws (r,).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UoraConfig
from ..errors import ConfigError, FormatError
from .draws import fresh_row, initial_rows, keyed_generator, orthonormal_columns
from .redraw_log import BankState, Interpolation, Redraw
from .widths import OwnMatrix, Side, Widths


class Bank(nn.Module):
    """A and B for every width of a model, as non-persistent buffers that follow `.to()`.

    Rows are directions in both: A is kept as (r, in) and B as (r, out) transposed on use, so that a direction is a row
    of either and one routine redraws both.

    Args:
        config: rank, seed, layout and init are used.
        widths: of the adapted projections.
        device: where the buffers lie.
        dtype: of the buffers; the draws are rounded to float32 first whatever it is.
        first: matrices by name, (r, width) float32 on the CPU, to use in place of the first draw.
    """

    def __init__(
        self,
        config: UoraConfig,
        widths: Widths,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        first: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.log: list[Redraw] = []
        self.given = first is not None
        self.widths = widths
        # In float32 on the CPU: buffers may be moved, or rounded to a half type. Rows are redrawn from `_state`, where
        # a matrix is that of `_first` until one of its rows is redrawn.
        self._first: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}
        self._draws: dict[str, Tensor] = {}
        self._views: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        for name, width in widths.matrices(config.layout).items():
            if torch.device(device).type == "meta":
                rows = torch.empty(config.rank, width, device="meta")
            else:
                rows = self._first[name] = first[name] if first else initial_rows(config, name, width)
            self.register_buffer(name, rows.to(device=device, dtype=dtype, copy=True), persistent=False)
        self._state = dict(self._first)

    def forward(self, x: Tensor) -> Tensor:
        """The input: the bank is a child of the model, and an nn.Sequential runs all of its children."""
        return x

    def serves(self, config: UoraConfig, widths: Widths) -> bool:
        """Whether the matrices of these options and widths are those of this bank, before any redraw."""
        same = all(getattr(config, k) == getattr(self.config, k) for k in ("rank", "seed", "layout", "init"))
        return same and widths.matrices(config.layout).keys() <= self._buffers.keys()

    def matrix(self, side: Side, width: int) -> str:
        """Name of the matrix that a projection of this width uses."""
        return self.widths.matrix(self.config.layout, side, width)

    def a(self, width: int) -> Tensor:
        """A of an input width, (r, width)."""
        return self._view("A", width)

    def b(self, width: int) -> Tensor:
        """B of an output width, (width, r)."""
        return self._view("B", width)

    def drawn(self, side: Side, width: int) -> Tensor:
        """A, (r, width), or B transposed, (r, width), as it was drawn first: before any redraw, on the CPU."""
        return self._first[self.matrix(side, width)][:, :width]

    def _view(self, side: Side, width: int) -> Tensor:
        """The same tensor from one forward to the next. Compilers and tracers get a new one, from the buffer."""
        buffer: Tensor = getattr(self, self.matrix(side, width))  # sooner than get_buffer
        passing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        kept = None if passing else self._views.get((side, width))
        if kept is not None and kept[0] is buffer:
            return kept[1]
        view = buffer[:, :width] if side == "A" else buffer[:, :width].t()
        if not passing:
            self._views[side, width] = buffer, view
        return view

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without views."""
        return {**self.__dict__, "_views": {}}

    def own(self, matrix: str) -> tuple[Tensor, Tensor]:
        """A layer's own copies: (indices (k,), rows (k, width)), float32 on the CPU."""
        return self._draws[matrix].nonzero().squeeze(1), self._own[matrix]

    def draws(self, matrix: str) -> Tensor:
        """How often each direction of a matrix has been drawn again, (r,) int64."""
        return self._draws.get(matrix, torch.zeros(self.config.rank, dtype=torch.int64))

    def redraw(
        self,
        matrix: str | OwnMatrix,
        indices: Tensor,
        alpha: Tensor,
        step: int,
        interpolation: Interpolation = "linear",
    ) -> Redraw:
        """Replace rows by a mix of the old and a fresh one, and log it.

        Args:
            matrix: the name of a shared one, or a layer's own copy.
            indices: (k,) directions, ascending and distinct.
            alpha: (k,) share of the old rows that is kept.
            step: optimizer step, for the log.
            interpolation: `linear`: alpha * old + (1 - alpha) * fresh. `spherical`: old rotated by (1 - alpha) * 90
                degrees towards a fresh row orthogonal to all, which keeps the rows orthonormal.

        Raises:
            ConfigError: there is no such matrix, it was redrawn at this step already (a log holds one redraw of a
                matrix per step), or it is too narrow for spherical interpolation.
        """
        own = matrix if isinstance(matrix, OwnMatrix) else None
        matrix = matrix.name if isinstance(matrix, OwnMatrix) else matrix
        if any(e.matrix == matrix for e in itertools.takewhile(lambda e: e.step == step, reversed(self.log))):
            raise ConfigError(f"{matrix} was redrawn at step {step} already; give all of its indices in one call")
        indices, alpha = indices.cpu(), alpha.to("cpu", torch.float64)
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
        if interpolation == "linear":
            fresh = torch.stack([fresh_row(self.config, matrix, (i, n), full) for i, n in _pairs(indices, draws)])
            fresh = fresh[:, : state.shape[1]]
            new = alpha[:, None] * state[indices] + (1 - alpha[:, None]) * fresh
            state[indices] = new.to(state.dtype)
        else:
            self._rotate(matrix, state, indices, alpha, (state.shape[1] / full) ** 0.5)
        if matrix not in self._state:
            self._own[matrix] = state[draws > 0]
        event = Redraw(step, matrix, indices.clone(), draws[indices].clone(), alpha.clone(), interpolation)
        self.log.append(event)
        if matrix in self._state:
            self._write(matrix, indices)
        return event

    def reset(self) -> None:
        """Back to the initial draw, with an empty log."""
        self.swap(BankState())

    def state(self) -> BankState:
        """What redraws have made of the bank. It shares the log with the bank, which goes on with it."""
        changed = {n: self._draws[n].nonzero().squeeze(1) for n in self._state if n in self._draws}
        rows = {n: (indices, self._state[n][indices]) for n, indices in changed.items()}
        return BankState(self.log, self._draws, rows, self._own)

    def swap(self, new: BankState) -> BankState:
        """Become what other redraws made of the same first draw: only matrices that differ are made, as new tensors,
        since a graph may hold the old ones. Nothing is changed unless all is.

        Returns:
            The state before.
        """
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
        self.log, self._draws, self._own = new.log, new.draws, new.own
        self._state |= states
        self._buffers.update(buffers)
        return old

    def _write(self, name: str, indices: Tensor) -> None:
        """Rows of the float32 state into the buffer that the model computes with."""
        buffer = self.get_buffer(name)
        buffer[indices.to(buffer.device)] = self._state[name][indices].to(buffer)

    def replay(self, log: Iterable[Redraw], own: Mapping[str, OwnMatrix]) -> None:
        """The state after a log, from the initial draw.

        Args:
            log: what `log` held.
            own: the matrices that layers may have of their own, by name.

        Raises:
            FormatError: the log does not belong to this bank.
        """
        self.reset()
        for event in log:
            if event.matrix not in self._state and event.matrix not in own:
                raise FormatError(f"the log redraws {event.matrix!r}, which this model does not have")
            if (last := int(event.indices.max())) >= self.config.rank:
                raise FormatError(
                    f"the log redraws direction {last} of {event.matrix!r}; the rank is {self.config.rank}"
                )
            matrix = own.get(event.matrix, event.matrix)
            again = self.redraw(matrix, event.indices, event.alpha, event.step, event.interpolation)
            if not torch.equal(again.draws, event.draws):
                raise FormatError(f"the log of {event.matrix!r} has gaps: step {event.step} is not the next draw")

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


def _pairs(indices: Tensor, draws: Tensor) -> Iterable[tuple[int, int]]:
    return zip(indices.tolist(), draws[indices].tolist(), strict=True)
