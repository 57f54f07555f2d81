"""`scripts/fuzz.py` runs: a few of its cases, and one that must end it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import fuzz


@pytest.mark.slow
def test_some_cases_are_read_and_some_refused(capsys: pytest.CaptureFixture[str]) -> None:
    fuzz.main(cases=600, start=0, seed=0)
    told = capsys.readouterr().out
    assert "600 cases" in told and all(
        f"{kind}: refused" in told for kind in ("header", "bytes", "description", "tensors")
    )
    assert "tensors: read" in told


def test_an_error_of_another_kind_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("uora_vision.storage.fit.fit", broken)
    with pytest.raises(KeyError):
        fuzz.main(cases=50, start=0, seed=0)
    assert "of seed 0" in capsys.readouterr().out
