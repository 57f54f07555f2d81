"""Tables on a terminal of 80 columns: no word and no number is cut."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from common.command.choices import Method
from common.command.display import Display
from common.command.options import Defaults
from common.report.results import COMPARED, compare
from rich.console import Console

from uora_vision.cli.saying import say
from uora_vision.tables import render


@dataclass
class Options:
    method: Any = None
    rank: Any = None
    lr: Any = None
    head_lr: Any = None
    output: Any = None


def test_the_comparison_of_methods(tmp_path: Path) -> None:
    metrics = {
        "accuracy": 1.0, "other_accuracy": 0.5, "trained_parameters": 85_900_001, "firings": 12_345,
        "trained_parameters_without_head": 999_999, "adapter_bytes": 999_000_000, "seconds_per_step": 0.999,
    }  # fmt: skip
    said = io.StringIO()
    rows = {method: Defaults(8, 0.1, 0.1) for method in Method}
    compare(lambda *_, **__: metrics, Options(), rows, tmp_path, Display(Console(width=80, file=said)))
    told = said.getvalue()
    table = told[told.rindex("uora: ") :]
    for word in (*Method, *" ".join(("method accuracy other classes", *COMPARED.values())).split(), "85.9M", "999,999",
                 "999 MB", "999 ms", "12,345", "100.0%"):  # fmt: skip
        assert f" {word} " in table, word
    assert max(map(len, table.splitlines()[1:-1])) <= 80


def test_a_table_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    reason = "part of what a head is made of, and so it trains wholly; targets='conv' adapts it all the same"
    rows = [("a.long.path.of.a.module", 12, reason), ("b", 1, "not asked for")]
    wide = render("A title", ("path", "count", "reason"), rows)
    assert reason in wide
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    narrow = render("A title", ("path", "count", "reason"), rows)
    assert max(map(len, narrow.splitlines())) <= 80
    assert sorted(narrow.replace("─", "").split()) == sorted(wide.replace("─", "").split())
    say(narrow)
    assert capsys.readouterr().out == narrow + "\n"  # no code of the terminal, which would be shown as letters
    monkeypatch.setenv("COLUMNS", "20")  # where it cannot fit, the terminal wraps whole lines
    assert set(wide.replace("─", "").split()) == set(
        render("A title", ("path", "count", "reason"), rows).replace("─", "").split()
    )
