"""What the description of a saved adapter may hold besides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from redrawn import Net, made, out
from torch import Tensor

import uora_vision as uora
from uora_vision.storage import schema
from uora_vision.storage.folder import read_folder, write_folder
from uora_vision.storage.sections import SECTIONS
from uora_vision.storage.stored import Section

HERE = {"A12:0": [0, 2], "A24:0": [1]}
ROWS = {"values": torch.ones(4 * 36, dtype=torch.int8), "exponents": torch.full((8,), -7, dtype=torch.int8)}
GOOD: dict[str, Section] = {
    "rows": Section(HERE, ROWS),
    "roundings": Section(["A12"], {"A12": torch.tensor([[0, 1], [47, -1]], dtype=torch.int32)}),
    "labels": Section(["cat", "dog", "cat"]),
    "preprocessing": Section({"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.9, "mode": None}),
}


@pytest.fixture
def plain(tmp_path: Path) -> Any:
    return read_folder(uora.save(made(), tmp_path / "plain"))


@pytest.mark.parametrize("name", GOOD)
def test_a_section_comes_back_and_one_that_computes_is_not_passed_over(name: str, plain: Any, tmp_path: Path) -> None:
    assert GOOD.keys() == SECTIONS.keys()
    again = read_folder(write_folder(replace(plain, bank_fingerprint=None, sections={name: GOOD[name]}), tmp_path))
    assert again.sections.keys() == {name} and again.sections[name].value == GOOD[name].value
    assert again.sections[name].tensors.keys() == GOOD[name].tensors.keys()
    assert all(torch.equal(t, GOOD[name].tensors[key]) for key, t in again.sections[name].tensors.items())
    if name == "roundings":
        with pytest.raises(uora.FormatError, match=f"has {name}, with which this version does not compute"):
            uora.load(Net(), tmp_path)
    else:
        assert torch.equal(out(uora.load(Net(), tmp_path)), out(made())) == (name != "rows")


FLOATS = torch.rand(4 * 36)

BAD: list[tuple[str, Any, dict[str, Tensor]]] = [
    ("rows", ["A12:0"], ROWS),
    ("rows", {}, {}),
    ("rows", {"A12:0": 0}, ROWS),
    ("rows", {"A12:0": []}, ROWS),
    ("rows", {"A12:0": [99]}, ROWS),
    ("rows", {"A12:0": [0, 0]}, ROWS),
    ("rows", {"A12:0": [0], "A12:1": [0]}, ROWS),
    ("rows", {"A12:0": [0, 1]}, ROWS),
    ("rows", {"A24:0": [0]}, ROWS),
    ("rows", {"A12": [0]}, ROWS),
    ("rows", HERE, {}),
    ("rows", HERE, ROWS | {"more": torch.ones(1)}),
    ("rows", HERE, {"values": ROWS["values"]}),
    ("rows", HERE, {"values": FLOATS, "exponents": ROWS["exponents"]}),
    ("rows", HERE, ROWS | {"exponents": ROWS["exponents"][1:]}),
    ("rows", HERE, ROWS | {"exponents": ROWS["exponents"].float()}),
    ("rows", HERE, ROWS | {"exponents": torch.full((8,), 127, dtype=torch.int8), "values": ROWS["values"] * 100}),
    ("rows", HERE, {"values": FLOATS[1:]}),
    ("rows", HERE, {"values": FLOATS.double()}),
    ("rows", HERE, {"values": FLOATS * float("nan")}),
    ("roundings", ["A12"], {"A12": torch.tensor([[48, 1]], dtype=torch.int32)}),
    ("roundings", ["A12"], {"A12": torch.tensor([[2, 1], [2, 1]], dtype=torch.int32)}),
    ("roundings", ["A12"], {"A12": torch.tensor([[2, 1]])}),
    ("roundings", ["A13"], {}),
    ("labels", [], {}),
    ("labels", ["cat", 3], {}),
    ("labels", ["cat"], {"x": torch.ones(1)}),
    ("preprocessing", ["bicubic"], {}),
    ("preprocessing", {"mean": [[0.5]]}, {}),
    ("preprocessing", {"mean": float("nan")}, {}),
]


@pytest.mark.parametrize(("name", "value", "tensors"), BAD)
def test_a_section_that_is_none_is_refused(name: str, value: Any, tensors: dict[str, Tensor], plain: Any) -> None:
    config, rest = schema.to_config(plain), schema.to_tensors(plain)
    with pytest.raises(uora.FormatError, match=f"^{name}: "):
        schema.from_config(config | {name: value}, rest | {f"{name}/{key}": t for key, t in tensors.items()})


def test_tensors_without_their_section_and_sections_of_earlier_versions_are_refused(plain: Any) -> None:
    config, tensors = schema.to_config(plain), schema.to_tensors(plain)
    with pytest.raises(uora.FormatError, match="without the section 'rows'"):
        schema.from_config(config, tensors | {"rows/values": FLOATS})
    old = {k: v for k, v in config.items() if k != "trained"} | {"format_version": 3}
    assert schema.from_config(old, tensors).sections == {}
    with pytest.raises(uora.FormatError, match="unknown 'labels'"):
        schema.from_config(old | {"labels": ["cat"]}, tensors)
