"""A run goes on with `--resume` after its data or its base model were exchanged under the same name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import glue
import numpy as np
import pytest
import timm
import torch
import vit_cifar100
from common.language import toy
from PIL import Image
from recipe_runs import run
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

Run = Callable[..., tuple[int, str]]
DATA, BASE = "the data are not what the run began with", "the base model has other weights"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    chance = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = chance.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{index}.png")
    return tmp_path / "photos"


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments)
    model.pretrained_cfg.update(mean=[0.5] * 3, std=[0.25] * 3, input_size=(3, 16, 16))
    timm.models.save_for_hf(model, tmp_path / "vit", model_config={"model_args": arguments}, safe_serialization=True)
    return tmp_path / "vit"


def other_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight") and "layer" not in name)  # one value of a base
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def swap(photos: Path) -> None:
    (photos / "train" / "cat").rename(photos / "x")
    (photos / "train" / "dog").rename(photos / "train" / "cat")
    (photos / "x").rename(photos / "train" / "dog")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["folders swapped", "an image less", "an image replaced", "base", "nothing"])
def test_images(
    what: str, photos: Path, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ("--data", photos, "--model", f"local-dir:{vit}", "--rank", 4, "--epochs", 2, "--batch", 4, "--quiet",
             "--output", tmp_path / "out")  # fmt: skip
    assert run(vit_cifar100, (*words, "--max-steps", 1), monkeypatch) == 0
    match what:
        case "folders swapped":
            swap(photos)
        case "an image less":
            (photos / "test" / "cat" / "3.png").unlink()
        case "an image replaced":
            Image.new("RGB", (16, 16)).save(photos / "train" / "cat" / "3.png")
        case "base":
            other_weights(vit)
    capsys.readouterr()
    code = run(vit_cifar100, (*words, "--resume"), monkeypatch)
    said = capsys.readouterr().err
    if what == "nothing":
        assert code == 0, said
    else:
        assert (code, (BASE if what == "base" else DATA) in said, len(said.splitlines())) == (2, True, 1), said


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "base"])
def test_texts(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = tmp_path / "data", tmp_path / "bert"
    toy.write_reviews(data, seed=0, shots=8)
    texts = [text for text, *_ in toy.reviews(slice(None), 300, 0)]
    tokenizer = toy.word_tokenizer(texts, ("[UNK]", "[PAD]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]")
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=24, max_position_embeddings=16)  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    words = ("--data", data, "--model", model, "--rank", 4, "--epochs", 2, "--batch", 8, "--quiet", "--output",
             tmp_path / "out")  # fmt: skip
    assert run(glue, (*words, "--max-steps", 1), monkeypatch) == 0
    assert json.loads((tmp_path / "out" / "inputs.json").read_text()).keys() == {"data", "base"}
    if what == "base":
        other_weights(model)
    else:
        lines = (data / "train.tsv").read_text().splitlines()
        (data / "train.tsv").write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n")
    capsys.readouterr()
    assert run(glue, (*words, "--resume"), monkeypatch) == 2
    assert (BASE if what == "base" else DATA) in capsys.readouterr().err.splitlines()[-1]
