"""`uora features`: which images are measured, by what features, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from drawn_images import draw, write
from PIL import Image
from predicting import Run
from sklearn.neighbors import KNeighborsClassifier

import uora_vision as uora
from uora_vision.__main__ import main
from uora_vision.predict.features import Labelled, extract, labelled_images, measured, probe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("features"))


def test_images_are_found_in_folders_and_tables(tmp_path: Path) -> None:
    rows = draw(tmp_path, 12)
    for name in ("train/a", "train/b", "test/a", "flat/x/deep", "flat/y"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{number}.png")
    (tmp_path / "flat" / "y" / "notes.txt").touch()
    found = labelled_images(tmp_path)
    assert [f"{'test' if t else 'train'}/{name}" for name, t in zip(found.labels, found.test, strict=True)] == [
        *["train/a"] * 5, *["train/b"] * 5, *["test/a"] * 5
    ]  # fmt: skip
    assert all(path.parent.name == name for path, name in zip(found.paths, found.labels, strict=True))
    held = labelled_images(tmp_path / "flat", held_out=0.4, seed=1)
    assert [int(held.test[held.labels == name].sum()) for name in ("x", "y")] == [2, 2] and "40%" in held.notes[0]
    assert held.test.tolist() != labelled_images(tmp_path / "flat", held_out=0.4, seed=2).test.tolist()
    table = labelled_images(write(tmp_path / "a.csv", rows), target_column="stars")
    assert table.labels.tolist() == [str(row["stars"]) for row in rows]
    assert table.test.tolist() == [row["split"] == "test" for row in rows]
    bad: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "none", {}, "none does not exist; give a folder with one folder per class, or a table"),
        (tmp_path / "train" / "a", {}, "has no images in folders, one per class"),
        (tmp_path / "train", {"target_column": "x"}, "--target-column names a column of a table"),
        (tmp_path / "a.csv", {"target_column": "star"}, "has no column 'star'; did you mean 'stars'?"),
        (write(tmp_path / "b.csv", [{**r, "label": "z"} for r in rows]), {}, "1 class to train on; at least 2"),
        (write(tmp_path / "c.csv", [{**r, "label": r["split"]} for r in rows]), {}, "test images of 'test', but no"),
        (write(tmp_path / "d.csv", [{**r, "label": ""} for r in rows]), {}, "0.png of .* has no label"),
    ]
    for source, options, told in bad:
        with pytest.raises(uora.DataError, match=told):
            labelled_images(source, **options)


def test_features_are_those_before_the_head_without_dw_and_with_it(made: Run) -> None:
    predictor = uora.load_predictor(made.adapter, device="cpu", merge=False)
    files = [*made.files, made.photos / "none.png"]
    files[-1].write_bytes(b"nothing")
    rows, after, before, skipped = extract(predictor, files, batch=4)
    files[-1].unlink()
    assert rows.tolist() == list(range(10)) and len(skipped) == 1 and "none.png" in skipped[0]
    wanted = predictor(made.files, embeddings=True)
    np.testing.assert_allclose(after, torch.stack([one.embedding for one in wanted]), rtol=1e-5, atol=1e-5)
    base = predictor.predict([predictor.task.read(file) for file in made.files], embeddings=True, base=True)
    assert before is not None and np.abs(before - after).max() > 0.1
    np.testing.assert_allclose(before, torch.stack([one.embedding for one in base]), rtol=1e-5, atol=1e-5)


def test_probes_name_what_the_features_tell_and_intervals_are_of_the_same_images() -> None:
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 3, 120)
    data = Labelled([Path()] * 120, labels.astype(str), np.arange(120) % 2 == 1)
    clear, noise = np.eye(3)[labels] * 4 + chance.normal(size=(120, 3)), chance.normal(size=(120, 3))
    right = {f"{name}_{how}": hits for name, values in (("clear", clear), ("noise", noise))
             for how, hits in probe(values, data, 3).items()}  # fmt: skip
    knn = KNeighborsClassifier(3, weights="distance", metric="cosine").fit(clear[::2], labels[::2])
    assert right["clear_knn"].tolist() == (knn.predict(clear[1::2]) == labels[1::2]).tolist()
    long = clear * chance.uniform(0.1, 10, (120, 1))  # directions count, lengths do not
    assert probe(long, data, 3)["knn"].tolist() == right["clear_knn"].tolist()
    assert right["clear_linear"].mean() > 0.9 > 0.6 > right["noise_linear"].mean()
    right["gain"] = right["clear_knn"].astype(float) - right["noise_knn"]
    found = measured(right, 1)
    gain = found["gain"]
    assert gain["value"] == pytest.approx(found["clear_knn"]["value"] - found["noise_knn"]["value"])
    error = right["gain"].std() / 60**0.5
    assert (gain["high"] - gain["low"]) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert found == measured(right, 1) != measured(right, 2)


def test_the_command_tells_writes_and_refuses(made: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: object) -> tuple[int, str, str]:
        code = main(["features", *map(str, words)])
        return (code, *capsys.readouterr())

    adapter = ("--adapter", made.adapter, "--device", "cpu")
    code, said, noted = call(made.photos, *adapter, "--json", "--held-out", 0.4, "--output", tmp_path / "f.npz")
    found = json.loads(said)
    assert code == 0 and "40% of each class are held out" in noted
    assert (found["classes"], found["train_images"], found["test_images"], found["width"]) == (2, 6, 4, 32)
    for how in ("knn", "linear"):
        gain = found["after"][how]["value"] - found["before"][how]["value"]
        assert found["gain"][how]["value"] == pytest.approx(gain)
    held = np.load(tmp_path / "f.npz")
    assert held["before"].shape == held["after"].shape == (10, 32) and set(held["splits"]) == {"train", "test"}
    base = f"timm/local-dir:{made.base}"
    code, said, _ = call(made.photos, "--model", base, "--held-out", 0.4, "--output", tmp_path / "f.parquet")
    assert code == 0 and "nearest neighbours" in said and "before" in said and "after" not in said
    frame = pd.read_parquet(tmp_path / "f.parquet")
    assert list(frame.columns) == ["path", "label", "split", "before"] and len(frame["before"][0]) == 32

    for words, told in (
        ((made.photos,), "give --adapter FOLDER, or --model NAME"),
        ((made.photos, *adapter, "--held-out", 1), "--held-out must be between 0 and 1, got 1"),
        ((made.photos, *adapter, "--output", tmp_path / "f.csv"), "must end with .npz or .parquet"),
        ((made.photos, *adapter, "--output", tmp_path / "f.npz"), "--overwrite replaces it"),
        ((tmp_path / "none", *adapter), "does not exist; give a folder with one folder per class"),
        ((made.photos, "--adapter", tmp_path / "none"), "is no folder"),
    ):
        code, _, said = call(*words)
        assert code == 2 and told in said and len(said.splitlines()) == 1
    text = tmp_path / "text"
    uora.save(made.model, text, preprocessing={"task": "text-regression"})
    assert "is of the task text-regression, whose inputs are no images" in call(made.photos, "--adapter", text)[2]
