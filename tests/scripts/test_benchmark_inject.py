"""The benchmark of injecting and redrawing: its memory count, its firings, and what it writes."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import typer

pytest.importorskip("timm")

from benchmarks import inject as command
from measure import inject as bench


@pytest.mark.slow
def test_a_run_writes_a_table_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main("ViT-B/16", 16, "", "bf16", "test_vit", 2, 2, tmp_path)
    result = json.loads((tmp_path / "benchmark.json").read_text())
    (row,) = result["injection"]
    assert row["parameters"] == 86_567_656 and row["weights"] == 48 and len(row["seconds"]) == 2
    firing = [f"{scope}, {n} firing" for scope in ("shared", "layer") for n in (0, 1, 16)]
    assert list(result["reinitialisation"]) == ["training step", *firing]
    assert {len(times) for times in result["reinitialisation"].values()} == {2}
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "inject ViT-B/16, 87M parameters, 48 weights" in table and "reinitialisation, layer, 16 firing" in table


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells how much is resident")
def test_resident_memory_counts_what_was_written() -> None:
    before = bench.resident("VmRSS")
    with mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as fresh:  # no memory that was freed before
        for page in range(0, len(fresh), mmap.PAGESIZE):
            fresh[page] = 1
        assert 60 << 20 < bench.resident("VmRSS") - before < 80 << 20


def test_an_unknown_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="Llama 70B"):
        command.main("Llama 70B", 16, "", "bf16", "test_vit", 2, 1, tmp_path)
