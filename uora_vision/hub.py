"""Adapters on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def is_repository(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder that `load` is given is the name of a repository: `user/name`, and no folder here."""
    return isinstance(folder, str) and _REPOSITORY.fullmatch(folder) is not None and not Path(folder).exists()


def local_copy(repository: str, revision: str | None = None) -> Path:
    raise NotImplementedError
