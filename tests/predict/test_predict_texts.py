"""`load_predictor` and `uora predict` on texts: a tiny BERT and a tiny GPT-2, each saved once."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from common.language import toy
from conftest import wake
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, GPT2Config
from transformers import GPT2LMHeadModel as Gpt2

import uora_vision as uora
from uora_vision.__main__ import main

TEXTS = [text for text, *_ in toy.reviews(slice(None), 6, 1)]


class Run:
    """Adapters of the tasks of texts, over one encoder and one language model."""

    def __init__(self, folder: Path) -> None:
        self.folder, words = folder, [text for text, *_ in toy.reviews(slice(None), 200, 0)]
        tokenizer = toy.word_tokenizer(words, ("[UNK]", "[PAD]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, **sizes)
            BertModel(bert).save_pretrained(folder / "bert")
            tokenizer.save_pretrained(folder / "bert")
            tokenizer = toy.word_tokenizer(words, ("[UNK]", "[PAD]", "[END]"))
            tokenizer.eos_token = "[END]"
            ids = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 2}
            Gpt2(GPT2Config(n_positions=40, n_embd=32, n_layer=2, n_head=2, **ids)).save_pretrained(folder / "gpt2")
            tokenizer.save_pretrained(folder / "gpt2")
            self.models = {
                "pairs": self.encoder("pairs", ["no", "yes"], columns=["one", "two"], max_length=9),
                "value": self.encoder("value", None, columns=["text"]),
                "written": self.language_model(),
            }

    def encoder(self, name: str, labels: list[str] | None, **more: Any) -> Any:
        model = BertForSequenceClassification.from_pretrained(self.folder / "bert", num_labels=len(labels or [0]))
        wake(uora.inject(model.eval(), rank=4), 2.0)
        task = "text-regression" if labels is None else "text-classification"
        about = {"task": task, "model": "transformers/../bert", **more}
        uora.save(model, self.folder / name, labels=labels, preprocessing=about)
        return model

    def language_model(self) -> Any:
        model = Gpt2.from_pretrained(self.folder / "gpt2").eval()
        wake(uora.inject(model, rank=4), 2.0)
        about = {"task": "text-generation", "model": "transformers/../gpt2", "prompt_end": "eos", "columns": ["prompt"],
                 "max_new_tokens": 5, "num_beams": 2}  # fmt: skip
        uora.save(model, self.folder / "written", preprocessing=about)
        return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def predict(made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Callable[..., Any]]:
    """Runs the command, with an adapter by its name: the exit code, and what it said on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["predict", *map(str, words), "--adapter", str(made.folder / name), "--device", "cpu"])
        return code, capsys.readouterr().err

    yield call


@pytest.mark.slow
def test_pairs_of_texts_have_a_class(made: Run, predict: Callable[..., Any]) -> None:
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    predictor = uora.load_predictor(made.folder / "pairs", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "bert")
    found = predictor(pairs, batch=4, embeddings=True)
    for pair, one in zip(pairs, found, strict=True):
        with torch.no_grad():
            given = tokenizer(*pair, truncation=True, max_length=9, return_tensors="pt")
            wanted = made.models["pairs"](**given).logits.softmax(1)[0]
        torch.testing.assert_close(one.probabilities, wanted, atol=1e-5, rtol=0)
        assert one.answer == ["no", "yes"][int(wanted.argmax())] and one.embedding.shape == (32,)
    frame = pd.DataFrame({"two": [b for _, b in pairs], "number": range(len(pairs)), "one": [a for a, _ in pairs]})
    frame.to_csv("pairs.csv", index=False)
    assert predict("pairs", "pairs.csv", "--output", "out.json")[0] == 0
    rows = json.loads(Path("out.json").read_text())
    assert [(row["one"], row["two"]) for row in rows] == pairs
    assert [row["class"] for row in rows] == [one.answer for one in found]
    with pytest.raises(uora.DataError, match="has 2 texts, not 1"):
        predictor("alone")


def test_lines_have_a_value_and_the_base_another(made: Run, predict: Callable[..., Any]) -> None:
    Path("lines.txt").write_text("\n\n".join(TEXTS))
    assert predict("value", "lines.txt", "--compare", "--output", "out.json")[0] == 0
    tokenizer, rows = AutoTokenizer.from_pretrained(made.folder / "bert"), json.loads(Path("out.json").read_text())
    model = made.models["value"]
    assert [row["text"] for row in rows] == TEXTS
    for text, row in zip(TEXTS, rows, strict=True):
        with torch.no_grad():
            assert row["value"] == pytest.approx(model(**tokenizer(text, return_tensors="pt")).logits.item(), abs=1e-5)
    assert [row["base_value"] for row in rows] != [row["value"] for row in rows]


@pytest.mark.slow
def test_prompts_have_answers(made: Run, predict: Callable[..., Any]) -> None:
    pd.DataFrame({"asked": [*TEXTS[:3], ""], "other": ["x"] * 4}).to_csv("asked.csv", index=False)
    code, said = predict("written", "asked.csv", "--columns", "asked", "--output", "out.csv", "--batch", 1)
    assert code == 0 and said == "skipped: example 4 of asked.csv: there is no text\n"
    rows = pd.read_csv("out.csv", keep_default_na=False).to_dict("records")
    tokenizer = AutoTokenizer.from_pretrained(made.folder / "gpt2")
    for text, row in zip(TEXTS[:3], rows, strict=True):
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        found = made.models["written"].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, num_beams=2, pad_token_id=1, do_sample=False
        )
        written = found[0, ids.shape[1] :].tolist()
        assert row["asked"] == text
        assert row["answer"] == tokenizer.decode(written, skip_special_tokens=True).strip() != ""
    assert len(rows) == 3
    together = uora.load_predictor(made.folder / "written", device="cpu")(TEXTS[:3])
    assert [one.answer for one in together] == [row["answer"] for row in rows]


def offline(*_: object, **__: object) -> None:
    raise OSError("no network here")


@pytest.mark.slow
def test_what_is_for_another_task_is_told(
    made: Run, predict: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pd.DataFrame({"one": ["a"], "three": ["b"]}).to_csv("odd.csv", index=False)
    pd.DataFrame({"one": ["a"], "two": ["b"]}).to_csv("both.csv", index=False)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Path("cat.png").touch()
    Path("empty.csv").touch()
    for name, words, message in (
        ("pairs", ["cat.png"], "of the task text-classification: give files of texts"),
        ("pairs", ["."], "of the task text-classification: give files of texts"),
        ("pairs", ["none.csv"], "none.csv does not exist"),
        ("pairs", ["odd.csv"], "odd.csv has no column 'two'; it has 'one', 'three'. --columns names those"),
        ("pairs", ["empty.csv"], "empty.csv cannot be read"),
        ("value", ["odd.csv", "--columns", "one,three"], "has 1 texts, not 2"),
        ("written", ["odd.csv", "--columns", "one", "--classes", "odd.csv"], "text-generation has no classes"),
        ("written", ["odd.csv", "--columns", "one", "--embeddings"], "no embeddings"),
    ):
        code, said = predict(name, *words)
        assert code == 2 and message in said and said.startswith("error: ") and said.count("\n") == 1, said
    assert "no tokenizer 'nobody/none'" in predict("pairs", "both.csv", "--model", "transformers/nobody/none")[1]
    with pytest.raises(uora.DataError, match=r"half of a character, U\+D800"):
        uora.load_predictor(made.folder / "value", device="cpu")("good \ud800")
    with pytest.raises(uora.DataError, match="40 positions"):
        uora.load_predictor(made.folder / "written", device="cpu")("good " * 60)
