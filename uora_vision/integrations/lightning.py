"""UORA in Lightning, from either of its packages: `lightning.pytorch` if installed, or else `pytorch_lightning`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]

from ..errors import StateError
from ..lifecycle.criteria import Criterion, Score
from ..lifecycle.informing import inform as inform_adapter
from ..lifecycle.library import adapters, bank_of
from ..lifecycle.optimizers import check_optimizer
from ..lifecycle.reinit import Reinitializer, Scope, Source
from ..lifecycle.schedules import AlphaSchedule, ThresholdSchedule
from ..maths.redraw_log import Interpolation
from ..options import UNSET, given, hinting
from .state import after_step, frozen_names, injected_in, keep_missing_base, rows_of

KEY = "uora_reinit"


class UoraCallback(Callback):
    """Redraws dead directions after every optimizer step that is taken. Takes the options of `Reinitializer`.

    Checkpoints hold the state of `reinit` and no frozen weights; `fit(ckpt_path=...)` goes on from them, and `validate`
    and `test` read them. The LightningModule builds and injects its model in `__init__`. The number of firings so far
    is logged as `firings`.

    Args:
        inform: how many batches of the training data give the adapter informed rows before the first step (see
            `uora.inform`); 0: none.
        inform_loss: the loss of a batch, `inform_loss(model, batch)` with the injected model; see `uora.inform`.

    Raises, in fit:
        StateError: the module holds no injected model, no optimizer trains it, or a checkpoint has no such state.
        ConfigError: the optimizer that has d lacks some of b and d. One that decays them is warned of (`UoraWarning`).

    Example:
        >>> from uora_vision.integrations.lightning import UoraCallback
        >>> callback = UoraCallback(threshold=1e-5, scope="layer")  # Trainer(callbacks=[callback])
        >>> callback.options
        {'threshold': 1e-05, 'scope': 'layer'}
    """

    @hinting
    def __init__(
        self,
        *,
        threshold: float | ThresholdSchedule = UNSET,
        alpha: float | AlphaSchedule = UNSET,
        every: int = UNSET,
        scope: Scope = UNSET,
        quorum: float = UNSET,
        interpolation: Interpolation = UNSET,
        relative: bool = UNSET,
        reset_moments: bool = UNSET,
        criterion: Criterion | Score = UNSET,
        source: Source = UNSET,
        batches: Iterable[Any] | None = UNSET,
        loss: Callable[[nn.Module, Any], Tensor] | None = UNSET,
        inform: int = 0,
        inform_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.inform, self.inform_loss = inform, inform_loss
        self.options = given(
            threshold=threshold, alpha=alpha, every=every, scope=scope, quorum=quorum, interpolation=interpolation,
            relative=relative, reset_moments=reset_moments, criterion=criterion, source=source, batches=batches,
            loss=loss,
        )  # fmt: skip
        self.reinit: Reinitializer | None = None
        self._ends: list[Callable[[], None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        self._ends.append(keep_missing_base(injected_in(pl_module)).remove)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if KEY not in checkpoint:
            raise StateError(
                "the checkpoint has no reinitialisation state, so the banks that it was trained with are lost; it was "
                "written without UoraCallback, or with save_weights_only=True"
            )
        self._reinit(injected_in(pl_module)).load_state_dict(checkpoint[KEY])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = injected_in(pl_module)
        optimizer = next((o for o in trainer.optimizers if _trains(o, model)), None)
        if optimizer is None:
            raise StateError("no optimizer has the adapter's d; configure_optimizers must give it, see param_groups()")
        if self.inform and not trainer.global_step:
            batches = trainer.train_dataloader
            inform_adapter(model, batches, self.inform_loss, max_batches=self.inform)  # type: ignore[arg-type]
        made = self.reinit
        reinit = self._reinit(model, optimizer)
        if reinit is made:  # else it has looked at the optimizer itself
            check_optimizer(optimizer, model)
        reinit.optimizer = optimizer
        # Not a hook of Lightning: they also come after a step that the gradient scaler skipped.
        self._ends.append(after_step(optimizer, reinit.step))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.reinit is not None:
            pl_module.log("firings", float(self.reinit.firings), on_step=True, on_epoch=False, batch_size=1)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        model = injected_in(pl_module)
        prefix = next(f"{name}." if name else "" for name, m in pl_module.named_modules() if m is model)
        # Of other frozen parts nothing is known: one may be a teacher that moves without gradients.
        for name in frozen_names(model):
            checkpoint["state_dict"].pop(prefix + name, None)
        checkpoint["state_dict"].update({prefix + name: rows for name, rows in rows_of(model).items()})
        checkpoint[KEY] = self._reinit(model).state_dict()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _reinit(self, model: nn.Module, optimizer: Any = None) -> Reinitializer:
        if self.reinit is None or self.reinit.bank is not bank_of(model):
            options = self.options
            if optimizer is None:  # it comes with on_train_start, and only a step needs it
                options = {**options, "reset_moments": False}
            self.reinit = Reinitializer(model, optimizer=optimizer, **options)
        self.reinit.reset_moments = bool(self.options.get("reset_moments"))
        return self.reinit

    def _release(self) -> None:
        while self._ends:
            self._ends.pop()()


def _trains(optimizer: Any, model: nn.Module) -> bool:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(adapter.d) in held for adapter in adapters(model).values())
