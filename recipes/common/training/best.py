"""Which evaluation was best, and when there is no hope of a better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from uora_vision.cli.page import LOWER

from ..errors import TrainingError


@dataclass
class Best:
    """The best evaluation so far.

    Args:
        measure: by which evaluations are compared; None keeps none.
        patience: evaluations without a better one after which it is over; None for never.
        value: of the best.
        epoch: of the best.
        worse: evaluations since then.
        state: of the model then.
    """

    measure: str | None = None
    patience: int | None = None
    value: float | None = None
    epoch: int | None = None
    worse: int = 0
    state: dict[str, Tensor] | None = None

    def check(self, known: Sequence[str]) -> None:
        """Raise a TrainingError if nothing is measured by that name."""
        if self.measure is not None and self.measure not in known:
            raise TrainingError(f"--best {self.measure} is not measured here; there are {', '.join(known)}")

    def look(self, scores: Mapping[str, float], epoch: int, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """After an evaluation. A value that is not a number is no better than any other."""
        if self.measure is None:
            return
        value, sign = float(scores[self.measure]), -1 if self.measure in LOWER else 1
        if not math.isnan(value) and (self.value is None or sign * value > sign * self.value):
            self.value, self.epoch, self.worse = value, epoch, 0
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in state().items()}
        else:
            self.worse += 1

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return self.patience is not None and self.worse >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("measure", "patience")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])
