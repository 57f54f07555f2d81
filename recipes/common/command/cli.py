"""A recipe's command line, made from the fields of its options: one typed dataclass is arguments, YAML and record.

python recipes/NAME.py --lr 1e-3 --output runs/a        # every field is an option
python recipes/NAME.py --config runs/a/config.yaml      # as the last run resolved them; options on the line win

A recipe parses before it imports what takes seconds, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer
import yaml

from uora_vision.cli.train import command as started

from ..errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}
"""A disk that is full, or does not take what is written."""
Options = TypeVar("Options")


def parse(kind: type[Options], doc: str | None = None, words: Sequence[str] | None = None) -> Options:
    """The options that the command line gives. The process ends where it gives none: after --help, and, with one line
    on stderr and exit code 2, after a mistake.

    Args:
        kind: a dataclass, whose fields are annotated as typer's parameters are:
            `rank: Annotated[int, typer.Option(help=...)] = 8`.
        doc: what --help says before the options.
        words: of the command line; None for the process's own.
    """
    try:
        return read(kind, words, doc)
    except RecipeError as error:
        sys.exit(_told(str(error)))


def read(kind: type[Options], words: Sequence[str] | None, doc: str | None = None) -> Options:
    """As `parse`, within a program.

    Raises:
        RecipeError: an option is wrong.
        SystemExit: help was asked for.
    """
    try:
        usual, own = f"python recipes/{Path(sys.argv[0]).name}", shlex.join(started())
        told = doc if doc is None or started()[0] == "python" else doc.replace(usual, own)
        found = _application(kind, told)(words, prog_name=own.removeprefix("python "), standalone_mode=False)
    except typer.TyperException as error:
        raise RecipeError(error.format_message() if hasattr(error, "format_message") else str(error)) from error
    return found if isinstance(found, kind) else sys.exit(found)


def main(run: Callable[[Any], Any], options: Any) -> int:
    """Run a recipe; gives the exit code. What is wrong with its use is told as one line on stderr, with code 2."""
    import uora_vision as uora

    try:
        run(options)
    except typer.Exit as leaving:
        return leaving.exit_code
    except (RecipeError, uora.UoraError) as error:
        # A worker's error arrives with the worker's traceback; its last line is the message.
        return _told(re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1]))
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f": {error.filename}" if error.filename else ""
        return _told(f"{error.strerror}{where}. Nothing more can be written; make room, or give another --output.")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def read_yaml(path: Path, known: set[str]) -> dict[str, Any]:
    """Options from a YAML file, for the fields in `known`.

    Raises:
        RecipeError: it cannot be read, or names an option that does not exist.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"--config {path} must hold lines such as `rank: 8`, it holds a {type(found).__name__}")
    found = {str(key).replace("-", "_"): value for key, value in found.items()}
    if unknown := sorted(found.keys() - known):
        raise RecipeError(f"--config {path} has options that this recipe does not know: {', '.join(unknown)}")
    return found


def plain(options: Any) -> dict[str, Any]:
    """The fields of an options dataclass as JSON and YAML can hold them."""
    return {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}


def stopped(console: Console, reason: str, step: int, folder: Path) -> typer.Exit:
    """Say how an unfinished run is continued; to be raised."""
    line = shlex.join([*started(), *(word for word in sys.argv[1:] if word != "--resume")])
    words = shlex.split(re.sub(r" --max-(steps|seconds)[ =]\S+", "", line))
    if "--output" not in " ".join(words):
        words += ["--output", str(folder)]
    text = f"stopped after step {step} ({reason}). To go on: {shlex.join([*words, '--resume'])}"
    console.print(text, soft_wrap=True, highlight=False)
    return typer.Exit(INTERRUPTED if reason == "interrupted" else 0)


def _application(options: type, doc: str | None) -> typer.Typer:
    """A command with an option for each field of the dataclass, which gives an instance."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    def command(context: typer.Context, **values: Any) -> Any:
        values.pop("config")
        return options(**values)

    def read(context: typer.Context, path: Path | None) -> Path | None:
        context.default_map = {} if path is None else read_yaml(path, {f.name for f in dataclasses.fields(options)})
        return path

    config = Annotated[
        Path | None,
        typer.Option(callback=read, is_eager=True, help="YAML file of these options; those on the line win"),
    ]
    hints = get_type_hints(options, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", kind, annotation=typer.Context),
        *(
            inspect.Parameter(f.name, kind, default=f.default, annotation=hints[f.name])
            for f in dataclasses.fields(options)
        ),
        inspect.Parameter("config", kind, default=None, annotation=config),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(help=doc)(command)
    return app


def _told(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value
