"""Where the numbers of a run go besides its report: trackers as accelerate has them, and a table."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, WandBTracker

from ..errors import TrainingError

PROJECT = "uora_vision"
TABLE = "numbers.csv"

Log = Callable[[int, dict[str, float]], None]


@contextmanager
def tracking(folder: Path, names: Sequence[str], config: Mapping[str, Any]) -> Iterator[Log]:
    """A function that gives the numbers of a step to each tracker; only the main process does.

    Args:
        folder: of the run.
        names: `tensorboard` (to `folder`/tensorboard), `csv` (to `folder`/numbers.csv), `wandb`, `mlflow`.
        config: the options of the run, for those that keep them.

    Raises:
        TrainingError: one of them cannot be started.
    """
    if not PartialState().is_main_process:
        yield lambda step, numbers: None
        return
    with ExitStack() as ends:
        trackers = [_started(name, folder, config, ends) for name in names]

        def log(step: int, numbers: dict[str, float]) -> None:
            for tracker in trackers:
                tracker.log(numbers, step=step)

        yield log


class Table(GeneralTracker):
    """A csv file with a row for every number: step, name, value. A run that goes on adds to it."""

    name = "csv"
    requires_logging_directory = True

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def start(self) -> None:
        new = not self.path.exists()
        self.file = self.path.open("a", newline="", encoding="utf-8")
        self.rows = csv.writer(self.file)
        if new:
            self.rows.writerow(("step", "name", "value"))

    @property
    def tracker(self) -> Any:
        return self.rows

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.rows.writerows((step, name, value) for name, value in values.items())
        self.file.flush()

    def finish(self) -> None:
        self.file.close()


def _started(name: str, folder: Path, config: Mapping[str, Any], ends: ExitStack) -> GeneralTracker:
    folder.mkdir(parents=True, exist_ok=True)
    made: GeneralTracker
    if name == "tensorboard":
        made = TensorBoardTracker("tensorboard", folder, flush_secs=30)
    elif name == "csv":
        made = Table(folder / TABLE)
    elif name == "wandb":
        made = WandBTracker(PROJECT, name=folder.name, dir=str(folder))
    else:
        made = MLflowTracker(PROJECT, run_name=folder.name)
    logging.getLogger("accelerate.tracking").setLevel(logging.ERROR)
    try:
        made.start()
        ends.callback(made.finish)
        if name in ("wandb", "mlflow"):
            made.store_init_configuration(dict(config))
    except Exception as error:  # a service that is not there; each client has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise TrainingError(f"--track {name} cannot start: {reason}. Leave it out of --track, or set it up") from error
    return made
