"""What a person sees while a run goes on: one moving line, and one line that stays for each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from .training import Progress


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

    def step(self, progress: Progress, rate: float, firings: int, per_epoch: int) -> None:
        if self.bar is None or self.task is None:
            return
        share = progress.hits / progress.seen
        numbers = f"loss {progress.loss / progress.seen:.3f} accuracy {share:.1%} lr {rate:.0e}"
        epoch = (progress.step - 1) // per_epoch + 1
        self.bar.update(
            self.task,
            completed=progress.step,
            description=f"{self.name} {epoch}",
            numbers=f"{numbers} firings {firings:,}",
        )

    def epoch(self, entry: dict[str, Any], epochs: int) -> None:
        if self.quiet or entry["test_accuracy"] is None:
            return
        fired = f"  re-drawn {entry['firings']:,}" if entry["firings"] else ""
        self.say(
            f"epoch {entry['epoch']:>3}/{epochs}  train {entry['train_accuracy']:.1%} loss {entry['train_loss']:.3f}"
            f"  test {entry['test_accuracy']:.1%} loss {entry['test_loss']:.3f}{fired}  {entry['seconds']:.0f} s"
        )

    def say(self, text: Any) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=isinstance(text, str))
