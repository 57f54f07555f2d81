"""The GLUE recipe on a tiny BERT: every method, resuming, GLUE's metrics, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import glue
import numpy as np
import pytest
import torch
from common.command.choices import Method
from common.language import toy
from recipe_runs import (
    Call,
    assert_it_redraws_by_uora_alone,
    assert_the_options_reach_uora,
    caller,
    trained,
)
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import uora_vision as uora

SHARED = Path(__file__).parents[3] / "shared" / "data" / "sst2"


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with a tokenizer that knows the words of the reviews."""
    folder = tmp_path_factory.mktemp("bert")
    texts = [text for text, *_ in toy.reviews(slice(None), 300, 0)]
    tokenizer = toy.word_tokenizer(texts, ("[UNK]", "[PAD]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reviews")
    toy.write_reviews(folder, seed=0, shots=12)
    return folder


@pytest.fixture
def recipe(backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the recipe in this process; gives the exit code and the last line on stderr."""
    return caller(glue, monkeypatch, capsys, data=data, model=backbone)


SHORT = ("--epochs", 2, "--batch", 8, "--quiet")  # 2 x 3 steps
FIRES = ("--relative", "--threshold", "0.7", "--lr", "0.1", "--rank", 8)


@pytest.mark.slow
def test_the_options_reach_the_adapter_and_its_reinitialisation(recipe: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_the_options_reach_uora(recipe, monkeypatch, *SHORT)


@pytest.mark.slow
def test_it_redraws_by_uora_alone(recipe: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert_it_redraws_by_uora_alone(recipe, monkeypatch, *SHORT)


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.slow
def test_every_method_leaves_its_results(method: Method, recipe: Call, tmp_path: Path) -> None:
    rank = ["--rank", 4] if "a" in method else []
    code, error = recipe(*SHORT, "--method", method.value, "--output", tmp_path / "out", *rank)
    assert (code, error) == (0, error), error
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["steps"] == 6 and (metrics["train_examples"], metrics["test_examples"]) == (24, 400)
    assert metrics["trained_parameters"] - metrics["trained_parameters_without_head"] == 2 * 32 + 2
    assert 0 <= metrics["accuracy"] <= 1 and metrics["loss"] > 0
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    assert any((tmp_path / "out" / "tensorboard").iterdir())
    assert not (tmp_path / "out" / "checkpoints").exists() and trained(tmp_path / "out")


@pytest.mark.slow
def test_the_saved_adapter_gives_the_measured_accuracy(
    recipe: Call, backbone: Path, data: Path, tmp_path: Path
) -> None:
    assert recipe(*SHORT, *FIRES, "--output", tmp_path / "out")[0] == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["firings"] > 0
    model = AutoModelForSequenceClassification.from_pretrained(backbone, num_labels=2)
    uora.load(model, tmp_path / "out" / "adapter").eval()
    rows = [line.split("\t") for line in (data / "dev.tsv").read_text().splitlines()[1:]]
    tokenizer = glue.load_tokenizer(str(backbone))
    with torch.no_grad():
        guesses = model(**tokenizer([text for _, text in rows], padding=True, return_tensors="pt")).logits.argmax(1)
    right = sum(int(label) == guess for (label, _), guess in zip(rows, guesses.tolist(), strict=True))
    assert metrics["accuracy"] == pytest.approx(right / len(rows), abs=1e-6)
    predictor = uora.load_predictor(tmp_path / "out" / "adapter", device="cpu")
    assert predictor.classes == ("negative", "positive")
    assert [one.answer for one in predictor([text for _, text in rows])] == [predictor.classes[g] for g in guesses]


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(recipe: Call, tmp_path: Path) -> None:
    words = (*SHORT, *FIRES, "--best", "loss", "--accumulate", 2)
    assert recipe(*words, "--output", tmp_path / "whole")[0] == 0
    for steps in (2, 3, 5):  # in an epoch, at the end of one, and in the next
        resume = ["--resume"] * (steps > 2)
        assert recipe(*words, "--output", tmp_path / "parts", *resume, "--max-steps", steps)[0] == 0
        assert not (tmp_path / "parts" / "metrics.json").exists()
    code, error = recipe(*words, "--output", tmp_path / "parts", "--resume")
    assert code == 0, error
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    told = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("whole", "parts")]
    assert told[0]["firings"] == told[1]["firings"] > 0 and told[0]["accuracy"] == told[1]["accuracy"]
    rows = [json.loads((tmp_path / n / "history.json").read_text()) for n in ("whole", "parts")]
    losses = [[row["test_loss"] for row in history] for history in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert told[0]["loss"] == min(losses[0]) and told[0]["kept_epoch"] == losses[0].index(min(losses[0])) + 1


@pytest.mark.slow
def test_patience_ends_a_run_and_a_measure_that_is_not_there_starts_none(recipe: Call, tmp_path: Path) -> None:
    words = ("--batch", 8, "--quiet", "--lr", 3, "--head-lr", 1, "--epochs", 8, "--best", "loss", "--patience", 1)
    assert recipe(*words, "--output", tmp_path / "out")[0] == 0
    losses = [row["test_loss"] for row in json.loads((tmp_path / "out" / "history.json").read_text())]
    assert len(losses) < 8 and losses[-1] >= min(losses[:-1])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["loss"] == min(losses)
    code, error = recipe(*SHORT, "--best", "f1", "--output", tmp_path / "other")
    assert code == 2 and "--best f1 is not measured here; there are accuracy, loss" in error


@pytest.mark.parametrize("task", ["cola", "mrpc", "mnli"])
def test_metrics_are_those_of_an_independent_library(task: str) -> None:
    random = np.random.default_rng(0)
    classes = 3 if task == "mnli" else 2
    logits, labels = random.normal(size=(200, classes)), random.integers(classes, size=200)
    got = glue.measure(SimpleNamespace(predictions=logits, label_ids=labels), glue.Task(task))
    guesses = logits.argmax(1)
    want = {"accuracy": (guesses == labels).mean()}
    if task == "cola":
        want["matthews"] = matthews_corrcoef(labels, guesses)
    if task == "mrpc":
        want["f1"] = f1_score(labels, guesses)
    assert got == pytest.approx(want, abs=1e-6)


def test_similarity_is_measured_by_correlation() -> None:
    random = np.random.default_rng(0)
    labels = random.uniform(0, 5, size=100)
    guesses = (labels + random.normal(size=100))[:, None]
    got = glue.measure(SimpleNamespace(predictions=guesses, label_ids=labels), glue.Task.stsb)
    ranks = [np.argsort(np.argsort(v)) for v in (guesses[:, 0], labels)]
    assert got["pearson"] == pytest.approx(np.corrcoef(guesses[:, 0], labels)[0, 1], abs=1e-6)
    assert got["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("text\tlabel\nfine\t1\n", ("no column 'sentence'", "'text', 'label'")),
            ("sentence\tlabel\nfine\t1\ngood\t1\n", ("all 2 training examples", "have the label 1")),
            ("sentence\tlabel\nfine\tyes\ndull\t0\n", ("whole numbers from 0, or words", "yes")),
            ("sentence\tlabel\nfine\t1.5\ndull\t0\n", ("whole numbers from 0", "1.5")),
            ("sentence\tlabel\nfine\t\ndull\t0\n", ("training example 1", "has no label")),
            ("sentence\tlabel\n\t1\ndull\t0\n", ("row 1 of the train split", "has no sentence")),
            ("sentence\tlabel\n", ("has no rows",)),
            ("", ("cannot be read",)),
        ],
        ids=["columns", "one class", "labels", "fractions", "no label", "no text", "no rows", "empty file"],
    )
    def test_data(self, content: str, words: tuple[str, ...], recipe: Call, tmp_path: Path) -> None:
        (tmp_path / "train.tsv").write_text(content)
        (tmp_path / "dev.tsv").write_text(content)
        code, error = recipe(*SHORT, "--output", tmp_path / "out", data=tmp_path)
        assert code == 2 and all(word in error for word in words), error
        assert not (tmp_path / "out" / "metrics.json").exists()

    def test_data_too_small_to_hold_some_out(self, recipe: Call, tmp_path: Path) -> None:
        for name in ("train", "dev"):
            (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\nfine\t1\n")
        code, error = recipe("--validation", 0.5, "--output", tmp_path / "out", data=tmp_path)
        assert code == 2 and "1 example" in error

    def test_longer_than_the_model(self, recipe: Call, tmp_path: Path) -> None:
        code, error = recipe("--max-length", 17, "--output", tmp_path / "out")
        assert code == 2 and "--max-length 17 is more than the 16 positions of bert" in error

    @pytest.mark.slow
    def test_a_loss_that_is_not_finite_stops_the_run(self, recipe: Call, tmp_path: Path) -> None:
        code, error = recipe(*SHORT, "--method", "full", "--lr", 1e30, "--clip", 0, "--output", tmp_path / "out")
        assert code == 2 and "the loss is nan at step" in error and "smaller --lr" in error

    def test_a_name_on_the_hub_without_a_network(
        self, recipe: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        code, error = recipe("--output", tmp_path / "out", model="roberta-base")
        assert code == 2 and "roberta-base" in error and "--demo" in error

    def test_a_finished_run_is_not_overwritten(self, recipe: Call, tmp_path: Path) -> None:
        (tmp_path / "metrics.json").write_text("{}")
        code, error = recipe(*SHORT, "--output", tmp_path)
        assert code == 2 and "holds a finished run" in error


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="SST-2 is not beside the repository")
def test_files_without_header(recipe: Call, tmp_path: Path) -> None:
    code, error = recipe(
        "--columns", "label,sentence", "--shots", 8, "--max-steps", 1, "--max-length", 12, "--batch", 4, "--quiet",
        "--output", tmp_path / "out", data=SHARED,
    )  # fmt: skip
    assert code == 0, error
