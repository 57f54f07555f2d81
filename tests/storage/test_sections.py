"""What the description of a saved adapter may hold besides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import JUNK, places, put
from redrawn import Net, made, out
from torch import Tensor

import uora_vision as uora
from uora_vision.storage import schema
from uora_vision.storage.folder import read_folder, write_folder
from uora_vision.storage.preprocessing import check_labels, check_preprocessing
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
    ("labels", ["cat\n"], {}),
    ("labels", ["c\x1b[31mat"], {}),
    ("labels", ["\u202etac"], {}),
    ("labels", ["cat", " "], {}),
    ("labels", ["\ud800"], {}),
    ("labels", ["c" * 1001], {}),
    ("labels", ["c"] * 100_001, {}),
    ("labels", {"0": "cat"}, {}),
    ("preprocessing", {"task": "Image classification"}, {}),
    ("preprocessing", {"model": "timm/\x00"}, {}),
    ("preprocessing", {"input_size": [3, 224]}, {}),
    ("preprocessing", {"input_size": [3, 0, 224]}, {}),
    ("preprocessing", {"input_size": [3, 2**40, 224]}, {}),
    ("preprocessing", {"std": [0.5, 0.0, 0.5]}, {}),
    ("preprocessing", {"mean": []}, {}),
    ("preprocessing", {"mean": [True, False]}, {}),
    ("preprocessing", {"crop_pct": 0}, {}),
    ("preprocessing", {"crop_pct": "0.9"}, {}),
    ("preprocessing", {"template": "a photo"}, {}),
    ("preprocessing", {"prompts": ["a", ""]}, {}),
    ("preprocessing", {"columns": "text"}, {}),
    ("preprocessing", {"max_length": 2.5}, {}),
    ("preprocessing", {"num_beams": 2**70}, {}),
    ("preprocessing", {"chat_template": "a" * 2**18}, {}),
    ("preprocessing", {"of tomorrow": 1}, {}),
    ("preprocessing", {"tomorrow": {"a": 1}}, {}),
    ("preprocessing", {"tomorrow": "a" * 1001}, {}),
    ("preprocessing", {f"field_{n}": n for n in range(65)}, {}),
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


def test_what_is_saved_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    model = made()
    both = {"labels": ["a", "b"], "preprocessing": {"prompts": ["an a"]}}
    with pytest.raises(uora.FormatError, match="1 prompts do not go with 2 classes"):
        uora.save(model, tmp_path / "a", **both)
    for options, message in (
        ({"labels": "cat"}, "labels: it must be a list"),
        ({"labels": ["cat", "d\rog"]}, r"labels: 'd\\rog' has the control character U\+000D"),
        ({"preprocessing": {"interpolaton": "bicubic"}}, "no field 'interpolaton'; did you mean 'interpolation'"),
        ({"preprocessing": {"crop_pct": 3}}, "preprocessing: crop_pct must be a share"),
    ):
        with pytest.raises(uora.OptionError, match=message):
            uora.save(model, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
    config = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.875, "crop_mode": None}
    uora.save(model, tmp_path / "a", labels=("cat", "a long name, \u00e9t\u00e9", "dog"), preprocessing=config)
    about = read_folder(tmp_path / "a").about
    assert about["labels"][1] == "a long name, \u00e9t\u00e9"
    assert about["preprocessing"] == {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.875}


def test_each_adapter_of_a_model_has_its_own(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        uora.save(made(), tmp_path / name, labels=[name, "others", "none"])
    model = uora.load(uora.load(Net(), tmp_path / "cats", name="cats"), tmp_path / "dogs", name="dogs", activate=False)
    for name in ("dogs", "cats"):
        uora.activate(model, name)
        about = read_folder(uora.save(model, tmp_path / "again")).about
        assert about == {"labels": [name, "others", "none"]}


def test_junk_anywhere_in_what_it_says_of_its_task_is_refused_or_kept_as_it_is() -> None:
    about = {"task": "text-generation", "mean": [0.5, 0.5], "prompts": ["a", "b"], "max_length": 3, "crop_pct": 0.5,
             "template": "a {}", "chat_template": "{{ x }}", "input_size": [3, 8, 8], "tomorrow": ["a", 1]}  # fmt: skip
    refused = 0
    for place in places(about):
        for junk in JUNK:
            value = json.loads(json.dumps(about))
            put(value, place, junk)
            try:
                check_preprocessing(value)
            except uora.FormatError as error:
                refused += 1
                assert len(str(error)) < 250 and str(error).isprintable()
    for junk in JUNK:
        for value in (junk, [junk], ["cat", junk]):
            try:
                check_labels(value)
            except uora.FormatError as error:
                refused += 1
                assert len(str(error)) < 250 and str(error).isprintable()
            else:
                assert isinstance(value, list) and all(isinstance(name, str) and name.strip() for name in value)
    assert refused > 300
