"""The recipe for language models on tiny Llamas: methods, resuming, templates, the chat, and bad input."""

from __future__ import annotations

import importlib.util
import json
import math
import socket
from pathlib import Path
from typing import Any

import llm_instruct
import pytest
import torch
from common.command.choices import Method
from common.command.options import MethodOptions
from common.data.tables import load_table
from common.errors import DataError
from common.language.answers import held_out_loss
from common.language.dialogues import encode, prepare_template, prompt_ids, read_dialogues
from common.language.models import load_tokenizer
from common.language.sft import make_trainer
from common.training.methods import AdaptedModel
from datasets import Dataset
from llm_runs import CHAT, loaded, pretrained, questions
from recipe_runs import (
    Call,
    assert_it_redraws_by_uora_alone,
    assert_the_options_reach_uora,
    caller,
    trained,
)

import uora_vision as uora

SHARED = Path(__file__).parents[3] / "shared"
CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [END] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture
def recipe(backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the recipe in this process; gives the exit code and the last line on stderr."""
    return caller(llm_instruct, monkeypatch, capsys, data=data, model=backbone)


SHORT = ("--epochs", 2, "--batch", 12, "--validation", 0.25, "--samples", 1, "--max-new-tokens", 4, "--quiet")  # 2 x 3
FIRES = ("--relative", "--threshold", "0.7", "--lr", "0.1", "--rank", 8)


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_the_options_reach_the_adapter_and_its_reinitialisation(recipe: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_the_options_reach_uora(recipe, monkeypatch, *SHORT)


@pytest.mark.slow
def test_it_redraws_by_uora_alone(recipe: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert_it_redraws_by_uora_alone(recipe, monkeypatch, *SHORT)


@pytest.mark.parametrize("method", [m for m in Method if m not in (Method.linear, Method.bitfit)])
@pytest.mark.slow
def test_every_method_leaves_its_results(method: Method, recipe: Call, tmp_path: Path) -> None:
    rank = ["--rank", 4] if method is not Method.full else []
    code, error = recipe(*SHORT, "--lr", 0.01, "--method", method.value, "--output", tmp_path / "out", *rank)
    assert code == 0, error
    metrics = told(tmp_path / "out")
    assert metrics["steps"] == 6 and (metrics["train_examples"], metrics["test_examples"]) == (36, 12)
    assert metrics["loss"] < metrics["loss_before"]
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    (sample,) = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert sample.keys() == {"prompt", "expected", "before", "after"}
    assert sample["prompt"] in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "checkpoints").exists() and trained(tmp_path / "out")


@pytest.mark.slow
def test_the_saved_adapter_gives_the_measured_loss(recipe: Call, backbone: Path, data: Path, tmp_path: Path) -> None:
    assert recipe(*SHORT, *FIRES, "--output", tmp_path / "out")[0] == 0
    metrics = told(tmp_path / "out")
    assert metrics["firings"] > 0
    dialogues, _ = read_dialogues(load_table(str(data), "train"), "")
    numbers = Dataset.from_dict({"number": range(48)})
    _, held_out = llm_instruct.hold_out(numbers, 0.25, 0)
    model, tokenizer, _ = loaded(backbone)
    uora.load(model, tmp_path / "out" / "adapter").eval()
    total, count = 0.0, 0
    for number in held_out["number"]:  # one at a time, and written out: an independent reference
        ask, answer = (turn["content"] for turn in dialogues[number])
        prompt = tokenizer(f"User: {ask}\nAssistant:", add_special_tokens=False)["input_ids"]
        prompt = [tokenizer.bos_token_id, *prompt] if tokenizer.bos_token else prompt
        after = tokenizer(f" {answer} {tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + after])).logits[0, len(prompt) - 1 : -1]
        total -= logits.log_softmax(-1)[range(len(after)), after].sum().item()
        count += len(after)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-4)
    samples = json.loads((tmp_path / "out" / "samples.json").read_text())
    predictor = uora.load_predictor(tmp_path / "out" / "adapter", device="cpu")
    found = predictor([sample["prompt"] for sample in samples], batch=1)
    assert samples and [one.answer for one in found] == [sample["after"] for sample in samples]


@pytest.mark.parametrize("method", ["uora", "lora"])
@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(method: str, recipe: Call, tmp_path: Path) -> None:
    words = (*SHORT, *FIRES, "--method", method)
    assert recipe(*words, "--output", tmp_path / "whole")[0] == 0
    assert recipe(*words, "--output", tmp_path / "parts", "--max-steps", 2)[0] == 0
    assert not (tmp_path / "parts" / "metrics.json").exists()
    held = list((tmp_path / "parts" / "checkpoints").glob("*/*.safetensors"))
    assert [f.name for f in held] == ["adapter_model.safetensors" if method == "uora" else "trained.safetensors"]
    code, error = recipe(*words, "--output", tmp_path / "parts", "--resume")
    assert code == 0, error
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    first, second = told(tmp_path / "whole"), told(tmp_path / "parts")
    assert all(first[key] == second[key] for key in ("loss", "loss_before", "firings"))
    assert first["firings"] > 0 or method == "lora"


class TestTokens:
    @pytest.mark.parametrize("template", [None, CHATML], ids=["built-in", "its own"])
    def test_only_answers_are_learned(self, template: str | None, backbone: Path) -> None:
        tokenizer = load_tokenizer(str(backbone))
        tokenizer.chat_template = template
        prepare_template(tokenizer)
        rows = encode([CHAT], tokenizer, 64, "a test").rows[0]
        learned = tokenizer.decode([label for label in rows["labels"] if label != -100])
        assert learned.split() == ["in", "the", "city", ".", "[END]", "likes", "bread", ".", "[END]"]
        assert all(label in (-100, token) for label, token in zip(rows["labels"], rows["input_ids"], strict=True))

    def test_a_prompt_is_what_stood_before_the_answer(self, backbone: Path) -> None:
        _, tokenizer, rows = loaded(backbone)
        prompt = prompt_ids(CHAT[:-1], tokenizer)
        assert rows[0]["input_ids"][: len(prompt)] == prompt
        assert rows[0]["labels"][len(prompt) - 1] == -100 != rows[0]["labels"][len(prompt)]

    def test_of_a_template_that_rewrites_earlier_answers_the_last_one_is_learned(self, backbone: Path) -> None:
        tokenizer = load_tokenizer(str(backbone))
        tokenizer.chat_template = CHATML.replace(
            "m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else 'the') +"
        )
        rows = encode([CHAT], tokenizer, 64, "a test").rows[0]
        learned = tokenizer.decode([label for label in rows["labels"] if label != -100])
        assert learned.split() == ["likes", "bread", ".", "[END]"]
        assert prompt_ids(CHAT[:-1], tokenizer)

    def test_long_examples_are_counted(self, backbone: Path) -> None:
        _, tokenizer, rows = loaded(backbone)
        whole, first = len(rows[0]["input_ids"]), next(n for n, v in enumerate(rows[0]["labels"]) if v != -100)
        late = [{"role": "user", "content": "the " * 30}, CHAT[-1]]
        found = encode([CHAT, late], tokenizer, first + 1, "a test")
        assert (found.cut, found.left_out, found.kept) == (1, 1, [0])
        assert len(found.rows[0]["input_ids"]) == first + 1 < whole
        with pytest.raises(DataError, match=f"within {first} tokens, the first begins at {first + 1}"):
            encode([CHAT, late], tokenizer, first, "a test")

    def test_answers_have_many_names_and_rows_without_one_are_counted(self) -> None:
        table = Dataset.from_dict({"instruction": ["a", "b", ""], "input": ["x", None, ""], "response": ["c", "", "d"]})
        found, incomplete = read_dialogues(table, "a test")
        assert found == [[{"role": "user", "content": "a\n\nx"}, {"role": "assistant", "content": "c"}]]
        assert incomplete == 2


def test_packed_examples_do_not_see_each_other(backbone: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = loaded(backbone)
    texts = ["the owl lives in the city .", "likes bread .", "the bear is red ."]
    dialogues = [[{"role": "user", "content": "the fox"}, {"role": "assistant", "content": text}] for text in texts]
    rows = encode(dialogues, tokenizer, 64, "a test").rows
    adapted = AdaptedModel(uora.inject(model, rank=4), model, [], MethodOptions(Method.uora, 4))
    settings = {"output_dir": str(tmp_path), "max_length": 64, "packing": True, "eval_packing": False, "report_to": []}
    trainer = make_trainer(
        adapted, {**settings, "use_cpu": True, "bf16": False}, model=model, train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer,
    )  # fmt: skip
    assert len(trainer.train_dataset) == 1 < len(rows)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        packed = trainer.compute_loss(model.eval(), batch).item()
    assert packed == pytest.approx(held_out_loss(model, rows, tokenizer.pad_token_id, 8), rel=1e-5)


def test_the_loss_does_not_depend_on_batches(backbone: Path) -> None:
    other = [{"role": "user", "content": "the fox"}, CHAT[2]]
    model, tokenizer, rows = loaded(backbone, [CHAT, other, other[:1] + CHAT[-1:]])
    one, all_at_once = (held_out_loss(model, rows, tokenizer.pad_token_id, batch) for batch in (1, 8))
    assert one == pytest.approx(all_at_once, rel=1e-5)


@pytest.mark.parametrize(
    "more", [("--packing", "--max-length", 40), ("--gradient-checkpointing",), ("--accumulate", 3)]
)
@pytest.mark.slow
def test_ways_to_save_memory(more: tuple[object, ...], recipe: Call, tmp_path: Path) -> None:
    code, error = recipe(*SHORT, "--rank", 4, "--lr", 0.05, *more, "--output", tmp_path)
    assert code == 0, error
    metrics = told(tmp_path)
    assert metrics["loss"] < metrics["loss_before"]
    assert metrics["steps"] == 6 or "--packing" in more


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.slow
def test_a_base_in_4_bits(recipe: Call, tmp_path: Path) -> None:
    words = (*SHORT, "--rank", 4, "--lr", 0.05, "--load-in-4bit", "--output", tmp_path)
    assert recipe(*words, "--max-steps", 3)[0] == 0
    code, error = recipe(*words, "--resume")
    assert code == 0, error
    assert told(tmp_path)["loss"] < told(tmp_path)["loss_before"]
    assert not {torch.bfloat16, torch.float16} & {t.dtype for t in trained(tmp_path).values()}


class TestBadInput:
    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([{"question": "a", "reply": "b"}], ("'question', 'reply'", "expected 'messages'")),
            ([], ("has no rows",)),
            ([{"instruction": "a", "output": " "}], ("none of the 1 rows",)),
            ([{"instruction": "a", "output": "b"}], ("--validation 0.25 of 1 example leaves nothing",)),
            ([{"messages": [{"role": "bot", "content": "a"}]}], ("row 1", "role 'bot'")),
            ([{"messages": "hello"}], ("row 1", "another form")),
            ([{"instruction": "the " * 80, "output": "red"}] * 8, ("within 64 tokens", "raise --max-length")),
        ],
        ids=["columns", "empty", "no answers", "too small", "roles", "no turns", "too long"],
    )
    def test_data(self, content: list[Any], words: tuple[str, ...], recipe: Call, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_text(json.dumps(content))
        code, error = recipe(*SHORT, "--output", tmp_path / "out", data=tmp_path / "rows.json")
        assert code == 2 and all(word in error for word in words), error
        assert not (tmp_path / "out").exists()

    def test_longer_than_the_model(self, recipe: Call, tmp_path: Path) -> None:
        code, error = recipe(*SHORT, "--max-length", 65, "--output", tmp_path)
        assert code == 2 and "--max-length 65 is more than the 64 positions of llama" in error

    @pytest.mark.parametrize(("method", "lacks"), [("linear", "no head"), ("bitfit", "neither biases nor a head")])
    def test_a_llama_has_no_head_and_no_biases(self, method: str, lacks: str, recipe: Call, tmp_path: Path) -> None:
        code, error = recipe(*SHORT, "--method", method, "--output", tmp_path)
        assert code == 2 and f"would train nothing: LlamaForCausalLM has {lacks}; uora, vera," in error

    @pytest.mark.slow
    def test_tokenizers_without_a_padding_or_an_end_token(self, recipe: Call, backbone: Path, tmp_path: Path) -> None:
        for name, dropped, code in (("padded", ("pad_token",), 0), ("endless", ("pad_token", "eos_token"), 2)):
            folder = tmp_path / name
            folder.mkdir()
            for file in backbone.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            settings = json.loads((backbone / "tokenizer_config.json").read_text())
            kept = {key: value for key, value in settings.items() if key not in dropped}
            (folder / "tokenizer_config.json").write_text(json.dumps(kept))
            got, error = recipe(
                *SHORT, "--rank", 4, "--max-steps", 1, "--output", tmp_path / f"{name}-out", model=folder
            )
            assert got == code, error
        assert "has no end token; set one" in error

    @pytest.mark.slow
    def test_a_loss_that_is_not_finite_stops_the_run(self, recipe: Call, tmp_path: Path) -> None:
        code, error = recipe(*SHORT, "--method", "full", "--lr", 1e30, "--clip", 0, "--output", tmp_path / "out")
        assert code == 2 and "the loss is nan at step" in error and "smaller --lr" in error

    def test_names_on_the_hub_without_a_network(
        self, recipe: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def nowhere(*_: object) -> None:
            raise OSError

        monkeypatch.setattr("socket.getaddrinfo", nowhere)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for changed in ({"data": "nobody/nothing"}, {"model": "nobody/nothing"}):
            code, error = recipe(*SHORT, "--output", tmp_path / "out", **changed)
            assert code == 2 and "nobody/nothing" in error and "--demo" in error, error

    def test_4_bits(self, recipe: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        words = (*SHORT, "--load-in-4bit", "--output", tmp_path)
        assert "--method full cannot train" in recipe(*words, "--method", "full")[1]
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        code, error = recipe(*words)
        assert code == 2 and "pip install bitsandbytes" in error

    def test_serving_what_is_not_there(self, recipe: Call, tmp_path: Path) -> None:
        code, error = recipe("--serve", "--output", tmp_path)
        assert code == 2 and "a finished run" in error

    def test_serving_at_a_port_that_is_taken(self, recipe: Call, tmp_path: Path) -> None:
        (tmp_path / "metrics.json").write_text("{}")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            code, error = recipe("--serve", "--output", tmp_path, "--port", port)
        told = f"error: port {port} of 127.0.0.1 cannot be had: address already in use; give another --port"
        assert (code, error) == (2, told)


@pytest.mark.skipif(not (SHARED / "models" / "stories260K").is_dir(), reason="no real model beside the repository")
@pytest.mark.slow
def test_a_real_model_on_real_instructions(recipe: Call, tmp_path: Path) -> None:
    rows = json.loads((SHARED / "data" / "instruct" / "roleplay_instruct.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows[:40]))
    code, error = recipe(
        "--epochs", 1, "--batch", 4, "--validation", 0.2, "--max-length", 192, "--rank", 32, "--lr", 0.02,
        "--samples", 1, "--max-new-tokens", 8, "--quiet", "--output", tmp_path / "out",
        data=tmp_path / "rows.json", model=SHARED / "models" / "stories260K",
    )  # fmt: skip
    assert code == 0, error
    metrics = told(tmp_path / "out")
    assert metrics["loss"] < metrics["loss_before"] - 0.03
    assert metrics["cut"] > 0 and metrics["cut"] + metrics["left_out"] <= 40
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
