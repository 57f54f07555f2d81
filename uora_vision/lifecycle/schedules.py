"""Schedules of a Reinitializer: helpers in the author's code."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError


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
        numbers = all(map(is_number, (self.start, self.by, self.floor)))
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
        numbers = all(map(is_number, (self.low, self.high, self.by)))
        if not numbers or not 0 <= self.low <= self.high or self.by <= 0:
            raise ConfigError(f"ThresholdWave needs 0 <= low <= high and by > 0, got {self}")
        if not is_whole(self.steps):
            raise ConfigError(f"ThresholdWave needs a whole number of at least 1 as steps, got {self}")

    def __call__(self, step: int) -> float:
        span = max(1, round((self.high - self.low) / self.by))
        phase = (step - 1) // self.steps % (2 * span)
        return self.low + self.by * min(phase, 2 * span - phase)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
