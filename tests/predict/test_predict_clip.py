"""CLIP: classes told apart by their prompts, those of the adapter and any others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common.vision_language import demo
from conftest import wake
from PIL import Image

import uora_vision as uora
from uora_vision.__main__ import main
from uora_vision.predict.dual import Dual, fill, load_dual, logits

NAMES = ["five", "six", "seven"]


class Run:
    def __init__(self, folder: Path) -> None:
        self.adapter, self.photos = folder / "run" / "adapter", folder / "photos"
        with torch.random.fork_rng():
            demo.save_untrained(folder / "base", 0)
        self.dual: Dual = load_dual(str(folder / "base")).eval()
        wake(uora.inject(self.dual.model, rank=4), 2.0)
        about = {
            "task": "zero-shot-image-classification", "model": "open_clip/local-dir:../../base",
            "template": demo.TEMPLATE, "prompts": fill(demo.TEMPLATE, NAMES), **self.dual.form.config(),
        }  # fmt: skip
        uora.save(self.dual.model, self.adapter, labels=NAMES, preprocessing=about)
        self.photos.mkdir()
        chance = np.random.default_rng(0)
        for number in range(4):
            Image.fromarray(chance.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(self.photos / f"{number}.png")
        self.files = sorted(self.photos.iterdir())

    def wanted(self, path: Path, names: list[str], base: bool = False) -> torch.Tensor:
        form, dual = self.dual.form, self.dual
        x = torch.tensor((np.asarray(Image.open(path)) / 255 - form.mean) / form.std, dtype=torch.float32)
        tokens = dual.tokenize(fill(demo.TEMPLATE, names))
        with torch.no_grad():
            if not base:
                return logits(*dual(x.permute(2, 0, 1)[None], tokens)).softmax(1)[0]
            with uora.disabled(dual.model):
                return logits(*dual(x.permute(2, 0, 1)[None], tokens)).softmax(1)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("clip"))


def test_classes_of_the_adapter_and_others_by_their_prompts(made: Run) -> None:
    predictor = uora.load_predictor(made.adapter, device="cpu")
    assert predictor.classes == tuple(NAMES)
    for path, one in zip(made.files, predictor(made.files, embeddings=True), strict=True):
        torch.testing.assert_close(one.probabilities, made.wanted(path, NAMES), atol=1e-5, rtol=0)
        assert one.embedding.norm() == pytest.approx(1, abs=1e-5)
    others = uora.load_predictor(made.adapter, classes=["one", "two"], device="cpu")
    found = others(made.files[0])
    torch.testing.assert_close(found.probabilities, made.wanted(made.files[0], ["one", "two"]), atol=1e-5, rtol=0)
    assert found.answer in ("one", "two")


def test_the_command_compares_with_the_base_and_its_own_texts(made: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["predict", str(made.photos), "--adapter", str(made.adapter), "--compare", "--output", str(out),
                 "--device", "cpu"]) == 0  # fmt: skip
    for path, row in zip(made.files, json.loads(out.read_text()), strict=True):
        adapted, base = made.wanted(path, NAMES), made.wanted(path, NAMES, base=True)
        assert row["class"] == NAMES[int(adapted.argmax())]
        assert row["probability"] == pytest.approx(adapted.max().item(), abs=1e-5)
        assert row["base_probability"] == pytest.approx(base.max().item(), abs=1e-5)
        assert abs(adapted.max() - base.max()) > 1e-4


def test_it_needs_a_name_and_says_what_is_there(made: Run, capsys: Any) -> None:
    with pytest.raises(uora.ConfigError, match="give its name"):
        uora.load_predictor(made.adapter, model=torch.nn.Linear(1, 1))
    with pytest.raises(uora.ConfigError, match="open_clip has no model 'ViT-Z-1'"):
        uora.load_predictor(made.adapter, model="open_clip/ViT-Z-1", checkpoint="openai")


def test_features_are_those_of_the_image(made: Run, tmp_path: Path) -> None:
    rows = [f"{path},{label}" for path, label in zip(made.files, "abab", strict=True)]
    table, out = tmp_path / "a.csv", tmp_path / "f.npz"
    table.write_text("\n".join(["path,label", *rows]))
    words = ["features", str(table), "--adapter", str(made.adapter), "--held-out", "0.5", "--output", str(out)]
    assert main([*words, "--device", "cpu"]) == 0
    found = np.load(out)
    x = torch.stack([torch.tensor((np.asarray(Image.open(path)) / 255 - made.dual.form.mean) / made.dual.form.std)
                     for path in made.files]).float().permute(0, 3, 1, 2)  # fmt: skip
    with torch.no_grad():
        np.testing.assert_allclose(found["after"], made.dual.encode_image(x), atol=1e-5)
        with uora.disabled(made.dual.model):
            np.testing.assert_allclose(found["before"], made.dual.encode_image(x), atol=1e-5)
    assert np.abs(found["after"] - found["before"]).max() > 0.05
