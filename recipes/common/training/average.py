"""An exponential moving average of a model in training, whose redrawn directions restart."""

from __future__ import annotations

from timm.utils import ModelEmaV3
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.integrations.state import changing_state

from .checkpoint import load_changing_state


class Average:
    """timm's average of a model: rows of A and B follow those of the model, and a direction that was redrawn starts
    again from the model's d. What d was before belongs to rows that are no more.

    The decay of step n, counted from 1, is at most 1 - n^(-2/3), so that the average leaves the start behind.

    Args:
        model: what is averaged, on its device and before it is wrapped.
        decay: share of the average that stays in a step.
        reinit: redraws the directions of the model; None where nothing is redrawn.
    """

    def __init__(self, model: nn.Module, decay: float, reinit: uora.Reinitializer | None) -> None:
        self.model, self.reinit = model, reinit
        self.ema = ModelEmaV3(model, decay=decay, use_warmup=True)

    @property
    def module(self) -> nn.Module:
        """The average, a model of the same kind."""
        return self.ema.module

    def update(self, step: int, fired: int) -> None:
        """After an optimizer step, counted from 1, in which so many directions were redrawn."""
        self.ema.update(self.model, step=step)
        if fired and self.reinit is not None:
            path = next(name for name, module in self.model.named_modules() if module is self.reinit.model)
            averaged, trained = _rows(self.module.get_submodule(path)), _rows(self.reinit.model)
            for _, layer, index in self.reinit.history()[-fired:].tolist():
                averaged[layer][index] = trained[layer][index]

    def state(self) -> dict[str, Tensor]:
        """All that it changes, by name, on the CPU."""
        return changing_state(self.module)

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        load_changing_state(self.module, state)


def _rows(model: nn.Module) -> list[Tensor]:
    """d (r,) of every layer, as a Reinitializer numbers them; writing into it writes into the model."""
    return [row for adapter in uora.adapters(model).values() for row in adapter.d.detach()]
