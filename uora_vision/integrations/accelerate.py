"""UORA in a training loop of one's own on Accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import FormatError, StateError
from ..lifecycle.criteria import Criterion, Scope, Score, Source
from ..lifecycle.reinit import Reinitializer
from ..lifecycle.schedules import AlphaSchedule, ThresholdSchedule
from ..maths.redraw_log import Interpolation
from ..options import UNSET, given, hinting
from .state import after_step, changing_state, injected_in, innermost, load_changing_state, read_saved

MODEL_FILE = "uora_model.pt"


class AcceleratedReinitializer(Reinitializer):
    """A `Reinitializer` to call after every `optimizer.step()`, also one that Accelerate turns into nothing.

    Example:
        >>> import torch, uora_vision as uora
        >>> from torch import nn
        >>> from uora_vision.integrations.accelerate import AcceleratedReinitializer
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> optimizer = torch.optim.AdamW(uora.param_groups(model, lr=1e-2))
        >>> reinit = AcceleratedReinitializer(model, optimizer, threshold=1e9)
        >>> reinit.step()  # the optimizer has not stepped
        0
    """

    @hinting
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
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
    ) -> None:
        options = given(
            threshold=threshold, alpha=alpha, every=every, scope=scope, quorum=quorum, interpolation=interpolation,
            relative=relative, reset_moments=reset_moments, criterion=criterion, source=source, batches=batches,
            loss=loss,
        )  # fmt: skip
        super().__init__(model, optimizer=optimizer, **options)
        self._stepped = False
        after_step(optimizer, self._mark)

    def step(self) -> int:
        """As in `Reinitializer`, if the optimizer has stepped since: not while gradients accumulate, nor when the
        gradient scaler skipped the step.

        Returns:
            How many directions fired.
        """
        if not self._stepped:
            return 0
        self._stepped = False
        return super().step()

    def _mark(self) -> None:
        self._stepped = True


@hinting
def prepare_reinitializer(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
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
) -> AcceleratedReinitializer:
    """A reinitializer whose state `accelerator.save_state` and `load_state` keep.

    They keep, of this model, only what training changes, in `uora_model.pt`. One adapted model per accelerator.
    All other options are those of `Reinitializer`.

    Args:
        model: as `accelerator.prepare` returned it.
        optimizer: likewise.

    Raises:
        StateError: the model is not injected, or was not prepared by this accelerator.
        ConfigError: an option cannot be used, or the optimizer lacks some b or d. One that decays them is warned of
            (`UoraWarning`).

    Example:
        >>> import torch, uora_vision as uora
        >>> from accelerate import Accelerator
        >>> from torch import nn
        >>> from uora_vision.integrations.accelerate import prepare_reinitializer
        >>> accelerator = Accelerator(cpu=True)
        >>> model = uora.inject(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rank=4)
        >>> optimizer = torch.optim.AdamW(uora.param_groups(model, lr=1e-2))
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> reinit = prepare_reinitializer(accelerator, model, optimizer, threshold=1e-5)
        >>> accelerator.backward(model(torch.randn(2, 5, 16)).square().mean())
        >>> optimizer.step()
        >>> reinit.step()
        0
    """
    inner = injected_in(model)
    if _index(accelerator._models, inner) is None:
        raise StateError("accelerator.prepare() comes first, then prepare_reinitializer() with what it returned")
    reinit = AcceleratedReinitializer(
        inner, optimizer,
        threshold=threshold, alpha=alpha, every=every, scope=scope, quorum=quorum, interpolation=interpolation,
        relative=relative, reset_moments=reset_moments, criterion=criterion, source=source, batches=batches,
            loss=loss,
    )  # fmt: skip
    reinit.optimizer = innermost(optimizer)

    def whole(models: list[nn.Module], i: int) -> nn.Module:
        return accelerator.unwrap_model(models[i], keep_torch_compile=False)

    def save_changing(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        i = _index(models, inner)
        if i is None or i >= len(weights):  # FSDP and DeepSpeed have written the model by now
            return
        del weights[i]
        if accelerator.is_main_process:
            torch.save(changing_state(whole(models, i)), Path(folder) / MODEL_FILE)

    def load_changing(models: list[nn.Module], folder: str) -> None:
        i, path = _index(models, inner), Path(folder) / MODEL_FILE
        if i is None:
            return
        if not path.is_file():
            raise FormatError(f"{path} does not exist; the checkpoint was written without prepare_reinitializer()")
        load_changing_state(whole(models, i), read_saved(path))
        del models[i]

    accelerator.register_save_state_pre_hook(save_changing)
    accelerator.register_load_state_pre_hook(load_changing)
    accelerator.register_for_checkpointing(reinit)
    return reinit


def _index(models: list[nn.Module], model: nn.Module) -> int | None:
    """The place of the model that is, or holds, this one."""
    return next((i for i, m in enumerate(models) if any(part is model for part in m.modules())), None)
