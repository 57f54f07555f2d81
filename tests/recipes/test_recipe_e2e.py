"""The data-to-text recipe on a tiny GPT-2: every method, resuming, what is written, and what it says to wrong input."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import e2e_nlg
import huggingface_hub.constants
import pytest
import torch
from common.command.choices import Method
from common.language import toy, toy_restaurants
from recipe_runs import (
    Call,
    assert_it_redraws_by_uora_alone,
    assert_the_options_reach_uora,
    caller,
    trained,
)
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import uora_vision as uora
from uora_vision.predict.texts import no_repeats

END = toy_restaurants.END


def write_model(folder: Path, llama: bool = False, positions: int = 96) -> Path:
    """A random model with a tokenizer that knows the words of the toy restaurants."""
    random = toy_restaurants.np.random.default_rng(0)
    told = toy_restaurants.restaurants(200, random)
    texts = [f"{e2e_nlg.linearise(toy_restaurants.meaning(r))} {toy_restaurants.sentences(r, n % 3)}"
             for n, r in enumerate(told)]  # fmt: skip
    tokenizer = toy.word_tokenizer(texts, ("[UNK]", "[PAD]", END))
    tokenizer.eos_token = END
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if llama:
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            config = LlamaConfig(**ids, **sizes, intermediate_size=48, max_position_embeddings=positions)
            LlamaForCausalLM(config).save_pretrained(folder)
        else:
            config = GPT2Config(**ids, n_positions=positions, n_embd=32, n_layer=2, n_head=2)
            GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restaurants")
    toy_restaurants.write(folder, seed=0, train=12, test=5)
    return folder


@pytest.fixture
def recipe(backbone: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the recipe in this process; gives the exit code and the last line on stderr."""
    return caller(e2e_nlg, monkeypatch, capsys, data=data, model=backbone)


SHORT = ("--epochs", 2, "--batch", 8, "--beams", 2, "--max-new-tokens", 6, "--quiet")  # 2 x 3 steps
FIRES = ("--relative", "--threshold", "0.7", "--lr", "0.1", "--rank", 8)


def without_linear() -> list[Method]:
    return [method for method in Method if method is not Method.linear]


def test_the_options_reach_the_adapter_and_its_reinitialisation(recipe: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_the_options_reach_uora(recipe, monkeypatch, *SHORT)


@pytest.mark.slow
def test_it_redraws_by_uora_alone(recipe: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert_it_redraws_by_uora_alone(recipe, monkeypatch, *SHORT)


@pytest.mark.parametrize("method", without_linear())
@pytest.mark.slow
def test_every_method_leaves_its_results(method: Method, recipe: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rank = ["--rank", 4] if "a" in method else []
    code, error = recipe(*SHORT, "--method", method.value, "--output", out, *rank)
    assert code == 0, error
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["steps"], metrics["train_examples"], metrics["left_out"]) == (6, 24, 0)
    assert (metrics["test_meanings"], metrics["test_references"]) == (5, 10)
    assert 0 <= metrics["bleu"] <= 100 and metrics["loss"] > 0
    assert {"nist", "meteor_stem", "rouge_l", "cider"} <= metrics.keys()
    written = json.loads((out / "generations.json").read_text())
    assert [len(entry["references"]) for entry in written] == [2] * 5
    page = (out / "report.html").read_text()
    assert "What the model wrote" in page and written[0]["references"][0] in page
    assert not (out / "checkpoints").exists() and trained(out)


def test_a_method_that_trains_only_a_head_is_refused(recipe: Call, tmp_path: Path) -> None:
    code, error = recipe(*SHORT, "--method", "linear", "--output", tmp_path / "out")
    told = "error: --method linear would train nothing: GPT2LMHeadModel has no head; "
    assert (code, error) == (2, f"{told}uora, vera, vera-peft, lora and full train it")


@pytest.mark.slow
def test_a_llama_works_too(recipe: Call, tmp_path: Path) -> None:
    model = write_model(tmp_path / "llama", llama=True)
    assert recipe(*SHORT, *FIRES, "--output", tmp_path / "out", model=model) == (0, "")


@pytest.mark.parametrize("words", [FIRES, ("--method", "lora", "--rank", 2)], ids=["uora", "lora"])
@pytest.mark.slow
def test_resuming_ends_at_the_same_weights(words: tuple, recipe: Call, tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert recipe(*SHORT, *words, "--output", whole)[0] == 0
    assert recipe(*SHORT, *words, "--output", pieces, "--max-steps", 2)[0] == 0
    assert not (pieces / "metrics.json").exists()
    assert recipe(*SHORT, *words, "--output", pieces, "--resume")[0] == 0
    left, right = trained(whole), trained(pieces)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert (whole / "generations.json").read_text() == (pieces / "generations.json").read_text()
    if words is FIRES:
        assert json.loads((whole / "metrics.json").read_text())["firings"] > 0


@pytest.mark.slow
def test_the_saved_adapter_writes_what_was_measured(recipe: Call, backbone: Path, tmp_path: Path) -> None:
    assert recipe(*SHORT, *FIRES, "--output", tmp_path / "out")[0] == 0
    model = uora.load(GPT2LMHeadModel.from_pretrained(backbone), tmp_path / "out" / "adapter")
    written = json.loads((tmp_path / "out" / "generations.json").read_text())
    tokenizer = e2e_nlg.load_tokenizer(str(backbone))
    prompts = [e2e_nlg.prompt_ids(entry["text"], tokenizer) for entry in written]
    again = e2e_nlg.generate(model, prompts, tokenizer, e2e_nlg.Options(beams=2, max_new_tokens=6, generate_batch=2))
    assert again == [entry["written"] for entry in written]
    predictor = uora.load_predictor(tmp_path / "out" / "adapter", device="cpu")
    found = predictor([entry["text"] for entry in written], batch=2)
    assert [one.answer for one in found] == again and predictor.classes == ()


def test_the_loss_is_on_the_reference_alone(backbone: Path) -> None:
    tokenizer = e2e_nlg.load_tokenizer(str(backbone))
    rows, left_out = e2e_nlg.encode([("name : Blue Spice", "Blue Spice is a pub .")], tokenizer, 96, "data")
    row = rows[0]
    assert tokenizer.decode(row["input_ids"]) == f"name : Blue Spice {END} Blue Spice is a pub . {END}"
    assert row["labels"] == [-100] * 5 + row["input_ids"][5:] and left_out == 0


def test_meanings_are_written_out_as_in_the_lora_paper() -> None:
    meaning = "name[The Punter], eatType[pub], priceRange[£20-25], customer rating[5 out of 5], familyFriendly[no]"
    assert e2e_nlg.linearise(meaning) == (
        "name : The Punter | Type : pub | price : £20-25 | customer rating : 5 out of 5 | family friendly : no"
    )


def test_what_stands_in_the_prompt_may_be_written_again() -> None:
    (rule,), prompt = no_repeats(2, prompt=3), [5, 6, 7]
    scores = torch.zeros(1, 9)
    assert not rule(torch.tensor([[*prompt, 5]]), scores).isinf().any()  # 5 6 stands in the prompt only
    assert rule(torch.tensor([[*prompt, 5, 6, 5]]), scores).isinf().nonzero().tolist() == [[0, 6]]


def test_padding_does_not_change_what_is_written(backbone: Path) -> None:
    model, tokenizer = GPT2LMHeadModel.from_pretrained(backbone), e2e_nlg.load_tokenizer(str(backbone))
    prompts = [
        e2e_nlg.prompt_ids(t, tokenizer) for t in ("name : Old Mill", "name : Red Olive | Type : pub | food : Indian")
    ]
    alone, together = (
        e2e_nlg.generate(model, prompts, tokenizer, e2e_nlg.Options(beams=3, max_new_tokens=8, generate_batch=size))
        for size in (1, 2)
    )
    assert alone == together


@pytest.mark.slow
def test_a_tokenizer_without_padding_token_pads_with_its_end(recipe: Call, backbone: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(backbone, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).pad_token is None
    assert recipe(*SHORT, "--method", "bitfit", "--output", tmp_path / "out", model=model) == (0, "")
    tokenizer.eos_token, tokenizer.pad_token = None, "[PAD]"
    tokenizer.save_pretrained(model)
    code, error = recipe(*SHORT, "--output", tmp_path / "other", model=model)
    assert code == 2 and error.endswith("has no end token, so no text would ever end; set one")


@pytest.mark.slow
def test_texts_that_are_too_long_are_left_out_or_refused(recipe: Call, tmp_path: Path) -> None:
    assert recipe(*SHORT, "--method", "bitfit", "--output", tmp_path / "out", "--max-length", 50) == (0, "")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 0 < metrics["left_out"] < 24 and metrics["left_out"] + metrics["train_examples"] == 24
    code, error = recipe(*SHORT, "--max-length", 10)
    assert code == 2 and "are longer than 10 tokens, the shortest has" in error
    code, error = recipe(*SHORT, "--max-length", 200)
    assert (code, error) == (2, "error: --max-length 200 is more than the 96 positions of gpt2")
    code, error = recipe(*SHORT, "--max-new-tokens", 90)
    assert code == 2 and "with --max-new-tokens 90 that is more than the model's 96 positions" in error


@pytest.mark.slow
def test_another_split_stands_in_for_a_missing_training_file(recipe: Call, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(data / "trainset.csv", folder / "devset.csv")
    shutil.copy(data / "testset_w_refs.csv", folder)
    (folder / "testset.csv").write_text('mr\n"name[Blue Spice]"\n')  # of the challenge: no references
    code, error = recipe(*SHORT, data=folder)
    assert code == 2 and "no train file in" in error and "which holds devset.csv, testset.csv" in error
    assert error.endswith("--train-split validation trains on the development set")
    words = ("--train-split", "validation", "--method", "bitfit", "--meanings", 3, "--examples", 10)
    assert recipe(*SHORT, *words, "--output", tmp_path / "out", data=folder) == (0, "")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["test_meanings"], metrics["train_examples"]) == (3, 10)


FILES = {
    "text,summary\na,b\n": "has no column 'mr', 'ref'; it has 'text', 'summary'",
    "mr,ref\n": "trainset.csv has no rows",
    "": "trainset.csv cannot be read: No columns to parse from file",
    'mr,ref\n"name[A]","A."\n"a pub",A.\n': "row 2 of the train split of",
    'mr,ref\n"name[A]",\n': "has an empty ref",
}


@pytest.mark.parametrize("content", FILES)
def test_files_in_another_form_are_refused(content: str, recipe: Call, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "trainset.csv").write_text(content)
    code, error = recipe(*SHORT, data=tmp_path / "data")
    assert code == 2 and FILES[content] in error


def test_a_single_file_or_split_is_not_trained_on_and_measured(recipe: Call, data: Path) -> None:
    for words, source in (((), data / "trainset.csv"), (("--train-split", "test"), data)):
        code, error = recipe(*SHORT, *words, data=source)
        assert code == 2 and "would be trained on and measured alike" in error


def test_without_network_it_says_what_to_do(recipe: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise OSError("no address")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, error = recipe(*SHORT, data="tuetschek/nothing-of-this-name")
    assert code == 2 and "no data set 'tuetschek/nothing-of-this-name'" in error and "--demo" in error
    code, error = recipe(*SHORT, model="nobody/no-such-model")
    assert code == 2 and "no tokenizer 'nobody/no-such-model'" in error
