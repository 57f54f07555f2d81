"""Numbers of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from torch.utils.tensorboard.writer import SummaryWriter


@contextmanager
def tensorboard(folder: Path) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A function that writes the numbers of a step to `folder`/tensorboard; only the main process writes."""
    if not PartialState().is_main_process:
        yield lambda step, numbers: None
        return
    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def log(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        yield log
