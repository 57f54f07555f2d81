"""Tables of text from a file, as people have them. Needs pandas."""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def read_frame(path: Path, names: Sequence[str] = ()) -> pd.DataFrame:
    """Rows of one file, without those that are empty; tab-separated files have no quotes.

    Of csv, tsv, json and jsonl every value is a text, or a list or object of texts. A first row of csv or tsv that
    repeats `names` is a header.

    Raises:
        DataError: it cannot be read, or has no rows.
        ConfigError: pandas is missing.
    """
    try:
        import pandas as pd  # noqa: F401
    except ImportError as error:
        raise ConfigError("tables need pandas: pip install pandas pyarrow; or give a .txt file") from error
    try:
        match path.suffix.lower():
            case ".csv" | ".tsv":
                frame = _separated(_text(path), path.suffix.lower() == ".tsv", list(names))
            case ".json" | ".jsonl":
                frame = _objects(_text(path))
            case ".parquet":
                frame = _parquet(path)
            case other:
                raise DataError(f"{path} has the ending {other!r}; files of {', '.join(SUFFIXES)} can be read")
        full = np.array([any(as_text(v) for v in row) for row in frame.itertuples(index=False, name=None)], dtype=bool)
        if not full.any():
            raise DataError(f"{path} has no rows")
        return frame[full]
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # parsers' errors are ValueErrors
        raise DataError(f"{path} cannot be read: {(str(error).splitlines() or [''])[0]}") from error


def as_text(value: Any) -> str:
    """A value of a table as text without space around it; nothing at all is an empty text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).strip()


def _parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise ConfigError("parquet needs pyarrow: pip install pyarrow") from error
    except Exception as error:  # of pyarrow, whose errors have no common kind
        raise ValueError(str(error)) from error


def _text(path: Path) -> str:
    """A file's text, without the mark that says how it is encoded."""
    content = path.read_bytes()
    return content.decode("utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")


def _separated(text: str, tabs: bool, names: list[str]) -> pd.DataFrame:
    import pandas as pd

    how: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    given = {"names": names, "header": None} if names else {}
    frame = pd.read_csv(
        io.StringIO(text), dtype=str, keep_default_na=False, skipinitialspace=not tabs, index_col=False, **how, **given
    )
    frame.columns = [str(name).strip() for name in frame.columns]
    repeated = names and len(frame) and [as_text(value) for value in frame.iloc[0]] == names
    return frame[1:] if repeated else frame


def _objects(text: str) -> pd.DataFrame:
    """Objects in a list or one per line, or an object of lists."""
    import pandas as pd

    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(found, dict) and found and all(isinstance(column, list) for column in found.values()):
        found = pd.DataFrame(found, dtype=object).to_dict("records")
    rows = [row or {} for row in found] if isinstance(found, list) else [found]
    if odd := next((row for row in rows if not isinstance(row, dict)), None):
        raise ValueError(f"expected objects, such as {{...}} in a list or one per line, found {str(odd)[:40]!r}")
    names = dict.fromkeys(name for row in rows for name in row)
    held = {name: [_value(row.get(name)) for row in rows] for name in names}
    return pd.DataFrame({name.strip(): pd.Series(column, dtype=object) for name, column in held.items()})


def _value(value: Any) -> Any:
    """Lists and objects with texts in them: a column of Arrow has values of one kind."""
    if isinstance(value, list):
        return [_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _value(item) for key, item in value.items()}
    return None if value is None else str(value)
