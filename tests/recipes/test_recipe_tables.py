"""Tables as people have them: a byte order mark, empty rows, labels in words, and a header, alike in every form and in
every recipe that reads texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_nlg
import glue
import numpy as np
import pandas as pd
import pytest
from common.data.labels import as_classes, as_values
from common.data.tables import load_table, read_table
from common.errors import DataError
from common.language.dialogues import read_dialogues
from common.vision_language.pairs import load_pairs
from PIL import Image

Row = dict[str, Any]
ROWS: list[Row] = [
    {"sentence": "fine", "label": "yes"},
    {"sentence": "007", "label": "no"},
    {"sentence": "né 大", "label": "yes"},
]
GAP: Row = {}


def separated(mark: str, rows: list[Row], names: list[str]) -> str:
    return "\n".join([mark.join(names), *(mark.join(str(row.get(name, "")) for name in names) for row in rows)]) + "\n"


FORMS: dict[str, Callable[[list[Row], list[str]], str]] = {
    "csv": lambda rows, names: separated(",", rows, names),
    "tsv": lambda rows, names: separated("\t", rows, names),
    "json": lambda rows, names: json.dumps(rows),
    "jsonl": lambda rows, names: "\n".join(json.dumps(row) if row else "" for row in rows) + "\n",
}


def write(path: Path, rows: list[Row], encoding: str = "utf-8-sig", names: list[str] | None = None) -> Path:
    text = FORMS[path.suffix[1:]](rows, names or list(rows[0]))
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("form", [*FORMS, "parquet"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_form_gives_the_same_rows(form: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"train.{form}"
    rows = [ROWS[0], GAP, *ROWS[1:], GAP]
    if form == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        write(path, rows, encoding, list(ROWS[0]))
    assert list(read_table(path)) == ROWS


def test_rows_of_blanks_are_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sentence,label\n , \nfine,yes\n\n   \n")
    (tmp_path / "a.json").write_text('[{"sentence": " ", "label": null}, null, {"sentence": "fine", "label": "yes"}]')
    assert [list(read_table(tmp_path / f"a.{form}")) for form in ("csv", "json")] == [ROWS[:1]] * 2
    (tmp_path / "b.csv").write_text("sentence,label\n , \n")
    with pytest.raises(DataError, match="has no rows"):
        read_table(tmp_path / "b.csv")


@pytest.mark.parametrize("mark", [",", "\t"])
def test_a_header_is_no_row(mark: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.csv" if mark == "," else "x.tsv")
    bare = separated(mark, ROWS, ["sentence", "label"]).split("\n", 1)
    for text in (bare[1], "\n".join(bare), f"\ufeff{bare[1]}", "\ufeff" + "\n".join(bare)):
        path.write_text(text, encoding="utf-8")
        assert list(read_table(path, ("sentence", "label"))) == ROWS
    path.write_text(f" sentence {mark} label \n" + bare[1], encoding="utf-8")
    assert list(read_table(path)) == ROWS


def test_values_of_mixed_kinds_are_texts(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"data": [1, "x", null, true], "more": ["007", 2.5, "a", "b"]}')
    assert read_table(tmp_path / "x.json")["data"][:] == ["1", "x", None, "True"]
    (tmp_path / "y.json").write_text('[{"a": 1, "date": "2020-01-01"}, {"a": "x", "late": "007"}]')
    assert list(read_table(tmp_path / "y.json")) == [
        {"a": "1", "date": "2020-01-01", "late": None}, {"a": "x", "date": None, "late": "007"},
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["[1, 2]", '"x"', "{", '[{"a": "\\ud800"}]', "[" * 5000, '[{"a": 1}, {"a": [1]}]'])
def test_what_is_no_table_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path / "x.json")


def test_hidden_files_are_no_split(tmp_path: Path) -> None:
    (tmp_path / "._train.csv").write_bytes(b"Mac OS X")
    (tmp_path / ".train.csv").write_bytes(b"")
    write(tmp_path / "train.csv", ROWS)
    assert list(load_table(str(tmp_path), "train")) == ROWS


class TestLabels:
    def test_words_are_numbered_alike_in_both_splits(self) -> None:
        train, test, names = as_classes(["yes", "no", "maybe", "yes"], ["no", "yes"], "x")
        assert (train, test, names) == ([2, 1, 0, 2], [1, 2], ("maybe", "no", "yes"))
        known = ("entailment", "neutral", "contradiction")
        assert as_classes(["neutral", "contradiction"], ["neutral"], "x", known) == ([1, 2], [1], known)

    @pytest.mark.parametrize("labels", [[0, 2, 2], ["0", "2", "2"], [0.0, 2.0, 2.0], ["0.0", " 2", "2"]])
    def test_numbers_stay_what_they_are(self, labels: list[Any]) -> None:
        assert as_classes(labels, labels[:1], "x") == ([0, 2, 2], [0], ("0", "1", "2"))

    @pytest.mark.parametrize(
        ("train", "test", "words"),
        [
            ([1, 1], [1], "all 2 training examples of x have the label 1"),
            (["a", "a"], ["a"], "have the label a"),
            ([0, 1], [2], "test labels that no training example has: 2"),
            (["a", "b"], ["c"], "test labels that no training example has: c"),
            ([0, -1], [0], "whole numbers from 0, or words; there is '-1'"),
            ([0, 1.5], [0], "there is '1.5'"),
            (["0", "one"], ["0"], "'one' and '0'"),
            ([0, None], [0], "training example 2 of x has no label"),
            ([0, 1], [0, float("nan")], "test example 2 of x has no label"),
        ],
    )  # fmt: skip
    def test_what_is_no_class_is_told(self, train: list[Any], test: list[Any], words: str) -> None:
        with pytest.raises(DataError, match=words):
            as_classes(train, test, "x")

    def test_values_are_numbers(self) -> None:
        assert as_values(["1.5", 2, " 3 "], "x") == [1.5, 2.0, 3.0]
        for bad in ("high", "", None, "nan", "inf"):
            with pytest.raises(DataError, match="example 2 of x has the label"):
                as_values([1, bad], "x")


class TestRecipes:
    """What a recipe makes of the same table in every form, with a mark, gaps, and a header or names for it."""

    @pytest.mark.parametrize("form", FORMS)
    def test_glue(self, form: str, tmp_path: Path) -> None:
        rows = [{"sentence": "fine", "label": "positive"}, GAP, {"sentence": "42", "label": "negative"}]
        for split in ("train", "dev"):
            write(tmp_path / f"{split}.{form}", rows)
        options = glue.Options(data=str(tmp_path), columns="sentence,label" if form in ("csv", "tsv") else None)
        train, test = (glue.load_examples(options, split) for split in ("train", "validation"))
        train, test, names = glue.with_labels(train, test, options)
        assert (train["sentence"][:], train["label"][:], names) == (["fine", "42"], [1, 0], ("negative", "positive"))
        options = glue.Options(data=str(tmp_path), task=glue.Task.stsb)
        with pytest.raises(DataError, match="no column 'sentence1', 'sentence2'"):
            glue.load_examples(options, "train")

    @pytest.mark.parametrize("form", FORMS)
    def test_e2e(self, form: str, tmp_path: Path) -> None:
        if form == "csv":
            text = '\ufeffmr,ref\n"name[X], food[Y]",X has Y.\n,\n\nname[7],7\n'
            (tmp_path / "trainset.csv").write_text(text, encoding="utf-8")
        else:
            rows = [{"mr": "name[X], food[Y]", "ref": "X has Y."}, GAP, {"mr": "name[7]", "ref": 7}]
            write(tmp_path / f"trainset.{form}", rows)
        for names in ((), ("mr", "ref")) if form in ("csv", "tsv") else ((),):
            found = e2e_nlg.load_pairs(str(tmp_path), e2e_nlg.Split.train, names)
            assert found == [("name : X | food : Y", "X has Y."), ("name : 7", "7")]

    @pytest.mark.parametrize("form", FORMS)
    def test_instructions(self, form: str, tmp_path: Path) -> None:
        whole = {"instruction": "say", "input": "a", "output": "b"}
        rows = [{"instruction": "2 + 2 ?", "input": "", "output": 4}, GAP, whole]
        table = load_table(str(write(tmp_path / f"x.{form}", rows)), "train")
        said, left_out = read_dialogues(table, "x")
        assert [turns[-1]["content"] for turns in said] == ["4", "b"] and left_out == 0
        assert said[1][0]["content"] == "say\n\na"

    @pytest.mark.parametrize("form", ["csv", "jsonl"])
    def test_chats(self, form: str, tmp_path: Path) -> None:
        turns = [{"role": "user", "content": "2 + 2 ?"}, {"role": "assistant", "content": 4}]
        frame = pd.DataFrame({"messages": [json.dumps(turns), None] if form == "csv" else [turns, None], "id": [1, 2]})
        path = tmp_path / f"x.{form}"
        frame.to_csv(path, index=False, encoding="utf-8-sig") if form == "csv" else frame.to_json(
            path, orient="records", lines=True
        )
        said, left_out = read_dialogues(load_table(str(path), "train"), "x")
        assert (said[0][-1]["content"], len(said), left_out) == ("4", 1, 1)

    @pytest.mark.parametrize("form", FORMS)
    def test_pairs(self, form: str, tmp_path: Path) -> None:
        for name in ("a", "b"):
            noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / f"{name}.png")
        (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
        rows = [
            {"image": "a.png", "text": "one"},
            GAP,
            {"image": "b.png", "text": 2},
            {"image": "cut.png", "text": "x"},
        ]
        path = write(tmp_path / f"pairs.{form}", rows)
        for names in ((), ("image", "text")) if form in ("csv", "tsv") else ((),):
            train, test, _ = load_pairs(str(path), ("image", "text"), 0.5, 0, names=names)
            assert sorted([*train.texts, *test.texts]) == ["2", "one"]
            assert len(train.left_out) == 1 and "pair 3: cannot read" in train.left_out[0]
        with pytest.raises(DataError, match="1 of 3 pairs"):
            load_pairs(str(path), ("image", "text"), 0.5, 0, strict=True)
