"""What the field does in training: mixed and changed images, averages, the best evaluation, accumulation, rates."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import vit_cifar100
from common.command import cli
from common.command.choices import Augment, Domain, Method
from common.command.options import MethodOptions
from common.data.augment import DomainShift, InputFormat, ModelInput
from common.data.images import load_images
from common.data.loading import Batches, Images, train_loader
from common.data.mixing import Mixed
from common.errors import ModelError, RecipeError
from common.training.average import Average
from common.training.best import Best
from common.training.find_rate import STEPS, factor, steepest_fall
from common.training.loop import make_optimizer, train
from common.training.methods import AdaptedModel, apply_method
from common.training.parts import TrainOptions
from common.training.tracking import tracking
from common.vision.backbone import create_backbone
from common.vision.evaluation import Classification
from conftest import small_vit, wake
from recipe_runs import Call, run, trained
from tiny_vit import TINY, save_tiny_vit
from torch import nn

import uora_vision as uora

FORM = InputFormat((16, 16), (0.5,) * 3, (0.25,) * 3)
SHORT = ("--data", "digits", "--classes", "5-9", "--shots", "6", "--epochs", "2", "--batch", "8", "--quiet",
         "--rank", 8, "--relative", "--threshold", "0.2", "--lr", "0.05")  # fmt: skip
HABITS = ("--mixup", 0.8, "--cutmix", 1, "--smoothing", 0.1, "--aa", "rand-m5-mstd0.5", "--reprob", 0.5, "--drop-path",
          0.2, "--ema", 0.7, "--layer-decay", 0.8, "--accumulate", 2, "--best", "loss", "--patience", 5, "--find-lr",
          "--track", "csv,tensorboard")  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vit(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = run(vit_cifar100, (*SHORT, "--model", tiny, *words), monkeypatch)
        return code, capsys.readouterr().err

    return call


def read(folder: Path, name: str = "metrics.json") -> Any:
    return json.loads((folder / name).read_text())


def history(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in read(folder, "history.json")]


def equal(first: Path, second: Path) -> bool:
    left, right = trained(first), trained(second)
    same = left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return same and history(first) == history(second)


def digits(prepare: ModelInput, seed: int = 0) -> Images:
    return Images(load_images("digits", "train", range(5)), DomainShift(Domain.none), prepare, seed)


class TestRuns:
    @pytest.mark.slow
    def test_all_of_them_resume_to_the_same_weights(self, recipe: Call, tmp_path: Path) -> None:
        whole, pieces = tmp_path / "whole", tmp_path / "pieces"
        assert recipe(*HABITS, "--output", whole)[0] == 0
        assert read(whole)["firings"] > 0
        for steps in (3, 4):  # in an epoch, and at the end of one
            assert recipe(*HABITS, "--output", pieces, "--max-steps", steps, *["--resume"] * (steps > 3))[0] == 0
        code, said = recipe(*HABITS[2:], "--output", pieces, "--resume")
        assert code == 2 and "--mixup was 0.8, is now 0.0" in said
        assert recipe(*HABITS, "--output", pieces, "--resume", "--track", "none")[0] == 0
        assert equal(whole, pieces)
        assert read(whole)["suggested_lr"] == read(pieces)["suggested_lr"]
        assert "Learning rate finder" in (whole / "report.html").read_text()

    @pytest.mark.slow
    def test_looking_for_a_rate_changes_nothing_and_the_average_is_what_is_kept(
        self, recipe: Call, tmp_path: Path
    ) -> None:
        plain, looked, mean = (tmp_path / name for name in ("plain", "looked", "mean"))
        assert recipe("--output", plain)[0] == 0
        assert recipe("--output", looked, "--find-lr", "--track", "none")[0] == 0
        assert equal(plain, looked) and not (looked / "tensorboard").exists()
        assert recipe("--output", mean, "--ema", 0.9)[0] == 0
        rows = [
            {k: v for k, v in row.items() if k.startswith("train")}
            for folder in (plain, mean)
            for row in history(folder)
        ]
        assert rows[:2] == rows[2:]  # training itself is the same
        assert read(mean)["loss"] != read(plain)["loss"]
        predictor = uora.load_predictor(mean / "adapter", device="cpu")
        tests = load_images("digits", "test", range(5, 10))
        found = predictor([tests.read(index) for index in range(len(tests))])
        right = np.mean([one.answer == tests.names[y] for one, y in zip(found, tests.labels, strict=True)])
        assert right == read(mean)["accuracy"]


def teach(**how: Any) -> tuple[nn.Module, Any]:
    """A tiny ViT after some training on digits, and what `train` gave."""
    torch.manual_seed(0)
    model = uora.inject(small_vit(), rank=8)
    form = InputFormat((32, 32), (0.5,) * 3, (0.25,) * 3)
    images, tests = digits(ModelInput(form)), digits(ModelInput(form))
    images.data, tests.data = images.data.take(range(24)), tests.data.take(range(24, 48))
    chosen = MethodOptions(lr=how.pop("lr", 0.05), head_lr=0.1)
    adapted = AdaptedModel(model, model, uora.param_groups(model, lr=chosen.lr, head_lr=chosen.head_lr), chosen)
    given = {"epochs": 6, "batch": 8, "checkpoint_seconds": 0.0, **how}
    outcome = train(
        adapted, make_optimizer(adapted), None, images, Classification(tests), TrainOptions(**given),
        checkpoint_path=given.pop("path", None), resume=given.pop("resume", False),
    )  # fmt: skip
    return model, outcome


@pytest.mark.slow
def test_the_best_evaluation_is_kept_and_patience_ends_a_run() -> None:
    model, outcome = teach(best="loss", lr=1.0)  # too high: the loss soon rises
    losses = [entry["test_loss"] for entry in outcome.progress.history]
    best = int(np.argmin(losses))
    assert best < 4 and len(losses) == 6 and outcome.kept_epoch == best + 1
    assert outcome.evaluation.scores["loss"] == losses[best]
    shorter, _ = teach(best="loss", lr=1.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), shorter.parameters(), strict=True))
    last, other = teach(lr=1.0)
    assert other.evaluation.scores["loss"] == losses[-1] and other.kept_epoch is None
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), last.parameters(), strict=True))
    _, early = teach(best="loss", patience=1, lr=1.0)
    stop = next(i for i in range(1, 6) if losses[i] >= min(losses[:i]))
    assert stop < 5 and [entry["test_loss"] for entry in early.progress.history] == losses[: stop + 1]
    assert early.progress.step == 3 * (stop + 1)


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_the_batch() -> None:
    (one, _), (three, _) = teach(epochs=1), teach(epochs=1, accumulate=3)
    pairs = [(p, q) for p, q in zip(one.parameters(), three.parameters(), strict=True) if p.requires_grad]
    assert any(not torch.equal(p, q) for p, q in pairs)  # it was computed otherwise
    for p, q in pairs:
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--mixup", -1), "--mixup must be from 0 to 100, got -1.0"),
        (("--cutmix", "nan"), "--cutmix must be from 0 to 100, got nan"),
        (("--smoothing", 1), "--smoothing must be at least 0 and below 1, got 1.0"),
        (("--drop-path", 1), "--drop-path must be at least 0 and below 1"),
        (("--reprob", 1.5), "--reprob must be from 0 to 1"),
        (("--ema", 1), "--ema must be between 0 and 1, such as 0.999, got 1.0"),
        (("--layer-decay", 0), "--layer-decay must be above 0 and at most 1"),
        (("--aa", "rand-q9"), "--aa must be as timm writes it: rand-m9-mstd0.5-inc1"),
        (("--aa", "rand-m"), "--aa must be as timm writes it"),
        (("--patience", 2), "--patience needs --best"),
        (("--track", "csv,tensorbord"), "--track knows tensorboard, csv, wandb, mlflow and none, got 'tensorbord'"),
        (("--accumulate", 0), "'--accumulate'"),
    ],
)
def test_what_cannot_be_is_told_while_the_line_is_read(words: tuple, told: str) -> None:
    with pytest.raises(RecipeError) as error:
        cli.read(vit_cifar100.Options, [str(word) for word in words])
    assert told in str(error.value)


def test_a_tracker_without_its_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.command.options.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="--track wandb needs the package wandb: pip install wandb"):
        cli.read(vit_cifar100.Options, ["--track", "csv,wandb"])


def test_a_measure_that_is_not_measured_is_told_before_training(recipe: Call, tmp_path: Path) -> None:
    code, said = recipe("--best", "f1", "--output", tmp_path / "out")
    assert code == 2 and "--best f1 is not measured here; there are accuracy, f1_macro, loss" in said
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


class TestImages:
    @pytest.mark.parametrize(
        "how", [{"policy": "rand-m9-mstd0.5"}, {"policy": "v0"}, {"policy": "augmix-m5-w3"}, {"erase": 1.0}]
    )
    def test_a_change_follows_from_its_key_and_leaves_the_generators(self, how: dict[str, Any]) -> None:
        image = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        plain, changing = ModelInput(FORM), ModelInput(FORM, Augment.none, **how)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        found = [changing(image, (0, epoch, 3)) for epoch in range(8)]
        after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        assert before[:2] == after[:2] and torch.equal(before[2], after[2])
        assert len({tuple(x.flatten().tolist()) for x in found}) > 4
        random.seed(9)
        assert all(torch.equal(x, changing(image, (0, epoch, 3))) for epoch, x in enumerate(found))
        assert found[0].shape == plain(image).shape and found[0].dtype == torch.float32
        if "erase" in how:
            assert all(((x == plain(image)) | (x == 0)).all() for x in found)

    def test_mixing_is_timms_and_follows_from_the_batch(self) -> None:
        images = digits(ModelInput(FORM), seed=3)
        keys = [(2, index) for index in (0, 40, 80, 120, 60)]
        mixed = Mixed(images, 0.8, 0.0, 0.1, 7)
        first = mixed.__getitems__(keys)
        x, y = torch.stack([image for image, _ in first]), torch.stack([shares for _, shares in first])
        torch.testing.assert_close(y.sum(1), torch.ones(5))
        again = mixed.__getitems__(keys)
        assert all(
            torch.equal(one, two) for a, b in zip(first, again, strict=True) for one, two in zip(a, b, strict=True)
        )
        one, label = images[keys[0]]
        other, second = images[keys[3]]
        lam = float((y[0, label] - 0.1 / 7) / 0.9)
        assert 0 < lam < 1 and label != second
        torch.testing.assert_close(x[0], lam * one + (1 - lam) * other)
        torch.testing.assert_close(float(y[0, second]), 0.9 * (1 - lam) + 0.1 / 7)
        assert torch.equal(x[4], images[keys[4]][0])  # the odd one stays
        assert float(y[4].max()) == pytest.approx(0.9 + 0.1 / 7)
        assert any(
            not torch.equal(a, b)
            for (_, a), (_, b) in zip(
                first, mixed.__getitems__([(epoch + 1, index) for epoch, index in keys]), strict=True
            )
        )  # another epoch, other shares
        batch = next(iter(train_loader(mixed, Batches(len(mixed), 6, 1, 3), 0)))
        assert batch[0].shape == (6, 3, 16, 16) and batch[1].shape == (6, 7)
        cut = Mixed(images, 0.0, 1.0, 0.0, 5).__getitems__(keys)
        assert ((cut[0][0] == images[keys[0]][0]) | (cut[0][0] == images[keys[3]][0])).all()


class TestAverage:
    @pytest.mark.parametrize("scope", ["shared", "layer"])
    def test_a_fired_direction_starts_again_and_the_rows_are_the_models(self, scope: Any) -> None:
        model = wake(uora.inject(small_vit(), rank=8))
        reinit = uora.Reinitializer(model, threshold=1e-3, alpha=0.25, scope=scope)
        average = Average(model, 0.9, reinit)
        adapter = next(iter(uora.adapters(model).values()))
        mean = next(iter(uora.adapters(average.module).values()))
        average.update(1, 0)  # the first is a copy
        average.update(2, 0)
        with torch.no_grad():
            adapter.d[0, 5], adapter.d[0, 6] = 1e-4, 0.5
        kept = mean.d[0, 6].item()
        average.update(3, reinit.step())
        assert reinit.history()[:, 1:].tolist() == [[0, 5]]
        assert mean.d[0, 5].item() == adapter.d[0, 5].item()
        decay = 1 - 3 ** (-2 / 3)  # 0.52: what timm's warm-up has in the third step
        assert mean.d[0, 6].item() == pytest.approx(decay * kept + (1 - decay) * 0.5)
        x, expected = torch.randn(2, 3, 32, 32), copy.deepcopy(model)
        with torch.no_grad():
            for (_, one), (_, two) in zip(expected.named_parameters(), average.module.named_parameters(), strict=True):
                one.copy_(two)
            torch.testing.assert_close(average.module.eval()(x), expected.eval()(x))
        restored = Average(wake(uora.inject(small_vit(), rank=8)), 0.5, None)
        restored.load(average.state())
        with torch.no_grad():
            assert torch.equal(restored.module.eval()(x), average.module(x))


def test_the_best_is_the_first_of_equals_and_no_number_is_worse() -> None:
    best, seen = Best("accuracy", 3), []
    for epoch, value in enumerate([float("nan"), 0.5, 0.5, 0.7, 0.6, 0.1, float("nan")], 1):
        best.look({"accuracy": value}, epoch, lambda epoch=epoch: {"w": torch.tensor(epoch)})
        seen.append((best.epoch, best.worse, best.exhausted))
    assert seen[1:] == [(2, 0, False), (2, 1, False), (4, 0, False), (4, 1, False), (4, 2, False), (4, 3, True)]
    assert best.state == {"w": torch.tensor(4)}
    lower = Best("loss")
    lower.look({"loss": 2.0}, 1, dict)
    lower.look({"loss": 1.0}, 2, dict)
    assert lower.epoch == 2


def test_rates_fall_from_block_to_block_by_every_method() -> None:
    def rates(method: Method) -> dict[str, float]:
        adapted = apply_method(small_vit(), MethodOptions(method, 4, lr=0.1, head_lr=0.3, layer_decay=0.5))
        names = {id(p): name for name, p in adapted.base.named_parameters()}
        return {names[id(p)]: group["lr"] for group in adapted.groups for p in group["params"]}

    full = rates(Method.full)
    assert full["blocks.1.mlp.fc1.weight"] == pytest.approx(0.05)
    assert full["blocks.0.mlp.fc1.weight"] == pytest.approx(0.025)
    assert full["patch_embed.proj.weight"] == pytest.approx(0.0125)
    assert full["head.weight"] == 0.3
    for method in (Method.lora, Method.bitfit, Method.vera, Method.vera_peft):
        found = rates(method)
        lower = [name for name in found if "blocks.0" in name]
        upper = [found[name.replace("blocks.0", "blocks.1")] for name in lower]
        assert lower and [found[name] for name in lower] == pytest.approx([rate / 2 for rate in upper], rel=1e-4)


def test_drop_path_reaches_the_model_or_is_refused(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert create_backbone(tiny, 5, drop_path=0.3).blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    create = timm.create_model

    def without(*_: Any, drop_path_rate: float, **__: Any) -> nn.Module:
        return create("vit_tiny_patch16_224", num_classes=2, **TINY)  # as a model that takes the option and ignores it

    def unknown(*_: Any, **__: Any) -> nn.Module:
        raise TypeError("VGG.__init__() got an unexpected keyword argument 'drop_path_rate'")

    for made in (without, unknown):
        monkeypatch.setattr(timm, "create_model", made)
        with pytest.raises(ModelError, match="has no blocks that --drop-path could skip"):
            create_backbone(tiny, 5, drop_path=0.3)


def test_the_steepest_fall_is_found_and_noise_is_none() -> None:
    chance = np.random.default_rng(0)
    steps = np.arange(STEPS)
    fall = 2 - 1.5 / (1 + np.exp(-(steps - 50) / 3)) + np.where(steps > 65, 0.2 * (steps - 65), 0)
    assert abs(steepest_fall((fall + chance.normal(0, 0.05, STEPS)).tolist()) - 50) <= 4
    assert steepest_fall((2 + chance.normal(0, 0.05, STEPS)).tolist()) is None
    assert steepest_fall((2 + 0.01 * steps).tolist()) is None
    assert (factor(1), factor(STEPS)) == (pytest.approx(1e-3), pytest.approx(1e2))


def test_numbers_go_to_a_table_that_a_run_adds_to_and_a_service_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        with tracking(tmp_path, ("csv",), {}) as log:
            log(step, {"train/loss": 0.5 / step})
    assert (tmp_path / "numbers.csv").read_text().split() == [
        "step,name,value",
        "1,train/loss,0.5",
        "2,train/loss,0.25",
    ]
    failing = SimpleNamespace(init=lambda **_: (_ for _ in ()).throw(OSError("no route to host")))
    monkeypatch.setitem(__import__("sys").modules, "wandb", failing)
    with (
        pytest.raises(RecipeError, match="--track wandb cannot start: no route to host"),
        tracking(tmp_path, ("wandb",), {}),
    ):
        pass
