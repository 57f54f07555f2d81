"""JSON as a saved adapter may hold it: no key twice, no NaN."""

from __future__ import annotations

import json
from typing import Any

from ..errors import FormatError
from .schema import shortened


def parse(text: str | bytes) -> Any:
    """JSON, strictly: UTF-8, no key twice, no NaN, no half of a surrogate pair.

    Raises:
        FormatError: it is not that.
    """
    try:
        found = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # type: ignore[operator]
            json.dumps(found, ensure_ascii=False).encode()  # a half of a surrogate pair is no character
        return found
    except RecursionError as error:
        raise FormatError("its JSON is nested too deeply") from error
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"it is not valid JSON ({error})") from error


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"the key {shortened(twice)} is there twice")
    return out


def _no_constant(name: str) -> Any:
    raise FormatError(f"its JSON holds {name}")
