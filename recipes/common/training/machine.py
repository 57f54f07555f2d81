"""The machine that a run has: its device and processes, its memory, and the signals that ask it to stop."""

from __future__ import annotations

import resource
import signal
import sys
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from ..errors import PrecisionError


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the step; the second one acts as usual."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: Any) -> None:
        self.reason = "interrupted"
        signal.signal(number, self._before[signal.Signals(number)])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def make_accelerator(precision: str) -> Accelerator:
    """Device, precision and processes, as accelerate finds them.

    Raises:
        PrecisionError: the device has not that precision.
    """
    try:
        # The banks are buffers and the same in every process: broadcasting them in every forward would be waste.
        return Accelerator(
            mixed_precision=precision, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
        )
    except ValueError as error:
        raise PrecisionError(f"--precision {precision} does not work here: {error}") from error


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the GPU's memory by torch, otherwise of the machine's by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
