"""Predictions as a file: CSV, JSON or parquet, written batch by batch so that a run that was stopped goes on.

Beside the result lies, until it is complete, FILE.partial: a line of JSON for each batch. A batch is taken from there
if its inputs are the same, and computed otherwise; so the result has the same bytes, however often a run was stopped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from .answers import Prediction
    from .predictor import Predictor
    from .tasks import Task

FORMS = (".csv", ".json", ".parquet")


@dataclass(frozen=True)
class Item:
    """One input.

    Args:
        columns: what a row of the result begins with, such as its path.
        value: what `Predictor.task.read` takes.
        stamp: by which it is known again.
        name: what to call it when it cannot be read.
    """

    columns: Mapping[str, str]
    value: Any
    stamp: str
    name: str


@dataclass(frozen=True)
class Asked:
    """What is asked for of every input.

    Args:
        batch: inputs at a time.
        top: classes in a row, the likeliest first.
        embeddings: whether a row has what the head was given.
        compare: whether it has what the base says.
        strict: whether to stop at an input that cannot be read.
    """

    batch: int = 32
    top: int = 1
    embeddings: bool = False
    compare: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Done:
    """A finished batch: its rows, and names and reasons of the inputs that could not be read."""

    rows: list[dict[str, Any]]
    skipped: list[list[str]]


def file_item(path: Path) -> Item:
    """Of an image: known again by name, size and time of its last change."""
    state = path.stat()
    return Item({"path": printable(str(path))}, path, f"{path} {state.st_size} {state.st_mtime_ns}", str(path))


def text_items(path: Path, columns: Sequence[str]) -> list[Item]:
    """Of the texts of a file.

    Raises:
        DataError: see `read_texts`.
    """
    from .texts import read_texts

    found = read_texts(path, columns)
    return [
        Item(
            {c: printable(text) for c, text in zip(columns, texts, strict=True)},
            texts[0] if len(texts) == 1 else texts, repr(texts), f"example {number} of {path}",
        )
        for number, texts in enumerate(found, 1)
    ]  # fmt: skip


def check_output(path: Path, overwrite: bool) -> None:
    """Whether a result can be written there.

    Raises:
        ConfigError: it cannot.
    """
    if path.suffix.lower() not in FORMS:
        raise ConfigError(f"--output {path} must end with {', '.join(FORMS)}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise ConfigError(f"{path} is there already; --overwrite replaces it")
    if path.suffix.lower() == ".parquet":
        from importlib.util import find_spec

        if find_spec("pyarrow") is None:
            raise ConfigError("parquet needs pyarrow: pip install pyarrow; or give --output FILE.csv")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def write_results(
    predictor: Callable[[], Predictor],
    items: Sequence[Item],
    output: Path,
    asked: Asked,
    made_of: Mapping[str, Any],
    overwrite: bool = False,
    seen: Callable[[int], None] = lambda count: None,
) -> Done:
    """Predict all items and write the result.

    Args:
        predictor: makes it, once something is left to compute.
        made_of: what else decides the result, such as the content of the adapter.
        overwrite: whether an unfinished result of another command may go.
        seen: told the number of items that are done.

    Returns:
        All rows, and what was skipped.

    Raises:
        DataError: no input can be read, or with `strict` one cannot.
        ConfigError: the file cannot be written, or what is unfinished is of another command.
    """
    from ..storage.folder import write_atomically

    partial = output.with_name(f"{output.name}.partial")
    decides = {**made_of, "batch": asked.batch, "top": asked.top, "embeddings": asked.embeddings,
               "compare": asked.compare}  # fmt: skip
    head = _digest(json.dumps(decides, sort_keys=True))
    batches = [items[start : start + asked.batch] for start in range(0, len(items), asked.batch)]
    stamps = [_digest("\n".join(item.stamp for item in batch)) for batch in batches]
    done = _read_partial(partial, head, stamps, overwrite)
    made = predictor() if len(done) < len(batches) else None
    with _writing(partial), _opened(partial, head, done, stamps) as file:
        for batch, stamp in zip(batches[len(done) :], stamps[len(done) :], strict=True):
            seen(len(done) * asked.batch)
            assert made is not None
            done.append(_computed(made, batch, asked))
            _append(file, {"batch": stamp, "rows": done[-1].rows, "skipped": done[-1].skipped})
    seen(len(items))
    whole = Done([row for one in done for row in one.rows], [pair for one in done for pair in one.skipped])
    if not whole.rows:
        partial.unlink(missing_ok=True)
        raise DataError(f"none of {len(items)} inputs can be read; {whole.skipped[0][1]}")
    with _writing(output):
        write_atomically(output, encoded(whole.rows, output.suffix.lower()))
        partial.unlink(missing_ok=True)
    return whole


def encoded(rows: Sequence[Mapping[str, Any]], form: str) -> bytes:
    """Rows as the content of a file."""
    if form == ".json":
        return (json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n").encode()
    if form == ".parquet":
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), buffer)
        return buffer.getvalue()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def printable(text: str) -> str:
    """A name in which bytes that are no UTF-8 are written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _computed(predictor: Predictor, batch: Sequence[Item], asked: Asked) -> Done:
    kept, inputs, skipped = [], [], []
    for item, value in zip(batch, read_items(predictor.task, batch), strict=True):
        if isinstance(value, DataError):
            why = str(value) if item.name in str(value) else f"{item.name}: {value}"
            if asked.strict:
                raise DataError(f"{why}. Without --strict it is left out") from value
            skipped.append([printable(item.name), printable(why)])
            continue
        inputs.append(value)
        kept.append(item)
    found = predictor.predict(inputs, asked.embeddings)
    bases = predictor.predict(inputs, base=True) if asked.compare else [None] * len(found)
    rows = [_row(item, one, base, asked) for item, one, base in zip(kept, found, bases, strict=True)]
    return Done(rows, skipped)


def read_items(task: Task, batch: Sequence[Item]) -> list[Any]:
    """What the model reads of each, or why it cannot be read."""

    def read(item: Item) -> Any:
        try:
            return task.read(item.value)
        except DataError as error:
            return error

    if not task.in_threads:
        return [read(item) for item in batch]
    with ThreadPoolExecutor(min(len(batch), os.cpu_count() or 1)) as pool:  # decoders work without Python's lock
        return list(pool.map(read, batch))


def _row(item: Item, found: Prediction, base: Prediction | None, asked: Asked) -> dict[str, Any]:
    row: dict[str, Any] = {**item.columns, **_answer(found, asked.top)}
    if base is not None:
        row |= {f"base_{name}": value for name, value in _answer(base, 1).items()}
    if found.embedding is not None and asked.embeddings:
        row["embedding"] = [float(f"{value:.7g}") for value in found.embedding.tolist()]
    return row


def _answer(found: Prediction, top: int) -> dict[str, Any]:
    if isinstance(found.answer, tuple) and found.probabilities is not None:  # several labels
        shares = zip(found.classes, found.probabilities.tolist(), strict=True)
        return {"labels": list(found.answer)} | {f"probability_{name}": round(share, 6) for name, share in shares}
    if isinstance(found.answer, tuple):
        return {f"value_{name}": float(f"{value:.7g}") for name, value in (found.values or {}).items()}
    if found.probabilities is None:
        return {"answer": found.answer} if isinstance(found.answer, str) else {"value": float(f"{found.answer:.7g}")}
    row: dict[str, Any] = {}
    named = found.top(top)
    if found.rank is not None:  # the answer need not be the likeliest class
        likeliest = [pair for pair in found.top(top + 1) if pair[0] != found.answer]
        named = [(str(found.answer), float(found.probability or 0)), *likeliest][:top]
    for place, (name, share) in enumerate(named, 1):
        row |= {f"class{f'_{place}' * (place > 1)}": name, f"probability{f'_{place}' * (place > 1)}": round(share, 6)}
    return row if found.rank is None else row | {"rank": round(found.rank, 4)}


def _read_partial(path: Path, head: str, stamps: Sequence[str], overwrite: bool) -> list[Done]:
    """The batches of an unfinished result that are still what is asked for: the first ones, until one is not.

    Raises:
        ConfigError: it is of another command.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # the last one has no end, and may be half a line
    except FileNotFoundError:
        return []
    found = [_parsed(line) for line in lines]
    if len(found) < 2:
        return []  # nothing is lost, whatever it is of
    if found[0].get("of") != head:
        if overwrite:
            return []
        raise ConfigError(
            f"{path} is an unfinished result of another adapter, base or options; delete it, give another --output, "
            "or --overwrite"
        )
    done: list[Done] = []
    for entry, stamp in zip(found[1:], stamps, strict=False):
        if entry.get("batch") != stamp:
            break
        done.append(Done(entry["rows"], entry["skipped"]))
    return done


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


class _opened:
    """The file of an unfinished result, which begins with what is done already."""

    def __init__(self, path: Path, head: str, done: Sequence[Done], stamps: Sequence[str]) -> None:
        from ..storage.folder import write_atomically

        lines: list[dict[str, Any]] = [{"of": head}]
        lines += [{"batch": s, "rows": one.rows, "skipped": one.skipped} for s, one in zip(stamps, done, strict=False)]
        write_atomically(path, b"".join(_line(entry) for entry in lines))
        self.file = path.open("ab")

    def __enter__(self) -> BinaryIO:
        return self.file

    def __exit__(self, *_: object) -> None:
        self.file.close()


class _writing:
    """What the system says to writing a file, as one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and error.errno is not None:
            why = (error.strerror or str(error)).lower()
            raise ConfigError(
                f"{self.path} cannot be written: {why}. Make room or give another --output; what is done is kept, and "
                "the same command goes on"
            ) from error


def _append(file: BinaryIO, entry: Mapping[str, Any]) -> None:
    file.write(_line(entry))
    file.flush()
    os.fsync(file.fileno())


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
