"""Files that are well signed and are no files, too large, too great or more than they declare."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from redrawn import Net, made

import uora_vision as uora
from uora_vision.storage import schema
from uora_vision.storage.fit import fit
from uora_vision.storage.folder import read_folder, write_folder


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder"])
def test_only_regular_files_are_read(name: str, kind: str, tmp_path: Path) -> None:
    uora.save(made(), tmp_path)
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(uora.FormatError, match=r"no regular file|cannot be read"):
        uora.load(Net(), tmp_path)


def test_a_valid_file_that_is_too_large_for_the_model_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uora.save(made(), tmp_path)
    stored, rank = read_folder(tmp_path), 200_000
    length = sum(p.length(rank) for p in stored.projections)
    write_folder(replace(stored, config=stored.config.replace(rank=rank), vector=torch.zeros(length)), tmp_path)
    monkeypatch.setattr("uora_vision.storage.save_load.bank_for", lambda *_: pytest.fail("drawn"))
    with pytest.raises(uora.FormatError, match="not for this model"):
        uora.load(Net(), tmp_path)
    p = stored.projections[0]
    many = tuple(replace(p, path=f"p{i}", origin=f"p{i}") for i in range(50))
    write_folder(replace(stored, projections=many, vector=torch.zeros(50 * p.length(4))), tmp_path)
    with pytest.raises(uora.FormatError, match="50 weights; this model has"):
        uora.load(Net(), tmp_path)


def test_values_that_overflow_the_type_they_are_loaded_into_are_refused(tmp_path: Path) -> None:
    uora.save(made(), tmp_path)
    stored = read_folder(tmp_path)
    write_folder(replace(stored, vector=stored.vector.double() * 1e39), tmp_path)
    with pytest.raises(uora.FormatError, match=r"too large for torch.float32"):
        uora.load(Net(), tmp_path)
    write_folder(replace(stored, parts=stored.parts | {"head.bias": torch.full((3,), 1e6)}), tmp_path)
    model = Net()
    model.head.half()
    with pytest.raises(uora.FormatError, match=r"head.bias holds 1e\+06.* torch.float16"):
        uora.load(model, tmp_path)
    assert not hasattr(model, "uora")


@pytest.mark.parametrize("name", ["blocks.0.0.weight", "norm.weight", "blocks.1.2.bias"])
def test_a_signed_file_changes_only_what_it_declares(name: str, tmp_path: Path) -> None:
    stored = read_folder(uora.save(made(), tmp_path))
    config, tensors = schema.to_config(stored), schema.to_tensors(stored)
    with pytest.raises(uora.FormatError, match="declares as trained"):
        schema.from_config(config, tensors | {f"base/{name}": Net().get_parameter(name) + 1})
    with pytest.raises(uora.FormatError, match="declares as trained"):
        schema.from_config(config, {n: t for n, t in tensors.items() if n != "base/head.bias"})
    old = {k: v for k, v in config.items() if k != "trained"} | {"format_version": 3}
    assert schema.from_config(old, tensors).trained is None
    if name == "blocks.0.0.weight":
        older = schema.from_config(old, tensors | {f"base/{name}": Net().get_parameter(name) + 1})
        with pytest.raises(uora.FormatError, match="does not say"):
            fit(older, uora.Base(Net()))
