"""The folder of a run: no run overwrites another, and none is continued as another."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from ..command.options import FREE
from ..errors import CheckpointError, OutputError
from .checkpoint import read_checkpoint

CHECKPOINT, CHECKPOINTS = "checkpoint.pt", "checkpoints"
"""What an unfinished run holds: the file of our own loop, or the folder of the transformers Trainer."""
METRICS, CONFIG, INPUTS = "metrics.json", "config.yaml", "inputs.json"
ROOM = 8 * 2**20
"""Bytes that must be free: less than any run writes."""
TOLD = {"data": "the data are not what the run began with", "base": "the base model has other weights"}


def prepare_folder(folder: Path | None, resume: bool, name: str, config: dict[str, Any] | None = None) -> Path:
    """Name and check the folder of a run: a new one, or with `resume` the one that holds its checkpoint.

    Args:
        folder: as asked for; None for the first free one of `runs/NAME`, `runs/NAME-2`, ...
        config: the run's options; a run that is continued must have the same.

    Raises:
        OutputError: it holds a run already, or nothing to resume; or it cannot be written, or the disk is full.
        CheckpointError: what it holds cannot be resumed, or is of a run with other options.
    """
    if folder is None:
        if resume:
            raise OutputError("--resume needs --output FOLDER, the folder of the run to go on with")
        numbered = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10**6))
        folder = next(path for path in numbered if not path.exists())
    if resume:
        if (folder / METRICS).exists():
            raise OutputError(f"the run in {folder} is finished; there is nothing to resume")
        if not any((folder / CHECKPOINTS).glob("checkpoint-*")):
            read_checkpoint(folder / CHECKPOINT)
        _compare(folder / CONFIG, config or {})
    elif folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is not a folder; give another --output")
    else:
        unfinished = "an unfinished run (--resume continues it)"
        for held, what in ((METRICS, "a finished run"), (CHECKPOINT, unfinished), (CHECKPOINTS, unfinished)):
            if (folder / held).exists():
                raise OutputError(f"{folder} holds {what}; give another --output, or delete it first")
    _try_writing(folder)
    return folder


def record_config(folder: Path, config: dict[str, Any], inputs: dict[str, str], resume: bool = False) -> None:
    """Write the resolved options, for `--config` and for a later look, and digests of what the run works on.

    Args:
        inputs: digests of the `data` and of the `base`; a run that is continued must have the same.

    Raises:
        CheckpointError: a run would go on with others.
    """
    if resume:
        _compare_inputs(folder / INPUTS, inputs)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_json(folder / INPUTS, inputs)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole once the new one is complete."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _try_writing(folder: Path) -> None:
    """Raise an OutputError where a file of some size cannot be written; what was made for that goes away again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written: {(error.strerror or str(error)).lower()}; give another --output, or make room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
            for path in made:
                path.rmdir()


def _compare_inputs(path: Path, inputs: dict[str, str]) -> None:
    """Raise a CheckpointError where a run would go on with other data or another base."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        different = [told for key, told in TOLD.items() if saved[key] != inputs[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"--resume needs {path}, which is missing or damaged; start the run again") from error
    if different:
        raise CheckpointError(f"--resume continues a run on the same inputs: {' and '.join(different)}")


def _compare(path: Path, asked: dict[str, Any]) -> None:
    """Raise a CheckpointError that lists the options in which two runs differ."""
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert isinstance(saved, dict)
    except (OSError, yaml.YAMLError, AssertionError) as error:
        raise CheckpointError(f"--resume needs {path}, which is missing or damaged; start the run again") from error
    keys = sorted((saved.keys() | asked.keys()) - FREE)
    if different := [key for key in keys if saved.get(key) != asked.get(key)]:
        listed = "; ".join(
            f"--{key.replace('_', '-')} was {saved.get(key)}, is now {asked.get(key)}" for key in different
        )
        raise CheckpointError(f"--resume continues a run with the same options: {listed}")
