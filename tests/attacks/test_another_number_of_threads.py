"""Adapters that are saved with one number of threads and loaded with another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from redrawn import Net, made, out, redraw, same

import uora_vision as uora
from uora_vision.maths.draws import initial_rows
from uora_vision.storage.folder import read_folder


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_draws_do_not_depend_on_threads_or_the_default_device_or_type(threads: int, tmp_path: Path) -> None:
    config = uora.UoraConfig(rank=96, seed=5)
    want, before = initial_rows(config, "A300", 300), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(initial_rows(config, "A300", 300), want) and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    model = redraw(redraw(made()), "layer")
    with torch.device("meta"):
        uora.save(model, tmp_path)
        stored = read_folder(tmp_path)
    base = Net()
    torch.set_default_dtype(torch.float64)
    try:
        uora.save(model, tmp_path / "all", save_banks="all")
        with torch.device("meta"):
            uora.load(base, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(base, model) and same(uora.load(Net(), tmp_path / "all"), model) and stored.log


def test_a_file_whose_matrices_were_drawn_in_other_threads_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uora_vision.maths import bank
    from uora_vision.storage import save_load

    def drawn(config: uora.UoraConfig, name: str, width: int, threads: int = 1) -> torch.Tensor:
        rows = initial_rows(config, name, width)
        return rows if threads == 1 else rows * (1 + threads * 1e-6)

    uora.save(redraw(made(seed=3)), tmp_path / "one")
    monkeypatch.setattr(save_load, "initial_rows", drawn)
    monkeypatch.setattr(bank, "initial_rows", lambda *a: drawn(*a, threads=4))
    model = redraw(made(seed=3))
    uora.save(model, tmp_path / "four")
    monkeypatch.setattr(bank, "initial_rows", drawn)
    again = uora.load(Net(), tmp_path / "four")
    assert torch.equal(again.uora.A12, model.uora.A12) and torch.equal(out(again), out(model))
    uora.load(Net(), tmp_path / "one")
    monkeypatch.setattr(save_load, "OTHER_THREADS", (2,))
    with pytest.raises(uora.FormatError, match="come out other"):
        uora.load(Net(), tmp_path / "four")
