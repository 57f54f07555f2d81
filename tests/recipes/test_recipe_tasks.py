"""Several labels, numbers and ordered classes of images, from a table: reading it, losses, scores, and whole runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import imagenet_subset
import numpy as np
import pandas as pd
import pytest
import torch
import vit_cifar100
from common.command import cli
from common.data.labelled import load_labelled
from common.errors import DataError, RecipeError
from drawn_images import draw, write
from recipe_runs import run, trained
from tiny_vit import save_tiny_vit

import uora_vision as uora
from uora_vision.__main__ import main

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    folder = tmp_path_factory.mktemp("drawn")
    return folder, draw(folder, 45)


def read(path: Path, *words: object) -> Any:
    """What the recipe learns from."""
    return load_labelled(cli.read(vit_cifar100.Options, ["--data", str(path), *map(str, words)]))


class TestTables:
    def test_each_task_finds_its_targets(self, drawn: tuple[Path, Rows]) -> None:
        folder, rows = drawn
        table = write(folder / "all.csv", rows)
        train = [row for row in rows if row["split"] == "train"]
        found = read(table)
        assert (found.train.names, len(found.train), len(found.test)) == (("high", "low", "mid"), 30, 15)
        assert [found.train.names[y] for y in found.train.labels] == [row["label"] for row in train]
        found = read(table, "--task", "ordinal", "--target-columns", "stars")
        assert found.train.names == ("1", "2", "3")
        assert found.train.labels.tolist() == [row["stars"] - 1 for row in train]
        found = read(table, "--task", "ordinal", "--target-columns", "stars", "--classes", "2-3")  # by their names
        assert found.train.names == ("2", "3")
        found = read(table, "--task", "ordinal", "--classes", "low,mid,high")
        assert found.train.labels.tolist() == [row["stars"] - 1 for row in train]
        one = read(table, "--task", "multilabel", "--target-columns", "tags")
        assert one.train.names == ("green", "plain", "red")
        two = read(table, "--task", "multilabel", "--target-columns", "green,red")
        assert two.train.labels.tolist() == [[row["green"], row["red"]] for row in train]
        assert one.train.labels[:, [0, 2]].tolist() == two.train.labels.tolist()
        found = read(table, "--task", "regression", "--target-columns", "light,gram")
        values = np.array([[row["light"], row["gram"]] for row in train])
        np.testing.assert_allclose(found.scale, [values.mean(0), values.std(0)])
        np.testing.assert_allclose(found.train.labels * values.std(0) + values.mean(0), values)
        assert abs(found.test.labels.mean()) > 1e-6  # by the numbers of the training images

    def test_other_forms_of_a_table_say_the_same(self, drawn: tuple[Path, Rows]) -> None:
        folder, rows = drawn
        words = ("--task", "multilabel", "--target-columns", "tags")
        wanted = read(write(folder / "csv.csv", rows), *words)
        for change, more in (
            (lambda tags: tags.split(";"), ()), (lambda tags: tags.replace(";", "|"), ()),
            (lambda tags: tags.replace(";", " ; "), ()), (lambda tags: tags.replace(";", "~"), ("--separator", "~")),
        ):  # fmt: skip
            frame = pd.DataFrame(rows).assign(tags=[change(row["tags"]) for row in rows])
            frame.to_parquet(folder / "other.parquet")
            found = read(folder / "other.parquet", *words, *more)
            assert found.train.names == wanted.train.names
            assert found.train.labels.tolist() == wanted.train.labels.tolist()
        renamed = [{"Image": row["path"], "Labels": row["tags"], "part": row["split"]} for row in rows]
        found = read(write(folder / "renamed.csv", renamed), "--task", "multilabel", "--split-column", "part")
        assert found.digest == wanted.digest
        flags = [{key: row[key] for key in ("path", "red", "green", "split")} for row in rows]
        found = read(write(folder / "flags.csv", flags), "--task", "multilabel")
        assert found.train.names == ("red", "green")

    @pytest.mark.slow
    def test_without_a_column_of_splits_a_part_is_held_out_by_the_seed(self, drawn: tuple[Path, Rows]) -> None:
        folder, rows = drawn
        first = int(np.random.default_rng(0).permutation(45)[0])  # would be held out
        rows = [{**row, "tags": "rare" if number == first else row["tags"]} for number, row in enumerate(rows)]
        table = write(folder / "whole.csv", [{k: v for k, v in row.items() if k != "split"} for row in rows])
        for words in (
            ("--task", "multilabel", "--target-columns", "tags"), ("--task", "regression", "--target-columns", "light"),
            (), ("--validation", 0.4),
        ):  # fmt: skip
            found = read(table, *words)
            assert found.held_out and (len(found.test) == (18 if "--validation" in words else 9))
            assert not {*found.train.items} & {*found.test.items}
            assert found.digest == read(table, *words).digest != read(table, *words, "--seed", 1).digest
            assert "has no column of splits" in found.notes[0]
            if "tags" in words:  # the only image of a label is there to train on
                assert folder / "img" / f"{first}.png" in found.train.items

    def test_what_is_left_out_is_told(self, drawn: tuple[Path, Rows]) -> None:
        folder, rows = drawn
        (folder / "img" / "bad.png").write_bytes(b"no image")
        more = [{**rows[0], "path": "img/bad.png"}, {**rows[1], "path": "./img/44.png", "split": "val"}]
        table = write(folder / "more.csv", [*rows[:-1], *more])
        words = ("--task", "regression", "--target-columns", "light")
        found = read(table, *words)
        assert (len(found.train), len(found.test), found.unreadable) == (30, 14, 1)
        assert "1 images of the split 'val'" in found.notes[0] and "bad.png" in found.notes[1]
        with pytest.raises(DataError, match=r"bad\.png.*Remove or replace"):
            read(table, *words, "--strict")
        found = read(table, "--task", "ordinal", "--classes", "low,high")
        assert any("images of" in note and "other classes" in note for note in found.notes)
        assert found.train.names == ("low", "high")


def set_all(name: str, value: object) -> Callable[[Rows], Rows]:
    return lambda rows: [{**row, name: value} for row in rows]


def set_one(name: str, value: object, place: int = 4) -> Callable[[Rows], Rows]:
    return lambda rows: [{**row, name: value} if at == place else row for at, row in enumerate(rows)]


def only(*names: str) -> Callable[[Rows], Rows]:
    return lambda rows: [{name: row[name] for name in names} for row in rows]


SAME: Callable[[Rows], Rows] = list
ORDINAL, LABELS, NUMBERS = (
    ("--task", task, "--target-columns", column)
    for task, column in (("ordinal", "stars"), ("multilabel", "tags"), ("regression", "light"))
)
BAD: list[tuple[Callable[[Rows], Rows], tuple[str, ...], str]] = [
    (SAME, ("--target-columns", "lable"), "has no column 'lable'; did you mean 'label'?"),
    (SAME, ("--path-column", "pth"), "has no column 'pth'; did you mean 'path'?"),
    (SAME, ("--split-column", "fold"), "has no column 'fold'; it has 'path', 'label'"),
    (SAME, (*NUMBERS[:3], "light,garm"), "has no column 'garm'; did you mean 'gram'?"),
    (lambda rows: [{"x": 1, "y": 2} for _ in rows], (), "has no column 'path'; it has 'x', 'y'. --path-column names"),
    (
        lambda rows: [{k: row[k] for k in ("path", "light")} for row in rows],
        (),
        "has no column 'label'; it has 'light'",
    ),
    (
        lambda rows: [{k: row[k] for k in ("path", "light")} for row in rows],
        LABELS[:2],
        "not only 0 and 1 in its others",
    ),
    (set_one("path", "img/none.png"), (), "1 of 45 images of {} do not exist, such as "),
    (set_one("path", ""), (), "row 5 of {} has no path in the column 'path'"),
    (set_one("path", "img/3.png"), (), "3.png in more than one row"),
    (set_one("label", " "), (), "4.png of {} has no label; its column 'label' holds ''"),
    (set_one("tags", ""), LABELS, "4.png of {} has no label (that there is none, columns of 0 and 1 can say"),
    (set_one("tags", ";"), LABELS, "4.png of {} has no label"),
    (set_one("red", 2), (*LABELS[:3], "red,green"), "needs 0 or 1; its column 'red' holds '2'"),
    (set_one("light", "nan"), NUMBERS, "needs a finite number; its column 'light' holds 'nan'"),
    (set_one("light", "-inf"), NUMBERS, "needs a finite number; its column 'light' holds '-inf'"),
    (set_all("light", ""), NUMBERS, "0.png of {} needs a finite number; its column 'light' holds '', and 44 more are"),
    (set_one("light", "1,5"), NUMBERS, "holds '1,5'"),
    (set_all("light", 3.5), NUMBERS, "all training images of {} have nearly the same light, 3.5"),
    (set_one("light", 1e200), NUMBERS, "the light of {} is too large to be learned; give it in another unit"),
    (set_one("split", "trian"), (), "has the split 'trian', of 4.png; train, training, test"),
    (set_all("split", "train"), (), "has no test image in its column of splits; there are only train"),
    (set_all("split", "test"), (), "has no training image in its column of splits; there are only test"),
    (set_one("label", "odd", 8), (), "has no training image of the class 'odd', but test images of it"),
    (set_one("stars", "9", 8), ORDINAL, "has no training image of the class '9', but test images of it"),
    (set_one("tags", "odd", 8), LABELS, "has test images of the label 'odd', but no training images of it"),
    (set_all("label", "one"), (), "1 class to train on"),
    (SAME, ("--task", "ordinal"), "the classes of {} are words, 'high', 'low', 'mid', whose order nobody knows"),
    (SAME, ("--task", "ordinal", "--classes", "low,hgih"), "no class 'hgih'"),
    (SAME, (*LABELS, "--classes", "red,gren"), "has no label 'gren'; there are 'green', 'plain', 'red'"),
]


@pytest.mark.parametrize(("change", "words", "told"), BAD, ids=[told for *_, told in BAD])
def test_a_bad_table_is_told_in_a_sentence(
    change: Callable[[Rows], Rows], words: tuple[str, ...], told: str, drawn: tuple[Path, Rows], tmp_path: Path
) -> None:
    folder, rows = drawn
    table = write(folder / f"{tmp_path.name}.csv", change(rows))
    with pytest.raises(DataError) as error:
        read(table, *words)
    assert told.format(table) in str(error.value) and "\n" not in str(error.value)


REFUSED = [
    (("--task", "regression", "--shots", 5), "--shots does not go with --task regression: images are counted"),
    (("--task", "regression", "--classes", "a"), "--classes does not go with --task regression"),
    (("--task", "multilabel", "--smoothing", 0.1), "--smoothing does not go with --task multilabel"),
    (("--task", "multilabel", "--keep-head"), "--keep-head does not go with --task multilabel"),
    (("--task", "ordinal", "--mixup", 0.2), "--mixup does not go with --task ordinal: between two ranks lie others"),
    (("--task", "ordinal", "--demo"), "--demo does not go with --task ordinal"),
    (("--task", "regression", "--class-weights", "balanced"), "--class-weights does not go with --task regression"),
    (("--task", "regression", "--sampler", "balanced"), "--sampler does not go with --task regression"),
    (("--separator", ";"), "--separator does not go with --task classification"),
    (("--target-columns", "a,b"), "--task classification has one column of targets"),
    (("--task", "regression", "--target-columns", "a,,b"), "--target-columns takes names with commas, each once"),
    (("--task", "regression", "--target-columns", "a,a"), "--target-columns takes names with commas, each once"),
    (("--task", "detection"), "'detection' is not one of 'classification'"),
]


@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_options_that_a_task_cannot_have_are_refused(words: tuple[object, ...], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        cli.read(vit_cifar100.Options, list(map(str, words)))
    assert told in str(error.value)


RUNS: dict[str, tuple[ModuleType, tuple[object, ...]]] = {
    "multilabel": (imagenet_subset, ("--target-columns", "tags", "--class-weights", "balanced", "--sampler", "balanced",
                                     "--mixup", 0.4, "--best", "map", "--accumulate", 2)),
    "regression": (vit_cifar100, ("--target-columns", "light,gram", "--best", "rmse", "--cutmix", 1, "--find-lr")),
    "ordinal": (vit_cifar100, ("--classes", "low,mid,high", "--class-weights", "balanced", "--sampler", "balanced",
                               "--reinit", "informed", "--ema", 0.7, "--patience", 9, "--best", "kappa")),
    "classification": (imagenet_subset, ("--sampler", "balanced", "--class-weights", "balanced", "--smoothing", 0.1)),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vit(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
@pytest.mark.parametrize("task", RUNS)
def test_a_run_resumes_to_the_bit_reports_its_scores_and_predicts(
    task: str, tiny: str, drawn: tuple[Path, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (folder, rows), (recipe, words) = drawn, RUNS[task]
    table, whole, pieces = write(folder / "run.csv", rows), tmp_path / "whole", tmp_path / "pieces"
    same = ("--data", table, "--task", task, "--model", tiny, "--rank", 8, "--epochs", 3, "--batch", 8, *words,
            "--augment", "crop", "--relative", "--threshold", 0.2)  # fmt: skip
    assert run(recipe, (*same, "--output", whole), monkeypatch) == 0
    assert run(recipe, (*same, "--output", pieces, "--max-steps", 6, "--quiet"), monkeypatch) == 0
    assert run(recipe, (*same, "--output", pieces, "--resume", "--quiet"), monkeypatch) == 0
    left, right = trained(whole), trained(pieces)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    capsys.readouterr()
    other = next(name for name in RUNS if name != task)
    assert run(recipe, (*same[:2], "--task", other, "--resume", "--output", whole), monkeypatch) == 2
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["intervals"] == json.loads((pieces / "metrics.json").read_text())["intervals"]
    assert all(low <= high for low, high in metrics["intervals"].values()) and "loss" in metrics["intervals"]
    page = (whole / "report.html").read_text()
    part = {"multilabel": "label", "regression": "target"}.get(task, "class")
    assert "How sure the scores are" in page and f"Every {part}" in page and len(metrics[f"per_{part}"]) > 1

    tests = [row for row in rows if row["split"] == "test"]
    files = [str(folder / row["path"]) for row in tests]
    predictor = uora.load_predictor(whole / "adapter", device="cpu")
    found = predictor(files)
    out = tmp_path / "out.csv"
    assert main(["predict", *files, "--adapter", str(whole / "adapter"), "--output", str(out), "--device", "cpu"]) == 0
    with out.open(newline="") as file:
        written = list(csv.DictReader(file))
    if task == "multilabel":
        assert predictor.classes == ("green", "plain", "red")
        right = [{*one.answer} == {*row["tags"].split(";")} for one, row in zip(found, tests, strict=True)]
        flags = np.array([[n in row["tags"].split(";") for n in predictor.classes] for row in tests])
        said = np.array([[n in one.answer for n in predictor.classes] for one in found])
        assert (flags == said).mean() == pytest.approx(metrics["label_accuracy"]) and len(right) == 15
        assert [json.loads(row["labels"]) for row in written] == [list(one.answer) for one in found]
        assert float(written[0]["probability_red"]) == pytest.approx(float(found[0].probabilities[2]), abs=1e-5)
    elif task == "regression":
        errors = [np.mean([abs(one.values[name] - row[name]) for one, row in zip(found, tests, strict=True)])
                  for name in ("light", "gram")]  # fmt: skip
        assert [metrics["per_target"][name]["mae"] for name in ("light", "gram")] == pytest.approx(errors, rel=1e-3)
        assert metrics["mae"] == pytest.approx(np.mean(errors), rel=1e-3) and "suggested_lr" in metrics
        assert [float(row["value_light"]) for row in written] == pytest.approx(
            [one.answer[0] for one in found], rel=1e-5
        )
    else:
        right = np.mean([one.answer == row["label"] for one, row in zip(found, tests, strict=True)])
        assert right == pytest.approx(metrics["accuracy"])
        assert [row["class"] for row in written] == [one.answer for one in found]
    if task == "ordinal":
        errors = [
            abs(predictor.classes.index(one.answer) - row["stars"] + 1) for one, row in zip(found, tests, strict=True)
        ]
        assert np.mean(errors) == pytest.approx(metrics["mae"])
        assert [float(row["rank"]) for row in written] == pytest.approx([one.rank for one in found], abs=1e-3)


@pytest.mark.slow
def test_folders_and_data_sets_have_classes_and_ranks_alone(drawn: tuple[Path, Rows]) -> None:
    from common.vision.classify import load_sets

    def load(*words: str) -> Any:
        return load_sets(cli.read(vit_cifar100.Options, ["--data", "digits", *words]))

    with pytest.raises(DataError, match="--task multilabel takes a table with --data"):
        load("--task", "multilabel")
    with pytest.raises(DataError, match="--path-column names a column of a table, and digits is none"):
        load("--path-column", "x")
    assert load("--task", "ordinal").train.names == tuple("0123456789")
    reversed_order = load("--task", "ordinal", "--classes", "9,4,0").train
    assert reversed_order.names == ("9", "4", "0")
