"""`uora runs`: a table, JSON, and a page that lays curves over one another."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from uora_vision.cli.app import main


def write_run(folder: Path, accuracy: float | None, loss: float, **options: Any) -> None:
    folder.mkdir(parents=True)
    ends = {"test_loss": loss} if accuracy is None else {"test_accuracy": accuracy, "test_loss": loss}
    rows = [{"epoch": n, "train_loss": loss + n, **ends} for n in (1, 2)]
    metrics = {
        "loss": loss,
        "trained_parameters_without_head": 1920,
        "seconds": 12.5,
        "config": {"lr": 0.05, **options},
    }
    metrics |= {} if accuracy is None else {"accuracy": accuracy}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "history.json").write_text(json.dumps(rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "runs"
    write_run(found / "a", 0.5, 1.5, method="uora", seed=1, output="x")
    write_run(found / "deep" / "b", 0.75, 0.5, method="lora", seed=1, output="y")
    write_run(found / "text", None, 0.25, method="uora", seed=2)
    (found / "going").mkdir()
    (found / "going" / "checkpoint.pt").touch()
    (found / "cut").mkdir()
    (found / "cut" / "metrics.json").write_text('{"accuracy": 0.')
    return found


def names(text: str) -> list[str]:
    return re.findall(r"^  (a|deep/b|text) ", text, re.M)


def test_the_best_by_a_measure_comes_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, order in (
        ([], ["deep/b", "a", "text"]),  # by accuracy; what has none comes last
        (["--sort", "loss"], ["text", "deep/b", "a"]),
        (["--sort", "seed"], ["a", "deep/b", "text"]),
    ):
        assert main(["runs", str(folder), *words]) == 0
        out, said = capsys.readouterr()
        assert names(out) == order
        assert "1 not finished: going" in out and "cut/metrics.json is left out" in said
        assert "75.0%" in out and max(map(len, out.splitlines())) <= 80


def test_json_holds_all_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in found] == ["deep/b", "a", "text"]
    assert found[0]["config"]["method"] == "lora" and found[0]["history"][1]["train_loss"] == 2.5
    assert main(["runs", str(folder / "a"), "--json"]) == 0  # the folder of a run itself
    assert [run["run"] for run in json.loads(capsys.readouterr().out)] == ["a"]


@pytest.mark.slow
def test_a_page_needs_nothing_else_and_names_what_differs(folder: Path, tmp_path: Path) -> None:
    hostile = "</td><script>alert(1)</script>"
    write_run(folder / "odd", 0.1, 9.0, method=hostile)
    for n in range(9):
        write_run(folder / f"more{n}", 0.2, 2.0, method="uora")
    assert main(["runs", str(folder), "--html", str(tmp_path / "runs.html")]) == 0
    page = (tmp_path / "runs.html").read_text()
    assert "<script" not in page and hostile in unescape(page)
    assert "://" not in re.sub(r'"data:image/[^"]*"', "", page)
    pictures = re.findall(r'alt="([^"]*)"', page)
    assert [told.split(" over")[0] for told in pictures] == ["Accuracy", "Loss", "Loss, training"]
    assert "of 12 runs: deep/b, a, " in pictures[0] and "of 13 runs" in pictures[1]
    assert page.index("deep/b") < page.index(">a<") < page.index(">text<")
    heads = re.findall(r"<th[^>]*>([^<]*)</th>", page[page.index('id="options"') :])
    assert heads == ["Run", "method", "seed"]  # not the output folder, and not what is the same
    assert "The first 10 runs of the table have a colour" in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["none"], "none is no folder"),
        (["empty"], "has no finished run: none of its folders has a metrics.json. 1 are not finished, such as x."),
        (["runs", "--sort", "f1"], "no run has a number called 'f1'; there are accuracy, loss, lr, seconds, seed"),
    ],
)
def test_what_is_wrong_is_told(
    words: list[str], told: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "empty" / "x" / "checkpoints").mkdir(parents=True)
    assert main(["runs", *words]) == 2
    assert told in capsys.readouterr().err
