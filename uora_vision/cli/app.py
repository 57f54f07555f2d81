"""The command `uora`: what an adapter would be, what a saved one is, and what can be made of it.

Exit codes: 0 all is well, 1 a check failed, 2 bad input. Commands import what they need themselves, so that help and a
mistake are answered without waiting for torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import UoraConfig
from ..errors import ConfigError, FormatError, UoraError, printable
from ..predict.models import FORMS
from ..version import __version__ as version
from .features import features
from .names import FORMS as NAMES
from .names import resolved
from .predict import local_folder, predict
from .runs import runs
from .saying import as_text, check_free, need, numbers, say, size_of
from .train import train

if TYPE_CHECKING:
    from torch import nn

    from ..maths.bank import Bank
    from ..storage.stored import Stored

app = typer.Typer(
    help="Adapters of uora_vision: plan, train, predict, features, runs, inspect, merge, export, verify, upgrade.",
    epilog="Exit codes: 0 all is well, 1 a check failed, 2 bad input.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Folder = Annotated[
    str, typer.Argument(help="Folder of an adapter, or a repository on the Hugging Face hub: user/name.")
]

Model = Annotated[
    str | None, typer.Option("--model", help=f"The base, where the adapter does not say it, or another: {FORMS}.")
]

Checkpoint = Annotated[
    str | None,
    typer.Option(help="Weights of the base: a file, or for open_clip a tag. Default: those timm or the folder has."),
]

Revision = Annotated[str | None, typer.Option(help="Of a hub repository: branch, tag or commit.")]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write over what is there.")]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of text.")]


class Kind(StrEnum):
    """Forms that `uora export` writes."""

    lora = "peft-lora"
    vera = "peft-vera"
    onnx = "onnx"


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: those after `uora`; None for the process's own.

    Returns:
        The exit code.
    """
    try:
        app(arguments, prog_name="uora")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    except (UoraError, ImportError, OSError) as error:
        lines = printable(str(error)).splitlines()
        say(f"error: {lines[0] if lines else repr(error)}", sys.stderr)
        return 2
    return 0


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show_version:
        say(f"uora_vision {version}")
        raise typer.Exit


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help=f"The base: {NAMES}.")],
    targets: Annotated[str, typer.Option(help="What to adapt, as for inject.")] = "+".join(UoraConfig().targets),
    exclude: Annotated[str, typer.Option(help="What to leave, as for inject.")] = "",
    blocks: Annotated[
        str | None, typer.Option(help="Only these: 0-5,11; negative from the end, as --blocks=-1. Default: all.")
    ] = None,
    rank: Annotated[int, typer.Option(help="Number of directions of every projection.")] = UoraConfig().rank,
    as_json: AsJson = False,
    diff: Annotated[bool, typer.Option("--diff", help="Trace a run and compare it with the rules.")] = False,
) -> None:
    """Show what would be adapted in a model. Builds no weights:
    `uora plan timm/vit_base_patch16_224 --targets qv --blocks 6-11`."""
    from .models import on_meta

    chosen = None if blocks is None else numbers(blocks)
    made, example = on_meta(model)  # a wrong name is answered before anything large is imported

    from ..lifecycle.trained_parts import base_parameters
    from ..structure.planning import plan as plan_of
    from ..structure.survey import Survey

    what = plan_of(
        made, rank=rank, targets=targets, exclude=exclude or (), blocks=chosen, example_input=example if diff else None
    )
    if as_json:
        say(what.to_json())
        return
    say(what)
    trained = [made.get_parameter(name) for name in base_parameters(Survey(made), what.config.train)]
    vectors, head = 4 * what.parameters, sum(p.numel() * p.element_size() for p in trained)
    say(f"\nA file of about {size_of(vectors)}, and {size_of(head)} for trained parts of the base (its head).")


app.command("train", context_settings={"allow_interspersed_args": False})(train)
app.command("predict")(predict)
app.command("features")(features)
app.command("runs")(runs)


@app.command()
def inspect(
    folder: Folder,
    png: Annotated[Path | None, typer.Option(help="Draw |b|, |d| and redraws into this file.")] = None,
    as_json: AsJson = False,
    revision: Revision = None,
) -> None:
    """Tell what a saved adapter is. Its base, options, parameters, redraws, |b| and |d| by layer:
    `uora inspect runs/photos/adapter --png vectors.png`."""
    from ..storage.folder import read_folder
    from .describe import describe, facts, plot

    there = local_folder(folder, revision)
    stored = read_folder(there)
    size = sum(p.stat().st_size for p in there.iterdir() if p.is_file())
    say(json.dumps(facts(stored, size), indent=2) if as_json else describe(stored, size))
    if png is not None:
        need("matplotlib")
        plot(stored, png)


@app.command("merge")
def merge_into(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="Folder for model.safetensors.")],
    model: Model = None,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the base with the adapter in its weights. It is a plain model:
    `uora merge runs/photos/adapter --output merged/`."""
    from ..lifecycle.merging import merge

    check_free(output / "model.safetensors", overwrite)
    made, example = _loaded(folder, revision, model, checkpoint)
    report = merge(made, example)
    output.mkdir(parents=True, exist_ok=True)
    save_pretrained: Any = getattr(made, "save_pretrained", None)
    if save_pretrained is not None:
        save_pretrained(output)
    else:
        from safetensors.torch import save_model

        save_model(made, str(output / "model.safetensors"))
    written = output / "model.safetensors"
    say(as_text(output=written, **asdict(report)) if as_json else f"{report}\nwrote {written}")


@app.command()
def export(
    folder: Folder,
    to: Annotated[Kind, typer.Option(help="What to write.")],
    output: Annotated[Path, typer.Option(help="Folder to write, or for onnx the file.")],
    model: Model = None,
    rank: Annotated[int | None, typer.Option(help="Of peft-lora: of the closest LoRA by SVD. Default: exact.")] = None,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the adapter for PEFT, or as ONNX. ONNX has the merged model:
    `uora export runs/photos/adapter --to onnx --output photos.onnx`."""
    if rank is not None and to != Kind.lora:
        raise ConfigError(f"--rank goes with --to peft-lora, not with {to.value}")

    from ..interop.onnx import to_onnx
    from ..interop.peft_write import to_peft_lora, to_peft_vera
    from ..lifecycle.merging import merge
    from ..storage.folder import TENSOR_FILE

    check_free(output if to == Kind.onnx else output / TENSOR_FILE, overwrite)
    if to == Kind.onnx:
        need("onnx", "onnxscript")
    made, example = _loaded(folder, revision, model, checkpoint)
    if to == Kind.onnx:
        merge(made)
        error = to_onnx(made, example, output)
        if as_json:
            say(as_text(output=output, kind="ONNX", output_error=error))
        elif error is None:
            say(f"wrote {output}; pip install onnxruntime to have it compared with the model")
        else:
            _verdict([(error < 1e-3, f"wrote {output}: relative difference of outputs in onnxruntime {error:.2g}")])
        raise typer.Exit(int(error is not None and error >= 1e-3))
    report = to_peft_lora(made, output, rank) if to == Kind.lora else to_peft_vera(made, output)
    say(as_text(output=output, **{k: v for k, v in asdict(report).items() if k != "folder"}) if as_json else report)


@app.command()
def verify(
    folder: Folder,
    model: Model = None,
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Check a saved adapter. Its files, whether A and B come out as they were, and whether it fits its base, if that is
    to be had: `uora verify runs/photos/adapter`."""
    from ..storage.base import Base
    from ..storage.fit import fit
    from ..storage.folder import read_folder
    from ..storage.schema import FORMAT_VERSION
    from ..storage.snapshot import rebuilt

    there = local_folder(folder, revision)
    checks: Checks = []
    stored = _checked(checks, "files are whole, of a known version, without NaN", lambda: read_folder(there))
    if stored is None:
        _verdict(checks, as_json)
        return
    if stored.trained is None:
        checks.append((True, f"format is an old one: `uora upgrade` makes it version {FORMAT_VERSION}"))
    if stored.bank_fingerprint is None:
        checks.append((True, "A and B have no fingerprint in this file"))
    elif stored.widths.of_weights and stored.shared is None:
        checks.append((None, "A and B are those of the base's weights, and compared where it is loaded"))
    else:
        _checked(checks, "A and B come out as where it was trained", lambda: rebuilt(stored, _bank(stored)))
    try:
        name, made, example = _base(stored, folder, model, checkpoint)
    except ConfigError as error:
        if model is not None or checkpoint is not None:
            raise
        checks.append((None, f"not held against a base: {error}"))
    else:
        made_for = "its fingerprint" if stored.identity.fingerprint else "its architecture"
        fitted = _checked(checks, f"fits {name}, by {made_for}", lambda: fit(stored, Base(made)))
        if fitted is not None:
            _checked(checks, "loads, and its outputs are finite", lambda: _run(made, there, example))
    _verdict(checks, as_json)


@app.command()
def upgrade(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    as_json: AsJson = False,
) -> None:
    """Rewrite an adapter of an earlier format. In place: `uora upgrade runs/old/adapter`."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder")

    from ..storage.folder import upgrade as upgrade_folder
    from ..storage.schema import FORMAT_VERSION

    done = upgrade_folder(folder)
    if as_json:
        say(as_text(folder=folder, upgraded=done, format_version=FORMAT_VERSION))
        return
    say(f"{folder} is of format version {FORMAT_VERSION} now" if done else f"{folder} needs no upgrade")


def _loaded(folder: str, revision: str | None, model: str | None, checkpoint: str | None) -> tuple[nn.Module, Any]:
    """A model with an adapter in it, and an input."""
    from ..storage.folder import read_folder
    from ..storage.save_load import load

    there = local_folder(folder, revision)
    _, made, example = _base(read_folder(there), folder, model, checkpoint)
    return load(made, there), example


def _base(stored: Stored, folder: str, model: str | None, checkpoint: str | None) -> tuple[str, nn.Module, Any]:
    """The base of an adapter: its name, the model, and an input.

    Raises:
        ConfigError: it is not to be had.
    """
    from ..predict.models import named, with_weights

    given = None if model is None else "/".join(resolved(model))
    name, weights = named(stored, Path(folder) if Path(folder).is_dir() else None, given, checkpoint)
    return name, *with_weights(name, stored, weights)


def _bank(stored: Stored) -> Bank:
    from ..maths.bank import Bank

    return Bank(stored.config, stored.widths, first=stored.first())


def _run(made: nn.Module, there: Path, example: Any) -> None:
    import torch

    from ..storage.save_load import load
    from ..structure.example import call, float_tensors

    with torch.no_grad():
        outputs = list(float_tensors(call(load(made, there), example)))
    if not all(t.isfinite().all() for t in outputs):
        raise FormatError("outputs on random input are NaN or infinite")


Checks = list[tuple[bool | None, str]]
"""Whether each passed, None if it was not made, and what it is."""


def _checked(checks: Checks, what: str, check: Callable[[], Any]) -> Any:
    """Note whether a check passes; what it gives, or None."""
    try:
        result = check()
    except UoraError as error:
        checks.append((False, f"{what}: {str(error).splitlines()[0]}"))
        return None
    checks.append((True, what))
    return result


def _verdict(checks: Checks, as_json: bool = False) -> None:
    """Print checks, and leave with 1 if one failed."""
    if as_json:
        say(json.dumps([{"passed": passed, "check": what} for passed, what in checks], indent=2))
    for passed, what in () if as_json else checks:
        say(f"{'FAILED' if passed is False else 'ok    ' if passed else '-     '}  {what}")
    if any(passed is False for passed, _ in checks):
        raise typer.Exit(1)
