"""Adapters of several labels, of numbers and of ordered classes: what they answer, and what a file of it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from predicting import FORM, NAMES, Run

import uora_vision as uora
from uora_vision.__main__ import main
from uora_vision.predict.answers import answers
from uora_vision.predict.tasks import LABELS, NUMBERS, RANKS, Computed

ABOUT: dict[str, dict[str, Any]] = {
    LABELS: {"labels": NAMES, "cutoff": 0.4},
    NUMBERS: {"labels": None, "targets": ["age", "mass"], "target_mean": [40.0, 1e6], "target_std": [10.0, 2e5]},
    RANKS: {"labels": ["1", "2", "3", "4"]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An adapter, and one for each task: of three outputs, of which the numbers have two."""
    found = Run(tmp_path_factory.mktemp("tasks"))
    for task, about in ABOUT.items():
        if task == NUMBERS:
            found.model.reset_classifier(2)
            torch.nn.init.normal_(found.model.head.weight)
        same = {"task": task, "model": "timm/local-dir:../base", **FORM.config()}
        more = {name: value for name, value in about.items() if name != "labels"}
        uora.save(found.model, found.base.parent / task, labels=about["labels"], preprocessing=same | more)
        if task == LABELS:
            head = found.model.head
        found.model.head = head
    return found


def logits_of(folder: Path, files: list[Path]) -> torch.Tensor:
    predictor = uora.load_predictor(folder, device="cpu")
    return predictor.task.compute([predictor.task.read(file) for file in files], features=False).logits  # type: ignore[return-value]


def test_each_task_answers_in_its_own_way(made: Run, tmp_path: Path) -> None:
    root, files = made.base.parent, made.files
    rows = {}
    for task in ABOUT:
        output = tmp_path / f"{task}.json"
        words = ["predict", str(made.photos), "--adapter", str(root / task), "--output", str(output), "--top", "2"]
        assert main([*words, "--device", "cpu", "--compare", "--embeddings"]) == 0
        rows[task] = json.loads(output.read_text())
        assert [row["path"] for row in rows[task]] == [str(file) for file in files]
        assert len(rows[task][0]["embedding"]) == 32

    shares = logits_of(root / LABELS, files).sigmoid()
    found = uora.load_predictor(root / LABELS, device="cpu")(files)
    for one, row, p in zip(found, rows[LABELS], shares, strict=True):
        assert list(one.answer) == row["labels"] == [n for n, share in zip(NAMES, p, strict=True) if share >= 0.4]
        torch.testing.assert_close(one.probabilities, p)
        assert [row[f"probability_{name}"] for name in NAMES] == pytest.approx(p.tolist(), abs=1e-6)
        assert one.probability is None and "base_labels" in row and "base_probability_ant" in row
    assert {len(one.answer) for one in found} != {1}

    values = logits_of(root / NUMBERS, files).double() * torch.tensor([10, 2e5]) + torch.tensor([40, 1e6])
    found = uora.load_predictor(root / NUMBERS, device="cpu")(files)
    for one, row, value in zip(found, rows[NUMBERS], values.tolist(), strict=True):
        assert one.answer == pytest.approx(tuple(value)) and one.values == {"age": one.answer[0], "mass": one.answer[1]}
        assert [row["value_age"], row["value_mass"]] == pytest.approx(value, rel=1e-6) and "base_value_age" in row

    logits = logits_of(root / RANKS, files).double()
    above = np.cumprod(1 / (1 + np.exp(-logits.numpy())), 1)
    found = uora.load_predictor(root / RANKS, device="cpu")(files)
    for one, row, p in zip(found, rows[RANKS], above, strict=True):
        assert one.answer == row["class"] == str(1 + (p > 0.5).sum())
        assert one.rank == pytest.approx(p.sum(), abs=1e-5) and row["rank"] == pytest.approx(p.sum(), abs=1e-3)
        each = -np.diff([1, *p, 0])
        assert row["probability"] == pytest.approx(each[int(one.answer) - 1], abs=1e-5)
        others = {n: share for n, share in zip("1234", each, strict=True) if n != one.answer}
        assert row["class_2"] == max(others, key=others.__getitem__) and "class_3" not in row


def test_an_answer_of_ranks_is_the_middle_and_not_the_likeliest() -> None:
    chances = torch.tensor([0.45, 0.15, 0.1, 0.3])  # the likeliest is the first, and the middle the second
    above = 1 - chances.cumsum(0)[:-1]
    logits = torch.logit(above / torch.cat([torch.ones(1), above[:-1]]))[None]
    (found,) = answers(Computed(logits), RANKS, "abcd", {})
    torch.testing.assert_close(found.probabilities, chances)
    assert (found.answer, found.top(1)[0][0]) == ("b", "a") and found.probability == pytest.approx(0.15)
    assert found.rank == pytest.approx(0.15 + 0.2 + 0.9)


def test_one_number_is_an_answer_by_itself() -> None:
    about = {"targets": ["age"], "target_mean": [30.0], "target_std": [5.0]}
    (found,) = answers(Computed(torch.tensor([[2.0]])), NUMBERS, (), about)
    assert found.answer == 40 and found.values == {"age": 40}
    (plain,) = answers(Computed(torch.tensor([[2.0, 3.0]])), NUMBERS, (), {})
    assert plain.values == {"value_1": 2, "value_2": 3}


@pytest.mark.parametrize(
    ("task", "classes", "about", "told"),
    [
        (RANKS, "abcd", {}, "4 classes in order need a model of 3 outputs, and it has 2"),
        (LABELS, "abc", {}, "names of 3 classes, and the model tells 2 apart"),
        (NUMBERS, (), {"targets": ["a"]}, "1 targets, 2 means and 2 deviations, and the model has 2 outputs"),
        (NUMBERS, (), {"targets": ["a", "b"], "target_std": [1.0]}, "2 targets, 2 means and 1 deviations"),
    ],
)
def test_an_adapter_that_tells_of_other_outputs_is_refused(task: str, classes: Any, about: Any, told: str) -> None:
    with pytest.raises(uora.FormatError, match=told):
        answers(Computed(torch.zeros(1, 2)), task, classes, about)


@pytest.mark.parametrize(
    "about",
    [{"cutoff": 0}, {"cutoff": 1.0}, {"targets": "age"}, {"targets": [""]}, {"target_std": [0.0]}, {"target_mean": []}],
)
def test_what_an_adapter_cannot_say_of_its_task_is_not_saved(about: dict[str, Any], made: Run, tmp_path: Path) -> None:
    with pytest.raises(uora.OptionError, match=next(iter(about))):
        uora.save(made.model, tmp_path, preprocessing=about)
