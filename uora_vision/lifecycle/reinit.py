"""Reinitialisation: directions that have died are drawn again.

After an optimizer step, for every adapted role and each index i:

    below_i = |d_i| < tau ;  count_i += below_i ;  fire when below_i and count_i % every == 0

and a fired index gets a fresh row of A and column of B, mixed with the old by alpha (UORA, ACL 2025, section 3; here it
runs once per optimizer step and outside the forward, so that checkpointing and accumulation cannot repeat it). Another
criterion has a score of the direction in place of |d_i|; another source has rows that are not random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, StateError
from ..maths.bank import Bank
from ..maths.draws import on_cpu
from ..maths.redraw_log import Interpolation, pack_log
from ..options import hinting
from ..weights.sharded import clear, joined
from .adapter import Adapter, own_matrices
from .criteria import Criterion, RunningScore, Scope, Score, Source, check_source, scorer
from .informing import fresh_rows
from .library import active_entry, adapters, bank_of
from .optimizers import DecayWatch, check_optimizer, warn_of_decay
from .reinit_state import read_state
from .schedules import AlphaSchedule, ThresholdSchedule, is_number, is_whole

if TYPE_CHECKING:
    import numpy as np


class Reinitializer:
    """Redraws dead directions; call `step()` once after every `optimizer.step()`.

    Args:
        model: an injected model.
        threshold: tau, or a schedule from the optimizer step to tau.
        alpha: share of the old row that is kept beside a random one, in [0, 1], or a schedule from earlier draws to
            shares.
        every: an index fires each time its count of steps below tau is a multiple of this.
        scope: `shared`: an index that fires in any layer is redrawn for all layers of the bank, and their functions
            change with it (the author's). `quorum`: only when the given share of a matrix's roles are below tau at that
            index. `layer`: the firing role gets its own copy of just that row and column; as its |d_i| < tau, the
            model's function stays the same to within tau.
        quorum: share of the roles, in (0, 1]; for `quorum`.
        interpolation: `linear`, or `spherical`, which keeps the matrices orthonormal.
        relative: whether tau is a multiple of the role's median |d|, or score.
        reset_moments: whether the optimizer's moments of a fired d_i are set to 0.
        criterion: what is held against tau. `magnitude`: |d_i|. `saliency`: a running mean over steps of |d_i g_i|, g_i
            the gradient of d_i: to first order, what the loss gains by the direction. It has no scale of its own, so it
            needs `relative`. Or a function of d and its gradient, see `Score`, of which the running mean is taken.
            All but `magnitude` need `step()` before the gradients are cleared. What fires by them starts again with
            d_i = 0 and cleared moments if it is drawn again: at the old d_i, a fresh row would change the model.
        source: of fresh rows. `random`. `informed`, in scope `layer`: the row of A is the leading right singular vector
            (the leading ones, if several fire) of what the gradient of the weight over `batches` has outside of the
            other rows; see `inform`. B keeps its column, d_i starts at 0 with cleared moments, and the log holds the
            row, in int8. `none`: rows and d stay, and only moments are cleared, as a control.
        batches: for `informed`: what the model learns from, such as a list or a DataLoader; of each pass over it, one a
            step in which directions fire, the first 8 are taken. A schedule of tau that is 0 at most steps keeps passes
            few.
        loss: for `informed`: `loss(model, batch)`, as for `inform`.
        optimizer: that trains the adapter; it is looked at here, and needed where moments are cleared.

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
        criterion: Criterion | Score = "magnitude",
        source: Source = "random",
        batches: Iterable[Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        if not callable(threshold) and not (is_number(threshold) and threshold >= 0):
            raise ConfigError(f"threshold must be finite and at least 0, got {threshold!r}")
        if not callable(alpha) and not (is_number(alpha) and 0 <= alpha <= 1):
            raise ConfigError(f"alpha must be in [0, 1], got {alpha!r}")
        if not is_whole(every):
            raise ConfigError(f"every must be a whole number of at least 1, got {every!r}")
        if not (is_number(quorum) and 0 < quorum <= 1):
            raise ConfigError(f"quorum must be in (0, 1], got {quorum!r}")
        for name, value, allowed in (
            ("scope", scope, get_args(Scope)),
            ("interpolation", interpolation, get_args(Interpolation)),
            ("source", source, get_args(Source)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if reset_moments and optimizer is None:
            raise ConfigError("reset_moments needs the optimizer: Reinitializer(model, ..., optimizer=optimizer)")
        score = scorer(criterion, relative)
        check_source(source, scope, alpha, interpolation, batches, loss)
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
        narrow = [f"{a.name} ({a.width})" for a in self._adapters.values() if a.width <= rank]
        if source == "informed" and narrow:
            raise ConfigError(
                f"source='informed' needs a rank below every input width; the rank is {rank} and there are "
                f"{', '.join(narrow[:8])}. Use source='random' or a smaller rank."
            )
        self.threshold, self.alpha, self.every, self.scope, self.quorum = threshold, alpha, every, scope, quorum
        self.interpolation: Interpolation = interpolation
        self.relative, self.reset_moments, self.optimizer = relative, reset_moments, optimizer
        self.criterion, self.source, self.batches, self.loss = criterion, source, batches, loss
        self._places: list[tuple[Adapter, int]] = [(a, k) for a in self._adapters.values() for k in range(len(a.roles))]
        self._counts = torch.zeros(len(self._places), rank, dtype=torch.int64, device=self._device)
        self._score = None if score is None else RunningScore(score, len(self._places), rank)
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
            StateError: another adapter is active than the one that this was made for, or no d has the gradient that the
                criterion needs.
            ConfigError: moments are to be cleared, and there is no optimizer.
            OptionError, DeadAdapterError: the batches of informed rows are none, have no finite loss, or no gradient
                reaches a weight, see `inform`; or a function gives no scores. Nothing is drawn then.
        """
        if self._places[0][0] not in (active_entry(self.model).modules or ()):
            raise StateError("another adapter is active than the one that this Reinitializer was made for")
        if self.optimizer is None and (self.source == "none" or self._restarts):
            raise ConfigError(
                f"criterion={self.criterion!r} with source={self.source!r} clears the moments of what fires and needs "
                "the optimizer: Reinitializer(model, ..., optimizer=optimizer)"
            )
        d = self._d()
        scores = None if self._score is None else self._score.update(d, self._grad())
        self.steps += 1
        watch = self._watch if self.optimizer is None else None
        decayed = watch.decayed(d) if watch else d.new_zeros((), dtype=torch.bool)
        d = d.abs() if scores is None else scores
        tau = self.threshold(self.steps) if callable(self.threshold) else self.threshold
        if not (is_number(tau) and tau >= 0):
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
        if self.source == "informed":
            self._redraw_informed(fired)
        elif self.source == "random":
            fired = self._redraw_layers(fired) if self.scope == "layer" else self._redraw_shared(fired, below)
        places = fired.nonzero()
        if len(places):
            self._clear(fired, moments=self.reset_moments or self.source == "none" or self._restarts)
            self._history.append(torch.cat([torch.full((len(places), 1), self.steps), places], dim=1))
            if self._score is not None:
                self._score.restart(fired)
        return len(places)

    @property
    def _restarts(self) -> bool:
        """Whether what is drawn again starts with d_i = 0. The paper's way is not that."""
        return self.source == "informed" or (self.source == "random" and self.criterion != "magnitude")

    def _grad(self) -> Tensor:
        """The gradient of every d, (roles, r)."""
        found = [a.d.grad for a in self._adapters.values()]
        if all(grad is None for grad in found):
            raise StateError(
                f"criterion={self.criterion!r} needs the gradients of d, and there are none: call step() after "
                "optimizer.step() and before optimizer.zero_grad()"
            )
        pairs = zip(found, self._adapters.values(), strict=True)
        return joined([torch.zeros_like(a.d) if grad is None else grad for grad, a in pairs])

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
            **({} if self._score is None else {"scores": self._score.values.cpu().clone()}),
        }

    @on_cpu
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state, and rebuild the banks from its log.

        Raises:
            FormatError: the state belongs to another model, or is damaged; nothing of it was taken.
        """
        found = read_state(state, self.layers, self.bank.config.rank, self._bank_options(), self._score is not None)
        self.bank.replay(found.log, own_matrices(self._adapters.values()))
        for adapter in self._adapters.values():
            adapter.take_own()
        self.steps, self._counts = found.steps, found.counts.to(self._device)
        if self._score is not None and found.scores is not None:
            self._score.values = found.scores
        self._history = [found.history] if len(found.history) else []

    def _bank_options(self) -> dict[str, Any]:
        config = self.bank.config
        options = {"seed": config.seed, "layout": config.layout, "init": config.init}
        return options | ({"given": self.bank.chosen} if self.bank.widths.informed or self.bank.taken else {})

    def _group(self) -> dict[str, Tensor]:
        """The roles that use each shared matrix, (layers,) bool by matrix."""
        members: dict[str, Tensor] = {}
        for i, (adapter, k) in enumerate(self._places):
            for name in (own.shared for own in adapter.own(k)):
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

    def _redraw_informed(self, fired: Tensor) -> None:
        places = fired.any(dim=1).nonzero().squeeze(1).tolist()
        what = [(*self._places[i], fired[i].nonzero().squeeze(1)) for i in places]
        assert self.batches is not None
        rows = fresh_rows(self.model, what, self.batches, self.loss, self.steps)
        for (adapter, k, indices), fresh in zip(what, rows, strict=True):
            a, b = adapter.own(k)
            kept = torch.ones(len(indices), dtype=torch.float64)
            self.bank.redraw(a, indices, 0 * kept, self.steps, fresh)
            self.bank.redraw(b, indices, kept, self.steps)  # own rows of A and B are of the same directions
            adapter.refresh_own(k)

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

    def _clear(self, fired: Tensor, moments: bool) -> None:
        """Clear the moments of what fired, and its d where it starts again."""
        row = 0
        for adapter in self._adapters.values():
            mine = fired[row : row + len(adapter.roles)]
            row += len(adapter.roles)
            if not mine.any():
                continue
            if self._restarts:
                clear(adapter.d.detach(), mine)
            if moments and self.optimizer is not None:
                for value in self.optimizer.state.get(adapter.d, {}).values():
                    if isinstance(value, Tensor) and value.shape == adapter.d.shape:
                        clear(value, mine)
