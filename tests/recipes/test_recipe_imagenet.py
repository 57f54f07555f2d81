"""The recipe for folders of photos: files of many sizes, any timm model, resuming, and what it says to wrong input."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import imagenet_subset
import numpy as np
import pytest
import timm
import torch
from common.command.choices import Augment
from common.data.augment import InputFormat, ModelInput
from common.data.images import load_images
from PIL import Image
from recipe_runs import (
    Call,
    assert_it_redraws_by_uora_alone,
    assert_the_options_reach_uora,
    run,
    trained,
)

import uora_vision as uora

TINY: dict[str, Any] = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FIRES = ("--relative", "--threshold", "0.2", "--lr", "0.05")
SHORT = ("--img-size", 32, "--rank", 8, "--shots", 5, "--epochs", 2, "--batch", 4, "--quiet")  # 2 x 4 steps


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of one colour each; no two photos have one size."""
    folder, chance = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = chance.integers(0, 200, (*chance.integers(70, 130, 2), 3), dtype=np.uint8)
                pixels[..., channel] = 255
                Image.fromarray(pixels).save(folder / split / name / f"{index}.jpg")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random ViT for images of 48 pixels, in the form of a pretrained one."""
    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY)
    model.pretrained_cfg.update(mean=[0.5] * 3, std=[0.25] * 3, input_size=(3, 48, 48), crop_pct=0.8)
    timm.models.save_for_hf(model, folder, model_config={"model_args": TINY}, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture
def recipe(photos: Path, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the recipe in this process; gives the exit code and what stood on stderr."""

    def call(*words: object, data: object = photos, model: str = tiny) -> tuple[int, str]:
        capsys.readouterr()
        code = run(imagenet_subset, ("--data", data, "--model", model, *words), monkeypatch)
        return code, capsys.readouterr().err

    return call


def test_the_options_reach_the_adapter_and_its_reinitialisation(recipe: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_the_options_reach_uora(recipe, monkeypatch, *SHORT)


@pytest.mark.slow
def test_it_redraws_by_uora_alone(recipe: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_it_redraws_by_uora_alone(recipe, monkeypatch, *SHORT)


@pytest.mark.slow
def test_a_run_leaves_its_results_and_a_resumed_one_the_same(recipe: Call, tiny: str, tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert recipe(*SHORT, *FIRES, "--output", whole) == (0, "")
    metrics = json.loads((whole / "metrics.json").read_text())
    assert (metrics["train_images"], metrics["test_images"], metrics["classes"]) == (15, 12, 3)
    assert metrics["trained_parameters_without_head"] == 2 * 2 * (32 + 8)  # b and d of q and v in two blocks
    assert metrics["firings"] > 0 and "<html" in (whole / "report.html").read_text()
    model = timm.create_model(tiny, pretrained=True, num_classes=3, img_size=32)
    uora.load(model, whole / "adapter")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert recipe(*SHORT, *FIRES, "--output", pieces, "--max-steps", 3)[0] == 0
    assert recipe(*SHORT, *FIRES, "--output", pieces, "--resume") == (0, "")
    first, second = trained(whole), trained(pieces)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_convolutional_network_reads_any_size(recipe: Call, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(model, tmp_path / "net", safe_serialization=True)
    words = (*SHORT, "--method", "linear", "--output", tmp_path / "out", "--max-steps", 1)
    assert recipe(*words, model=f"local-dir:{tmp_path / 'net'}") == (0, "")


@pytest.mark.parametrize("augment", list(Augment))
@pytest.mark.parametrize("size", [(40, 90), (300, 100)])
def test_large_images_are_brought_to_the_model_s_size(augment: Augment, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    prepare = ModelInput(InputFormat((32, 32), (0.5,) * 3, (0.25,) * 3, crop=0.875), augment)
    one, again, other = prepare(image, (1, 2)), prepare(image, (1, 2)), prepare(image, (1, 3))
    assert one.shape == (3, 32, 32) and torch.equal(one, again)
    assert torch.equal(one, other) == (augment is Augment.none)


def test_a_test_image_is_cropped_as_timm_crops_it() -> None:
    ramp = np.linspace(0, 255, 120)
    image = np.stack([*np.broadcast_arrays(ramp[:, None], ramp[None, :]), np.zeros((120, 120))], -1).astype(np.uint8)
    form = InputFormat((32, 32), (0.5,) * 3, (0.25,) * 3, "bicubic", crop=0.8)
    transform = timm.data.create_transform(
        (3, 32, 32), interpolation="bicubic", mean=form.mean, std=form.std, crop_pct=form.crop
    )
    want = transform(Image.fromarray(image))
    assert (ModelInput(form)(image) - want).abs().max() < 0.1  # of 4: the two resize a little differently
    assert (ModelInput(dataclasses.replace(form, crop=1.0))(image) - want).abs().max() > 0.3


def test_broken_photos_and_folders_are_named_in_one_line(recipe: Call, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad" / "train" / "cat").mkdir(parents=True)
    broken = tmp_path / "bad" / "train" / "cat" / "1.jpg"
    broken.write_bytes((photos / "train" / "red" / "0.jpg").read_bytes()[:10])
    (tmp_path / "none" / "train" / "cat").mkdir(parents=True)
    found = {
        tmp_path / "empty": "holds nothing",
        tmp_path / "bad": f"cannot read {broken}",
        tmp_path / "none": "expected one folder per class",
        tmp_path / "x" / "y.jpg": "y.jpg",
    }
    for data, expected in found.items():
        code, said = recipe(*SHORT, "--output", tmp_path / "out", data=data)
        assert (code, expected in said, len(said.splitlines())) == (2, True, 1), said


@pytest.mark.parametrize("data", ["cifar100", "food101", "flowers102", "resisc45", "timm:torch/svhn", "timm:hfds/a/b"])
def test_data_of_the_papers_without_a_network(
    data: str, recipe: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    def no_name(*_: Any, **__: Any) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    code, said = recipe(*SHORT, "--output", tmp_path / "out", data=data)
    assert (code, "--demo" in said, len(said.splitlines())) == (2, True, 1), said


def test_data_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a data set in memory in the place of a downloaded one."""
    images = [(Image.new("L", (9, 7 + i), i), i % 3) for i in range(6)]

    def create(name: str, split: str, **_: Any) -> list[Any]:
        if (name, split) in (("torch/things", "train"), ("torch/things", "validation")):
            return images
        raise ValueError(f"no split {split}")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(timm.data, "create_dataset", create)
    found = load_images("timm:torch/things", "test").few_shot(1, 0)
    assert found.names == ("0", "1", "2") and sorted(found.labels) == [0, 1, 2]
    assert found.read(1).shape[1:] == (9, 3)
