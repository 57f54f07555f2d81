"""Losses, weights and scores of images' tasks, against numbers that others compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
import vit_cifar100
from common.command import cli
from common.command.choices import Domain, Target
from common.data.augment import DomainShift, InputFormat, ModelInput
from common.data.labelled import load_labelled
from common.data.loading import Batches, Images
from common.data.mixing import Mixed
from common.vision.balance import balanced_chances, class_weights, label_weights
from common.vision.evaluation import Classification, Evaluation, _interleave
from common.vision.intervals import intervals, per_part
from common.vision.learn import make_task, outputs
from common.vision.multilabel import LabelEvaluation
from common.vision.ordinal import RankEvaluation, rank_losses
from common.vision.regression import NumberEvaluation
from drawn_images import draw, write

from uora_vision.predict.answers import rank_shares

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    folder = tmp_path_factory.mktemp("drawn")
    return folder, draw(folder, 45)


def test_a_loss_of_ranks_is_that_of_their_probabilities() -> None:
    logits, labels = torch.randn(50, 4), torch.arange(50) % 5
    shares = rank_shares(logits)
    torch.testing.assert_close(shares.sum(1), torch.ones(50))
    assert shares.min() > 0 and shares.shape == (50, 5)
    torch.testing.assert_close(rank_losses(logits, labels), -shares.gather(1, labels[:, None])[:, 0].log())
    sure = torch.tensor([[9.0, 9.0, -9.0, 9.0]])  # above 0, above 1, not above 2: what comes after does not arise
    assert rank_shares(sure).argmax() == 2 and rank_losses(sure, torch.tensor([2])) < 0.001


def test_rare_classes_count_more_and_come_as_often() -> None:
    labels = np.array([0] * 60 + [1] * 30 + [3] * 10)
    weights = class_weights(labels, 4)
    np.testing.assert_allclose(weights[[0, 1, 3]], [100 / 180, 100 / 90, 100 / 30], rtol=1e-6)
    assert weights[torch.from_numpy(labels)].mean() == pytest.approx(1)
    flags = np.array([[1, 0]] * 20 + [[1, 1]] * 5 + [[0, 0]] * 75)
    assert label_weights(flags).tolist() == [3, 19]
    chances = balanced_chances(labels)
    assert [chances[labels == c].sum() for c in (0, 1, 3)] == pytest.approx([1 / 3] * 3)
    some = balanced_chances(flags)
    assert some[:20].tolist() == pytest.approx([some[0]] * 20) and some[20] == pytest.approx(5 * some[0])
    assert some[25] == pytest.approx(some[0] * 25 / 75)
    batches = Batches(100, 25, 40, 7, chances=chances)
    drawn = np.array([index for keys in batches for _, index in keys])
    assert len(drawn) == 4000 and np.bincount(labels[drawn], minlength=4)[[0, 1, 3]] / 4000 == pytest.approx(
        1 / 3, abs=0.03
    )
    assert list(Batches(100, 25, 40, 7, start=6, chances=chances)) == list(batches)[6:]
    assert list(Batches(100, 25, 40, 8, chances=chances)) != list(batches)


def test_weights_of_classes_and_labels_are_in_the_loss(drawn: tuple[Path, Rows]) -> None:
    folder, rows = drawn
    table = write(folder / "weights.csv", [row for number, row in enumerate(rows) if number % 3 or number > 20])
    images = ("--data", str(table), "--class-weights", "balanced")
    for words in (
        (), ("--task", "ordinal", "--target-columns", "stars"), ("--task", "multilabel", "--target-columns", "tags"),
    ):  # fmt: skip
        options = cli.read(vit_cifar100.Options, [*images, *words])
        splits = load_labelled(options)
        form = ModelInput(InputFormat((16, 16), (0.5,) * 3, (0.5,) * 3))
        data = Images(splits.train, DomainShift(Domain.none), form)
        task, plain = (
            make_task(one, splits, data) for one in (options, cli.read(vit_cifar100.Options, [*images[:2], *words]))
        )
        logits = torch.randn(len(data), outputs(options.task, splits.train.names))
        labels = torch.stack([torch.as_tensor(data[0, index][1]) for index in range(len(data))])
        parts = [task.mean_loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(data))]
        torch.testing.assert_close(torch.stack(parts).mean(), task.mean_loss(logits, labels))
        if options.task is Target.multilabel:
            odds = (len(data) - splits.train.labels.sum(0)) / splits.train.labels.sum(0)
            shares = logits.double().sigmoid().numpy()
            y = splits.train.labels
            wanted = -(odds * y * np.log(shares) + (1 - y) * np.log(1 - shares)).mean()
        else:
            each = np.array([float(plain.mean_loss(logits[i : i + 1], labels[i : i + 1])) for i in range(len(data))])
            counts = np.bincount(splits.train.labels)
            wanted = (each * len(data) / 3 / counts[splits.train.labels]).mean()
        assert float(task.mean_loss(logits, labels)) == pytest.approx(wanted, rel=1e-5)
        shares = torch.nn.functional.one_hot(labels, 3).float() if not words else None
        if shares is not None:  # as mixed images have them
            torch.testing.assert_close(task.mean_loss(logits, shares), task.mean_loss(logits, labels))


def test_scores_are_those_of_scikit_learn() -> None:
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 5, 200)
    predicted = np.clip(labels + chance.integers(-1, 2, 200), 0, 4)
    of_ranks = RankEvaluation(chance.random(200), labels, predicted, chance.random(200)).scores
    assert of_ranks["kappa"] == pytest.approx(sklearn.metrics.cohen_kappa_score(labels, predicted, weights="quadratic"))
    assert of_ranks["mae"] == pytest.approx(np.abs(labels - predicted).mean())
    found = Evaluation(np.zeros(200), labels + (labels > 2), predicted + (predicted > 2), np.ones(200))
    assert found.scores["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(labels, predicted, average="macro"))
    assert np.isnan(found.parts["f1"][3])  # a class that is nowhere
    flags, shares = (chance.random((200, 4)) < (0.1, 0.5, 0.9, 0)).astype(np.int64), chance.random((200, 4)).round(2)
    several = LabelEvaluation(np.zeros(200), flags, shares)
    known, said = flags[:, :3], shares >= 0.5
    precision = sklearn.metrics.average_precision_score(known, shares[:, :3], average=None)
    np.testing.assert_allclose(several.parts["average_precision"], [*precision, np.nan], rtol=1e-5)
    assert several.scores["map"] == pytest.approx(precision.mean())
    assert several.scores["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(known, said[:, :3], average="macro"))
    assert several.scores["f1_micro"] == pytest.approx(sklearn.metrics.f1_score(flags, said, average="micro"))
    assert several.scores["label_accuracy"] == pytest.approx((flags == said).mean())
    true = chance.normal(size=(200, 2)) * (1, 1000)
    said_so = true + chance.normal(size=(200, 2)) * (0.1, 500)
    numbers = NumberEvaluation(np.zeros(200), true, said_so)
    assert numbers.scores["r2"] == pytest.approx(sklearn.metrics.r2_score(true, said_so))
    np.testing.assert_allclose(numbers.parts["mae"], np.abs(true - said_so).mean(0))
    np.testing.assert_allclose(numbers.parts["rmse"], np.sqrt(((true - said_so) ** 2).mean(0)))


def test_intervals_hold_what_chance_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.vision.intervals.MOST", 200)
    chance = np.random.default_rng(0)
    right = chance.random(400) < 0.8
    labels = np.where(np.arange(400) == 0, 2, np.arange(400) % 2)
    evaluation = Evaluation(np.zeros(400), labels, np.where(right, labels, 1 - labels % 2), np.ones(400))
    found = intervals(evaluation, 3)
    low, high = found.scores["accuracy"]
    error = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert low < right.mean() < high and (high - low) / 2 == pytest.approx(error, rel=0.2)
    assert intervals(evaluation, 3).scores == found.scores != intervals(evaluation, 4).scores
    told = per_part(evaluation, ("a", "b", "c", "d"), found)
    assert list(told) == ["a", "b", "c", "d"] and told["d"] == {"test_images": 0} and told["c"]["test_images"] == 1
    assert told["a"]["f1_interval"][0] < told["a"]["f1"] < told["a"]["f1_interval"][1]
    assert intervals(Evaluation(*(np.zeros(1, dtype=np.int64),) * 4)).scores["accuracy"] == [1, 1]


def test_labels_and_numbers_are_mixed_as_their_images(drawn: tuple[Path, Rows]) -> None:
    folder, rows = drawn
    words = ["--data", str(write(folder / "mixed.csv", rows)), "--task", "regression", "--target-columns", "light"]
    splits = load_labelled(cli.read(vit_cifar100.Options, words))
    form = ModelInput(InputFormat((16, 16), (0.5,) * 3, (0.5,) * 3))
    images = Images(splits.train, DomainShift(Domain.none), form)
    keys = [(1, index) for index in (0, 5, 10, 16, 21)]
    mixed = Mixed(images, 0.8, 0.0, 0.0, 1).__getitems__(keys)
    (x, y), (other, second) = images[keys[0]], images[keys[3]]
    share = float((mixed[0][1] - second) / (y - second))
    assert 0 < share < 1
    torch.testing.assert_close(mixed[0][0], share * x + (1 - share) * other)
    assert torch.equal(mixed[4][1], images[keys[4]][1])


def test_a_class_of_a_kept_head_without_a_name_has_a_weight_too() -> None:
    task = Classification(None, weights=torch.tensor([2.0, 0.5]))  # type: ignore[arg-type]
    assert task.mean_loss(torch.zeros(2, 5), torch.tensor([0, 1])) == pytest.approx(1.25 * np.log(5))


def test_parts_of_several_processes_become_one_whole() -> None:
    whole = np.arange(14).reshape(7, 2)
    assert np.array_equal(_interleave([whole[part::3] for part in range(3)]), whole)
