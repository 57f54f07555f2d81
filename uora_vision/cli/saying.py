"""What commands say, and how they read and check what they are given."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, TextIO

from ..errors import ConfigError, printable


def say(what: object, where: TextIO | None = None) -> None:
    """Print what may hold strings out of foreign files: as text, without control of the terminal."""
    stream = where or sys.stdout
    coding = getattr(stream, "encoding", None) or "utf-8"
    text = printable(str(what), sys.maxsize)
    print(text.encode(coding, "backslashreplace").decode(coding), file=stream)


def as_text(**told: Any) -> str:
    return json.dumps(told, indent=2, default=str)


def numbers(text: str) -> list[int]:
    """`0-2,11` as 0, 1, 2, 11.

    Raises:
        ConfigError: it is something else.
    """
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"(-?\d{1,5})|(\d{1,5})-(\d{1,5})", part.strip())
        if ends is None or (ends[2] and int(ends[2]) > int(ends[3])):
            raise ConfigError(f"--blocks takes numbers and ranges such as 0-5,11, or --blocks=-1, not {text!r}")
        found += [int(ends[1])] if ends[1] else range(int(ends[2]), int(ends[3]) + 1)
    return found


def check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already; --overwrite replaces it")


def need(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def size_of(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
