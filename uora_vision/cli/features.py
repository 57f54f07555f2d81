"""`uora features`: how well frozen features tell classes apart, before and after an adapter."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, printable
from ..predict.models import FORMS
from ..tables import render
from .names import resolved
from .predict import OTHER_METHODS, local_folder, progress

if TYPE_CHECKING:
    from ..predict.features import Labelled
    from ..predict.predictor import Predictor

NAMES = {"knn": "nearest neighbours", "linear": "linear probe"}


def features(
    source: Annotated[Path, typer.Argument(help="Folder with a folder per class, or a table of paths and labels.")],
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter, or a hub repository: user/name.")] = None,
    model: Annotated[str | None, typer.Option(help=f"The base of the adapter, or a model alone: {FORMS}.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Weights of the base: a file, or for open_clip a tag.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the features: .npz or .parquet.")] = None,
    path_column: Annotated[str | None, typer.Option(help="Of a table: the images.")] = None,
    target_column: Annotated[str | None, typer.Option(help="Of a table: the classes.")] = None,
    split_column: Annotated[str | None, typer.Option(help="Of a table: train or test.")] = None,
    held_out: Annotated[float, typer.Option(help="Share to measure, where nothing says which images.")] = 0.2,
    neighbors: Annotated[int, typer.Option(min=1, help="Nearest images that decide.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of what is held out, and of the intervals.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of text.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an image that cannot be read.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over what is there.")] = False,
    revision: Annotated[str | None, typer.Option(help="Of a hub repository: branch, tag or commit.")] = None,
) -> None:
    """Measure features before and after adaptation. By nearest neighbours and a linear probe:
    `uora features photos/ --adapter runs/photos/adapter`."""
    if adapter is None and model is None:
        raise ConfigError("features are of an adapter or of a model: give --adapter FOLDER, or --model NAME")
    if not 0 < held_out < 1:
        raise ConfigError(f"--held-out must be between 0 and 1, got {held_out:g}")
    _check_output(output, overwrite)
    _check_packages(output)

    from ..predict.features import extract, labelled_images, measured, probe

    data = labelled_images(
        source, path_column=path_column, target_column=target_column, split_column=split_column, held_out=held_out,
        seed=seed,
    )  # fmt: skip
    given = None if model is None else "/".join(resolved(model))
    predictor = _model(str(given), checkpoint, device) if adapter is None else _adapted(
        adapter, given, checkpoint, device, revision
    )  # fmt: skip
    with progress(len(data.paths), "features") as seen:
        rows, found, base, skipped = extract(
            predictor, data.paths, batch=batch, base=adapter is not None, strict=strict, seen=seen
        )
    data = data.take(rows)
    data.check(source)
    arrays = {"before": found} if base is None else {"before": base, "after": found}
    found_right = {side: probe(values, data, neighbors) for side, values in arrays.items()}
    right = {f"{side}_{how}": hits for side, by in found_right.items() for how, hits in by.items()}
    if base is not None:
        right |= {f"gain_{how}": right[f"after_{how}"].astype(float) - right[f"before_{how}"] for how in NAMES}
    numbers = measured(right, seed)
    if output is not None:
        _write(output, data, arrays)
    for line in (*data.notes, *(f"skipped: {reason}" for reason in skipped)):
        print(printable(line, sys.maxsize), file=sys.stderr)
    told = {
        "classes": len(set(data.labels.tolist())), "train_images": int((~data.test).sum()),
        "test_images": int(data.test.sum()), "unreadable_images": len(skipped), "width": found.shape[1],
        "neighbors": neighbors,
    }  # fmt: skip
    sides = [*arrays, *(["gain"] if base is not None else [])]
    if as_json:
        nested = {side: {how: numbers[f"{side}_{how}"] for how in NAMES} for side in sides}
        print(json.dumps({**told, **nested}, indent=1))
        return
    table = [[NAMES[how], *(_shown(numbers[f"{side}_{how}"], side == "gain") for side in sides)] for how in NAMES]
    title = f"{told['test_images']:,} test images of {told['classes']:,} classes, {told['train_images']:,} to train on"
    print(render(title, ["accuracy", *sides], table))
    print("In brackets: 95 % of test sets drawn from these, with replacement.")
    if output is not None:
        print(printable(f"wrote {output}", sys.maxsize))


def _shown(numbers: dict[str, float], sign: bool) -> str:
    one, low, high = (f"{100 * numbers[name]:{'+' * sign}.1f}" for name in ("value", "low", "high"))
    return f"{one} % ({low} to {high})"


def _adapted(
    adapter: str, model: str | None, checkpoint: str | None, device: str | None, revision: str | None
) -> Predictor:
    from ..predict.making import task_of
    from ..predict.predictor import load_predictor
    from ..predict.tasks import NUMBERS, OF_IMAGES
    from ..storage.folder import read_folder

    there = local_folder(adapter, revision)
    if (there / OTHER_METHODS).is_file():
        raise ConfigError(f"{there} is of another method than uora and vera, which alone can be loaded")
    stored = read_folder(there)
    if (task := task_of(stored)) not in OF_IMAGES:
        raise ConfigError(f"the adapter is of the task {task}, whose inputs are no images")
    names = ["any"] if task != NUMBERS and stored.about.get("labels") is None else None  # features need none
    return load_predictor(
        adapter, model=model, checkpoint=checkpoint, classes=names, device=device, merge=False, revision=revision
    )


def _model(name: str, checkpoint: str | None, device: str | None) -> Predictor:
    """A pretrained model alone."""
    from ..predict.making import data_config
    from ..predict.models import with_weights
    from ..predict.predictor import Predictor, default_device
    from ..predict.tasks import IMAGES, ImageClassification

    made: Any = with_weights(name, None, checkpoint)[0]
    if getattr(made, "pretrained_cfg", None) is None:
        raise ConfigError(f"{name} does not say how its images are prepared; without an adapter give a model of timm")
    made.to(device or default_device())
    return Predictor(made, ImageClassification(made, data_config(made)), IMAGES, (), True)


def _check_output(output: Path | None, overwrite: bool) -> None:
    if output is None:
        return
    if output.suffix.lower() not in (".npz", ".parquet"):
        raise ConfigError(f"--output {output} must end with .npz or .parquet")
    if output.is_dir() or (output.exists() and not overwrite):
        raise ConfigError(f"{output} is there already; --overwrite replaces it")


def _check_packages(output: Path | None) -> None:
    from importlib.util import find_spec

    wanted = {"sklearn": "scikit-learn"} | ({"pyarrow": "pyarrow"} if output and output.suffix == ".parquet" else {})
    if missing := [package for name, package in wanted.items() if find_spec(name) is None]:
        raise ConfigError(f"this needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _write(output: Path, data: Labelled, arrays: dict[str, Any]) -> None:
    import numpy as np

    from ..predict.results import encoded
    from ..storage.folder import write_atomically

    splits = np.where(data.test, "test", "train")
    if output.suffix.lower() == ".parquet":
        rows = [
            {"path": str(path), "label": str(data.labels[i]), "split": str(splits[i])}
            | {side: values[i].tolist() for side, values in arrays.items()}
            for i, path in enumerate(data.paths)
        ]
        content = encoded(rows, ".parquet")
    else:
        buffer = io.BytesIO()
        paths = np.array([str(path) for path in data.paths])
        np.savez(buffer, paths=paths, labels=data.labels, splits=splits, **arrays)
        content = buffer.getvalue()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, content)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {(error.strerror or str(error)).lower()}") from error
