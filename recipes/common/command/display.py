"""What a person sees while a run goes on: one moving line, and one line that stays for each epoch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Display:
    """Progress on the terminal; where there is no terminal, only the lines that stay."""

    def __init__(self, console: Console | None = None, quiet: bool = False, name: str = "epoch") -> None:
        self.console, self.quiet, self.name = console or Console(), quiet, name
        self.bar: Bar | None = None
        self.task: TaskID | None = None

    @contextmanager
    def running(self, total: int, done: int, epochs: int) -> Iterator[None]:
        """Show a bar of `total` steps."""
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = [
            TextColumn("{task.description}"),
            BarColumn(12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[numbers]}"),
        ]
        with Bar(*columns, console=self.console, transient=True) as bar:
            self.bar, self.task = bar, bar.add_task(self.name, total=total, completed=done, numbers="")
            try:
                yield
            finally:
                self.bar = self.task = None

    def step(self, step: int, epoch: int, numbers: dict[str, float]) -> None:
        """Move the bar to `step`; `numbers` by name, such as `train/loss`."""
        if self.bar is not None and self.task is not None:
            shown = " ".join(f"{(name := key.rpartition('/')[2])} {_score(name, v)}" for key, v in numbers.items())
            self.bar.update(self.task, completed=step, description=f"{self.name} {epoch}", numbers=shown)

    def epoch(self, entry: dict[str, Any], epochs: int) -> None:
        scores = [(key, value) for key, value in entry.items() if key.startswith(("train_", "test_"))]
        if self.quiet or not any(key.startswith("test_") for key, _ in scores):
            return
        fired = f"  redrawn {entry['firings']:,}" if entry["firings"] else ""
        self.say(
            f"epoch {entry['epoch']:>3}/{epochs}  "
            + "  ".join(f"{key.replace('_', ' ')} {_score(key, value)}" for key, value in scores)
            + f"{fired}  {entry['seconds']:.0f} s"
        )

    def warn(self, text: str) -> None:
        """One line on stderr, also where it is quiet."""
        print(f"note: {' '.join(text.split())}", file=sys.stderr)

    def say(self, text: Any) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=isinstance(text, str))


def _score(name: str, value: float) -> str:
    if "accuracy" in name:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if value < 0.01 else f"{value:.3f}"
