"""The proof of coverage: on a small model of every structural family, and that the published table is whole."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import coverage
import pytest
import torch
from conftest import need_timm
from families import HELD
from proof.prove import prove
from proof.zoo import Entry, entries
from torch import Tensor, nn
from typer.testing import CliRunner

DOCS = Path(__file__).parents[2] / "docs"


def published() -> list[dict[str, Any]]:
    return json.loads((DOCS / "coverage.json").read_text())


@pytest.mark.parametrize("family", HELD)
@pytest.mark.slow
def test_every_way_to_hold_a_projection(family: str) -> None:
    need_timm(HELD[family])
    (entry,) = entries(HELD[family])
    row = prove(entry)
    assert row["failures"] == [] and row["dead"] == 0 and row["alive"] >= 1
    if row["projections"]:
        assert_published(row)
    assert row["projections"] == (family != "pure convolutional")


def assert_published(row: dict[str, Any]) -> None:
    """What is proven today is what the table says; times and rounding aside."""
    (then,) = (r for r in published() if (r["library"], r["name"]) == (row["library"], row["name"]))
    for key in ("family", "base_parameters", "projections", "weights", "read", "roles", "parameters", "alive", "dead"):
        assert row[key] == then[key], key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/test_vit", "transformers/gptj", "transformers/bert"])
def test_the_published_rows_are_those_of_today(name: str) -> None:
    (entry,) = entries(name)
    assert_published(prove(entry))


class Sly(nn.Module):
    """An MLP that takes a weight in a way that no source shows."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.where = nn.Linear(8, 16), nn.Linear(16, 8), where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "read":
            return self.fc2(nn.functional.linear(x, getattr(self.fc1, "wei" + "ght")))
        return self.fc2(torch.cat([x, x], -1)) if self.where == "unused" else self.fc2(self.fc1(x))


class Fake(Entry):
    def meta(self) -> nn.Module:
        return Sly(self.name).to("meta")

    def real(self) -> tuple[nn.Module, Any]:
        return Sly(self.name), torch.randn(3, 8)


@pytest.mark.parametrize(
    ("where", "wanted"),
    [("called", None), ("read", "fc1: read at test_coverage.py"), ("unused", "fc1: nothing consumes it")],
)
def test_the_proof_finds_what_is_dead(where: str, wanted: str | None) -> None:
    row = prove(Fake("mine", where, "sly"))
    assert bool(row["failures"]) == (wanted is not None), row["failures"]
    if wanted:
        assert wanted in row["failures"][0] and "1 dead: fc1.fc1" in row["failures"]


def test_a_model_that_breaks_is_a_row() -> None:
    row = prove(Entry("timm", "no_such_model", "none"))
    assert len(row["failures"]) == 1 and "no_such_model" in row["failures"][0]


class TestCommand:
    def run(self, *arguments: str) -> Any:
        import typer

        app = typer.Typer()
        app.command()(coverage.main)
        return CliRunner().invoke(app, [*arguments])

    @pytest.mark.slow
    def test_it_goes_on_where_it_stopped_and_survives_a_cut_line(self, tmp_path: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        row = {"library": "transformers", "name": "gptj", "projections": True, "dead": 0, "failures": []}
        rows.write_text(json.dumps(row) + "\n" + json.dumps({**row, "name": "gpt2"})[:40] + "\n")
        result = self.run("--only", "transformers/gpt[2j]", "--rows", str(rows), "--workers", "1")
        assert result.exit_code == 0 and "2 models, 1 of them in" in result.output
        assert "transformers: 2 with projections proven" in result.output
        assert json.loads(rows.read_text().splitlines()[-1])["name"] == "gpt2"

    def test_a_pattern_that_matches_nothing(self, tmp_path: Path) -> None:
        result = self.run("--only", "vit", "--rows", str(tmp_path / "rows"))
        assert result.exit_code == 2 and "no model matches 'vit'" in result.output


class TestPublished:
    @pytest.mark.parametrize("library", coverage.LIBRARIES)
    def test_it_has_a_row_for_every_model_of_the_libraries_that_it_was_written_with(self, library: str) -> None:
        version = importlib.import_module(library).__version__
        if f"{library} {version}" not in (DOCS / "coverage.md").read_text():
            pytest.skip(f"the table was not written with {library} {version}")
        rows = [(r["name"], r["family"]) for r in published() if r["library"] == library]
        assert rows == [(entry.name, entry.family) for entry in entries(f"{library}/*")]

    def test_what_fails_or_is_dead_is_told_and_not_counted_as_proven(self) -> None:
        rows = [r for r in published() if r["name"] in ("gptj", "bert")]
        line = "| transformers | 2 | 2 | {0} | {0} | 0 | 0 | 0 | {1} |"
        assert line.format(2, 0) in coverage.page(rows) and coverage.page(rows).endswith("## What fails\n\nNothing.\n")
        page = coverage.page([rows[0], {**rows[1], "dead": 3, "failures": ["3 dead: fc1"]}])
        assert line.format(1, 3) in page
        assert page.endswith(f"## What fails\n\n- `transformers/{rows[1]['name']}`: 3 dead: fc1\n")

    def test_the_page_is_made_of_the_rows(self) -> None:
        first, second = ((DOCS / "coverage.md").read_text(), coverage.page(published()))
        drop = lambda text: [line for line in text.splitlines() if not line.startswith("Written by")]  # noqa: E731
        assert drop(first) == drop(second)
