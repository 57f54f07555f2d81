"""Paths that are none, mistyped ones, and texts in foreign files that would take over a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from damage import rewrite
from redrawn import Net, made
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision import export
from uora_vision.__main__ import main
from uora_vision.storage.folder import read_folder, write_folder

HOSTILE = "ev\x1b]0;il\x07\x1b[31m\u202e\r\x00$x_{"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return uora.save(made(), tmp_path / "adapter")


TAKE_A_FOLDER: list[Callable[[Any], object]] = [
    lambda folder: uora.save(made(), folder),
    lambda folder: uora.load(Net(), folder),
    uora.upgrade,
    lambda folder: uora.push_to_hub(folder, "me/cats"),
    lambda folder: export.to_peft_lora(made(train=()), folder),
    lambda folder: export.to_peft_vera(made(train=()), folder),
    lambda folder: export.from_peft_vera(Net(), folder),
]


@pytest.mark.parametrize("call", range(len(TAKE_A_FOLDER)))
def test_what_can_be_no_folder_is_refused(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for bad in ("a\0b", "\ud800/x", "", 3, None, b"runs"):
        with pytest.raises((uora.ConfigError, uora.OptionError), match="folder"):
            TAKE_A_FOLDER[call](bad)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("repository", ["", "cats", "me/a/b", "me/..", "me/c\nats", "me/" + 94 * "x", None])
def test_what_can_be_no_repository_is_refused(repository: Any, saved: Path) -> None:
    with pytest.raises(uora.ConfigError, match="called user/name"):
        uora.push_to_hub(saved, repository)


def test_a_mistyped_path_is_no_repository(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("uora_vision.storage.hub.local_copy", lambda *of: asked.append(of) or saved)
    (tmp_path / "runs").mkdir()
    saved.rename(tmp_path / "runs" / "adapter")
    saved = tmp_path / "runs" / "adapter"
    monkeypatch.chdir(tmp_path)
    model = Net()
    before = snapshot(model)
    for wrong in ("runs/adaptr", Path("runs/adaptr"), str(tmp_path / "runs" / "adaptr")):
        with pytest.raises(uora.FormatError, match=r"did you mean .*runs/adapter"):
            uora.load(model, wrong)
    assert_same(before, model)
    assert not asked
    uora.load(Net(), "runs/adaptr", revision="main")
    uora.load(Net(), "someone/adaptr")
    assert asked == [("runs/adaptr", "main"), ("someone/adaptr", None)]


def test_a_mistyped_path_at_the_command_line(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong in ("adaptr", "./adaptr", str(tmp_path / "adaptr")):
        assert main(["inspect", wrong]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "did you mean" in error and "adapter?" in error


def _hostile(saved: Path) -> Path:
    stored = read_folder(saved)
    identity = replace(stored.identity, name=HOSTILE, class_name=HOSTILE)
    return write_folder(replace(stored, identity=identity, versions={HOSTILE: HOSTILE}), saved)


@pytest.mark.slow
def test_texts_of_a_foreign_file_do_not_reach_the_terminal(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(_hostile(saved))
    assert main(["inspect", folder, "--png", str(tmp_path / "picture.png")]) == 0
    assert main(["inspect", folder, "--json"]) == 0
    assert main(["verify", folder]) == 0
    assert main(["inspect", str(tmp_path / HOSTILE.replace("\0", ""))]) == 2
    shown = "".join(capsys.readouterr())
    assert not [c for c in shown if not c.isprintable() and c != "\n"] and "\\x1b" in shown
    (saved / "adapter_config.json").unlink()
    rewrite(saved, lambda config: config["projections"][0].update(path=HOSTILE + "x" * 2**20, **{"in": 11}))
    with pytest.raises(uora.FormatError) as caught:
        uora.load(Net(), saved)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 5000 and "\\x1b" in str(caught.value)


def test_a_terminal_that_knows_ascii_alone(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["inspect", str(saved)]) == 0
    sys.stdout.flush()
    assert b"mean of" in written.getvalue() and b"\\u2588" in written.getvalue()


def test_half_a_character_is_no_text(saved: Path) -> None:
    (saved / "adapter_config.json").unlink()
    rewrite(saved, lambda config: config["base"].update(name="caf\u00e9 \U0001f600"))
    assert read_folder(saved).identity.name == "caf\u00e9 \U0001f600"
    rewrite(saved, lambda config: config["base"].update(name="half \ud800"))
    with pytest.raises(uora.FormatError, match="surrogates not allowed"):
        read_folder(saved)


def test_pictures_of_no_known_kind(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(saved), "--png", str(tmp_path / "picture.safetensors")]) == 2
    assert capsys.readouterr().err.startswith("error: no picture can be written to")
