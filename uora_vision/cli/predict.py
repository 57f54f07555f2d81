"""`uora predict`: from inputs and an adapter to a file of predictions."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError
from ..predict.models import FORMS
from ..version import __version__
from .names import resolved

if TYPE_CHECKING:
    from ..predict.results import Done, Item

INTERRUPTED = 130

OTHER_METHODS = "trained.safetensors"
"""What recipes write for methods that they compare with."""


def predict(
    inputs: Annotated[list[str], typer.Argument(help="Images and folders of images, or files of texts.")],
    adapter: Annotated[str, typer.Option(help="Folder of an adapter, or a hub repository: user/name.")],
    output: Annotated[Path, typer.Option(help="File to write: .csv, .json or .parquet.")] = Path("predictions.csv"),
    model: Annotated[str | None, typer.Option(help=f"The base, where the adapter does not say it: {FORMS}.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Weights of the base: a file, or for open_clip a tag.")] = None,
    classes: Annotated[Path | None, typer.Option(help="Names of the classes, one a line.")] = None,
    columns: Annotated[str | None, typer.Option(help="Of a table: those that hold the texts, as a,b.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes in a row, the likeliest first.")] = 1,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="And what the head is given.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="And what the base says: the head without dW.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Inputs at a time.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an input that cannot be read.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over what is there.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of a hub repository: branch, tag or commit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of text.")] = False,
) -> None:
    """Write what an adapter predicts. Of images, or of texts:
    `uora predict photos/ --adapter runs/photos/adapter --output photos.csv`.

    A run that was stopped goes on with the same command, to the same file.
    """
    from ..predict.results import Asked, check_output, write_results

    check_output(output, overwrite)
    model = None if model is None else "/".join(resolved(model))
    names = None if classes is None else _names(classes)
    there = local_folder(adapter, revision)
    if (there / OTHER_METHODS).is_file():
        raise ConfigError(f"{there} is of another method than uora and vera, which alone can be loaded to predict")

    from ..predict.making import labels_of, task_of
    from ..predict.predictor import Predictor, default_device, load_predictor
    from ..storage.folder import TENSOR_FILE, read_folder

    stored = read_folder(there)
    task = task_of(stored)
    labels_of(stored, names)
    about = stored.about.get("preprocessing", {})
    asked_for = [name.strip() for name in columns.split(",")] if columns else about.get("columns", ["text"])
    items = _items(inputs, task, asked_for)

    def made() -> Predictor:
        return load_predictor(
            adapter, model=model, checkpoint=checkpoint, classes=names, device=device, merge=not compare,
            revision=revision,
        )  # fmt: skip

    made_of = {
        "adapter": hashlib.sha256((there / TENSOR_FILE).read_bytes()).hexdigest(), "model": model,
        "checkpoint": checkpoint, "classes": names, "device": device or default_device(), "version": __version__,
    }  # fmt: skip
    with progress(len(items)) as seen:
        try:
            asked = Asked(batch, top, embeddings, compare, strict)
            done = write_results(made, items, output, asked, made_of, overwrite, seen)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    _tell(done, output, as_json)


def local_folder(folder: str, revision: str | None) -> Path:
    """The folder, or a copy of the repository.

    Raises:
        ConfigError: there is none.
    """
    from ..storage.folder import near
    from ..storage.hub import there

    found = there(folder, revision)
    if not found.is_dir():
        raise ConfigError(f"{folder} is no folder, and no name of a hub repository (user/name){near(found)}")
    return found


def _items(inputs: Sequence[str], task: str, columns: Sequence[str]) -> list[Item]:
    """What to predict, as the task takes it.

    Raises:
        DataError: it is not there, or for another task.
    """
    from ..predict.frames import SUFFIXES
    from ..predict.images import IMAGE_SUFFIXES, find_images
    from ..predict.results import file_item, text_items
    from ..predict.tasks import OF_IMAGES

    tables = {*SUFFIXES, ".txt"}
    endings = {Path(name).suffix.lower() for name in inputs}
    if task in OF_IMAGES:
        if endings & tables:
            raise DataError(f"the adapter is of the task {task}: give images, or folders of images, not a table")
        return [file_item(path) for path in find_images(inputs)]
    if endings & IMAGE_SUFFIXES or not endings <= tables:
        raise DataError(f"the adapter is of the task {task}: give files of texts, {', '.join(sorted(tables))}")
    if missing := [name for name in inputs if not Path(name).is_file()]:
        raise DataError(f"{missing[0]} does not exist; give files of texts, {', '.join(sorted(tables))}")
    return [item for name in inputs for item in text_items(Path(name), columns)]


def _names(path: Path) -> list[str]:
    """A name from each line of a file.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes {path} cannot be read: {error}") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise ConfigError(f"--classes {path} holds no names; write one a line")
    return found


@contextmanager
def progress(total: int, doing: str = "predicting") -> Iterator[Callable[[int], None]]:
    """A bar on the terminal; nothing where there is none."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda count: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda count: bar.update(task, completed=count)


def _tell(done: Done, output: Path, as_json: bool) -> None:
    from ..tables import render

    counts = Counter(row["class"] for row in done.rows if "class" in row)
    counts.update(name for row in done.rows if isinstance(row.get("labels"), list) for name in row["labels"])
    if as_json:
        told = {"output": str(output), "predictions": len(done.rows), "skipped": dict(done.skipped), "classes": counts}
        print(json.dumps(told, indent=2))
        return
    for _, reason in done.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    skipped = f", {len(done.skipped):,} could not be read" if done.skipped else ""
    print(f"wrote {output}: {len(done.rows):,} predictions{skipped}")
    if counts:
        shown: list[tuple[Any, int]] = counts.most_common(10)
        print(render("", ("class", "inputs"), shown))
