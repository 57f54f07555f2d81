"""A disk that is full and a folder that cannot be written: one line and exit code 2, before anything is loaded."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import vit_cifar100
from common.command import cli
from common.data import images
from common.errors import OutputError
from common.training import folder as folders
from common.training.folder import prepare_folder
from recipe_runs import run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """The one line that a recipe says to an output folder, before it looks for its data."""

    def never(*_: object) -> None:
        pytest.fail("the data were read")

    monkeypatch.setattr(images, "_digits", never)

    def call(output: Path) -> str:
        capsys.readouterr()
        assert run(vit_cifar100, ("--data", "digits", "--output", output), monkeypatch) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call


def test_a_folder_inside_of_a_file(asked: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot be written: not a directory" in asked(tmp_path / "file" / "out" / "run")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that nobody can write")
def test_a_folder_that_nobody_can_write(asked: Callable[[Path], str]) -> None:
    assert "/proc/run cannot be written" in asked(Path("/proc/run"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk(
    number: int, asked: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folders.os, "fsync", full)
    assert f"cannot be written: {os.strerror(number).lower()}" in asked(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []  # what was tried is gone


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_noticed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from common.training.folder import prepare_folder\n"
        "try: prepare_folder(Path(sys.argv[1]), False, 'x')\nexcept Exception as e: print(type(e).__name__, e)"
    )

    def small() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], env=environment, preexec_fn=small,
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.startswith("OutputError") and "too large" in done.stdout, done.stdout + done.stderr


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    assert prepare_folder(tmp_path / "new" / "run", False, "x") == tmp_path / "new" / "run"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    assert prepare_folder(tmp_path, False, "x") == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OutputError, match="not a folder"):
        prepare_folder(tmp_path / "file", False, "x")


def test_a_disk_that_is_full_later_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    def fill(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoint.pt.tmp")

    assert cli.main(fill, None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device: checkpoint.pt.tmp" in line
    with pytest.raises(FileNotFoundError):  # a mistake of the code is not hidden
        cli.main(lambda _: Path("/nowhere/at/all").read_text(), None)
