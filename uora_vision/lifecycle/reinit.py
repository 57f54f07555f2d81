"""Reinitialisation: directions whose trained weight has died are drawn again.

After an optimizer step, for every adapted role and each index i:

    below_i = |d_i| < tau ;  count_i += below_i ;  fire when below_i and count_i % every == 0

and a fired index gets a fresh row of A and column of B, mixed with the old by alpha (UORA, ACL 2025, section 3; here it
runs once per optimizer step and outside the forward, so that checkpointing and accumulation cannot repeat it).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, StateError
from ..maths.bank import Bank
from ..maths.draws import on_cpu
from ..maths.redraw_log import Interpolation, pack_log
from ..options import hinting
from ..weights.sharded import clear, joined
from .adapter import Adapter, own_matrices
from .library import active_entry, adapters, bank_of
from .optimizers import DecayWatch, check_optimizer, warn_of_decay
from .reinit_state import read_state

if TYPE_CHECKING:
    import numpy as np

Scope = Literal["shared", "quorum", "layer"]


class AlphaSchedule(Protocol):
    def __call__(self, draws: Tensor) -> Tensor:
        """Alpha (k,) of directions that have been drawn again `draws` (k,) times before."""
        ...


class ThresholdSchedule(Protocol):
    def __call__(self, step: int) -> float:
        """The threshold at an optimizer step, counted from 1."""
        ...


@dataclass(frozen=True)
class AlphaDecay:
    """Alpha falls by `by` with every firing of an index, from `start` to `floor`: a helper in the author's code.

    Raises:
        ConfigError: it would not fall, or leave [0, 1].

    Example:
        >>> import torch, uora_vision as uora
        >>> uora.AlphaDecay(start=1.0, by=0.05, floor=0.5)(torch.tensor([0, 1, 20]))
        tensor([1.0000, 0.9500, 0.5000], dtype=torch.float64)
    """

    start: float = 1.0
    by: float = 0.05
    floor: float = 0.5

    def __post_init__(self) -> None:
        numbers = all(map(_is_number, (self.start, self.by, self.floor)))
        if not numbers or not 0 <= self.floor <= self.start <= 1 or self.by < 0:
            raise ConfigError(f"AlphaDecay needs 0 <= floor <= start <= 1 and by >= 0, got {self}")

    def __call__(self, draws: Tensor) -> Tensor:
        return (self.start - self.by * draws.to(torch.float64)).clamp(min=self.floor)


@dataclass(frozen=True)
class ThresholdWave:
    """The threshold goes up from `low` to `high` and down again by `by` every `steps`, as in the author's code.

    Raises:
        ConfigError: the numbers give no such wave.

    Example:
        >>> import uora_vision as uora
        >>> wave = uora.ThresholdWave(low=0.0, high=0.5, by=0.25, steps=10)
        >>> [wave(step) for step in (1, 11, 21, 31, 41)]
        [0.0, 0.25, 0.5, 0.25, 0.0]
    """

    low: float = 1e-6
    high: float = 1e-4
    by: float = 1e-6
    steps: int = 1000

    def __post_init__(self) -> None:
        numbers = all(map(_is_number, (self.low, self.high, self.by)))
        if not numbers or not 0 <= self.low <= self.high or self.by <= 0:
            raise ConfigError(f"ThresholdWave needs 0 <= low <= high and by > 0, got {self}")
        if not _is_whole(self.steps):
            raise ConfigError(f"ThresholdWave needs a whole number of at least 1 as steps, got {self}")

    def __call__(self, step: int) -> float:
        span = max(1, round((self.high - self.low) / self.by))
        phase = (step - 1) // self.steps % (2 * span)
        return self.low + self.by * min(phase, 2 * span - phase)


class Reinitializer:
    """Redraws dead directions; call `step()` once after every `optimizer.step()`.

    Args:
        model: an injected model.
        threshold: tau, or a schedule from the optimizer step to tau.
        alpha: share of the old row that is kept, in [0, 1], or a schedule from earlier draws to shares.
        every: an index fires each time its count of steps below tau is a multiple of this.
        scope: `shared`: an index that fires in any layer is redrawn for all layers of the bank, and their functions
            change with it (the author's). `quorum`: only when the given share of a matrix's roles are below tau at that
            index. `layer`: the firing role gets its own copy of just that row and column; as its |d_i| < tau, the
            model's function stays the same to within tau.
        quorum: share of the roles, in (0, 1]; for `quorum`.
        interpolation: `linear`, or `spherical`, which keeps the matrices orthonormal.
        relative: whether tau is a multiple of the role's median |d|.
        reset_moments: whether the optimizer's moments of a fired d_i are set to 0.
        optimizer: that trains the adapter; it is looked at here, and needed for `reset_moments`.

    Raises:
        StateError: the model is not injected.
        ConfigError: an option cannot be used, or the optimizer lacks some b or d.

    Warns:
        UoraWarning: the optimizer lets b or d decay. Without an optimizer, the same is seen in a step in which no
            gradient reaches d, as in the first one after `inject`. Also if d is of a half type.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> optimizer = torch.optim.AdamW(uora.param_groups(model, lr=1e-2))
        >>> reinit = uora.Reinitializer(model, threshold=1e-5, alpha=0.5)
        >>> model(torch.randn(2, 5, 16)).square().mean().backward()
        >>> optimizer.step()
        >>> reinit.step()  # nothing has died yet
        0
        >>> with torch.no_grad():
        ...     uora.adapters(model)["linear1"].d[0, 2] = 0.0
        >>> reinit.step(), reinit.history()[0].tolist()  # the step, the layer's number, the direction
        (1, [2, 4, 2])
    """

    @hinting
    @on_cpu
    def __init__(
        self,
        model: nn.Module,
        threshold: float | ThresholdSchedule = 1e-5,
        alpha: float | AlphaSchedule = 0.5,
        every: int = 1,
        scope: Scope = "shared",
        quorum: float = 0.5,
        interpolation: Interpolation = "linear",
        relative: bool = False,
        reset_moments: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if not callable(threshold) and not (_is_number(threshold) and threshold >= 0):
            raise ConfigError(f"threshold must be finite and at least 0, got {threshold!r}")
        if not callable(alpha) and not (_is_number(alpha) and 0 <= alpha <= 1):
            raise ConfigError(f"alpha must be in [0, 1], got {alpha!r}")
        if not _is_whole(every):
            raise ConfigError(f"every must be a whole number of at least 1, got {every!r}")
        if not (_is_number(quorum) and 0 < quorum <= 1):
            raise ConfigError(f"quorum must be in (0, 1], got {quorum!r}")
        for name, value, allowed in (
            ("scope", scope, get_args(Scope)),
            ("interpolation", interpolation, get_args(Interpolation)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if reset_moments and optimizer is None:
            raise ConfigError("reset_moments needs the optimizer: Reinitializer(model, ..., optimizer=optimizer)")
        bank = bank_of(model)
        self.model, self._adapters = model, adapters(model)
        rank, widths = bank.config.rank, bank.matrices
        if scope == "layer":
            widths = {
                f"{a.name} ({w})": w for a in self._adapters.values() for w in (a.width, *(r.rows for r in a.roles))
            }
        if interpolation == "spherical" and (narrow := [name for name, width in widths.items() if width <= rank]):
            raise ConfigError(
                f"spherical interpolation needs a rank below every width; the rank is {rank} and there are "
                f"{', '.join(narrow[:8])}. Use interpolation='linear' or a smaller rank."
            )
        self.threshold, self.alpha, self.every, self.scope, self.quorum = threshold, alpha, every, scope, quorum
        self.interpolation: Interpolation = interpolation
        self.relative, self.reset_moments, self.optimizer = relative, reset_moments, optimizer
        self._places: list[tuple[Adapter, int]] = [(a, k) for a in self._adapters.values() for k in range(len(a.roles))]
        self._counts = torch.zeros(len(self._places), rank, dtype=torch.int64, device=self._device)
        self._history: list[Tensor] = []
        if optimizer is not None:
            check_optimizer(optimizer, model)
        self._watch = None if optimizer is not None else DecayWatch(self._d())
        # The log of a model that was trained before goes on; it holds one redraw of a matrix per step.
        self.steps = self.bank.log[-1].step if self.bank.log else 0

    @property
    def bank(self) -> Bank:
        """Whose matrices are redrawn. `inform` gives an adapter another one."""
        return self._places[0][0].bank

    def _d(self) -> Tensor:
        """Every d of the adapter, (roles, r)."""
        return joined([a.d.detach() for a in self._adapters.values()])

    @property
    def _device(self) -> torch.device:
        return self._places[0][0].d.device

    @property
    def layers(self) -> list[str]:
        """Names of the adapted roles, in the order of the layer numbers of `history`."""
        return [f"{a.name}.{a.roles[k].name}" for a, k in self._places]

    @property
    def firings(self) -> int:
        """How many directions, counted by layer and index, have fired so far."""
        return sum(len(h) for h in self._history)

    @on_cpu
    def history(self) -> np.ndarray:
        """Every firing so far, (n, 3) int64: optimizer step, layer number (see `layers`), index."""
        return self._firings().numpy()

    def _firings(self) -> Tensor:
        return torch.cat([torch.zeros(0, 3, dtype=torch.int64), *self._history])

    @torch.no_grad()
    @on_cpu
    def step(self) -> int:
        """Look at every d once and draw dead directions again. One device synchronisation, however large the model, and
        one more for each matrix that is redrawn.

        Every process of a distributed run calls it: each sees the same d, gathered first where `fully_shard` spreads
        it, and so draws the same rows again.

        Returns:
            How many directions fired.

        Raises:
            StateError: another adapter is active than the one that this was made for.
        """
        if self._places[0][0] not in (active_entry(self.model).modules or ()):
            raise StateError("another adapter is active than the one that this Reinitializer was made for")
        self.steps += 1
        d = self._d()
        watch = self._watch if self.optimizer is None else None
        decayed = watch.decayed(d) if watch else d.new_zeros((), dtype=torch.bool)
        d = d.abs()
        tau = self.threshold(self.steps) if callable(self.threshold) else self.threshold
        if not (_is_number(tau) and tau >= 0):
            raise ConfigError(
                f"the schedule of the threshold must give a finite number of at least 0, and gave {tau!r}"
            )
        below = d < (tau * d.median(dim=1, keepdim=True).values if self.relative else tau)
        self._counts = self._counts.to(d.device)
        self._counts += below
        seen = torch.stack([below, below & (self._counts % self.every == 0), decayed.expand_as(below)])
        # All in one transfer: it is the step's only wait for the device.
        below, fired, _ = seen = seen.cpu()
        _, fires, decays = seen.flatten(1).any(dim=1).tolist()
        if decays:
            self._watch = None
            warn_of_decay()
        if not fires:
            return 0
        fired = self._redraw_layers(fired) if self.scope == "layer" else self._redraw_shared(fired, below)
        places = fired.nonzero()
        if len(places) and self.reset_moments:
            self._clear_moments(fired)
        if len(places):
            self._history.append(torch.cat([torch.full((len(places), 1), self.steps), places], dim=1))
        return len(places)

    @on_cpu
    def state_dict(self) -> dict[str, Any]:
        """Counters, history and the log of redraws: with the seed, the whole state of the banks."""
        log, matrices = pack_log(self.bank.log)
        return {
            "steps": self.steps,
            "counts": self._counts.cpu().clone(),
            "history": self._firings(),
            "log": log,
            "matrices": matrices,
            "layers": self.layers,
            "banks": self._bank_options(),
        }

    @on_cpu
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, and rebuild the banks from its log.

        Raises:
            FormatError: the state belongs to another model, or is damaged; nothing of it was taken.
        """
        found = read_state(state, self.layers, self.bank.config.rank, self._bank_options())
        self.bank.replay(found.log, own_matrices(self._adapters.values()))
        for adapter in self._adapters.values():
            adapter.take_own()
        self.steps, self._counts = found.steps, found.counts.to(self._device)
        self._history = [found.history] if len(found.history) else []

    def _bank_options(self) -> dict[str, Any]:
        config = self.bank.config
        options = {"seed": config.seed, "layout": config.layout, "init": config.init}
        return options | ({"given": self.bank.chosen} if self.bank.widths.informed else {})

    def _group(self) -> dict[str, Tensor]:
        """The roles that use each shared matrix, (layers,) bool by matrix."""
        members: dict[str, Tensor] = {}
        for i, (adapter, k) in enumerate(self._places):
            names = self.bank.matrix("A", adapter.width, adapter.origin), self.bank.matrix("B", adapter.roles[k].rows)
            for name in names:
                members.setdefault(name, torch.zeros(len(self._places), dtype=torch.bool))[i] = True
        return members

    def _redraw_shared(self, fired: Tensor, below: Tensor) -> Tensor:
        acted = torch.zeros_like(fired)
        for matrix, members in self._group().items():
            chosen = fired[members].any(dim=0)
            if self.scope == "quorum":
                chosen &= below[members].double().mean(dim=0) >= self.quorum
            if not chosen.any():
                continue
            indices = chosen.nonzero().squeeze(1)
            self.bank.redraw(matrix, indices, self._alphas(matrix, indices), self.steps, self.interpolation)
            acted |= fired & members[:, None] & chosen
        return acted

    def _redraw_layers(self, fired: Tensor) -> Tensor:
        for i in fired.any(dim=1).nonzero().squeeze(1).tolist():
            adapter, k = self._places[i]
            indices = fired[i].nonzero().squeeze(1)
            for own in adapter.own(k):
                self.bank.redraw(own, indices, self._alphas(own.name, indices), self.steps, self.interpolation)
            adapter.refresh_own(k)
        return fired

    def _alphas(self, matrix: str, indices: Tensor) -> Tensor:
        if callable(self.alpha):
            alphas = self.alpha(self.bank.draws(matrix)[indices])
            if (
                not isinstance(alphas, Tensor)
                or alphas.shape != indices.shape
                or alphas.is_complex()
                or alphas.is_meta
                or not ((alphas >= 0) & (alphas <= 1)).all()
            ):
                raise ConfigError(
                    f"the schedule of alpha must give {len(indices)} shares in [0, 1], one a direction, and gave "
                    f"{alphas!r}"
                )
            return alphas
        return torch.full((len(indices),), float(self.alpha), dtype=torch.float64, device="cpu")

    def _clear_moments(self, fired: Tensor) -> None:
        assert self.optimizer is not None
        row = 0
        for adapter in self._adapters.values():
            mine = fired[row : row + len(adapter.roles)]
            row += len(adapter.roles)
            if mine.any():
                for value in self.optimizer.state.get(adapter.d, {}).values():
                    if isinstance(value, Tensor) and value.shape == adapter.d.shape:
                        clear(value, mine)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
