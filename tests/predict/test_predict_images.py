"""`load_predictor` and `uora predict` on images: one tiny adapter, saved once."""

from __future__ import annotations

import csv
import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from predicting import FORM, NAMES, SIZES, Run

import uora_vision as uora
from uora_vision.__main__ import main
from uora_vision.predict import predictor as predictors
from uora_vision.predict import results
from uora_vision.predict.tasks import ImageClassification
from uora_vision.storage.folder import read_folder
from uora_vision.storage.hub import card


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("predict"))


@pytest.fixture
def predict(made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Callable[..., Any]]:
    """Runs the command: the exit code, what it said on stdout, and on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object, adapter: Path = made.adapter) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["predict", *map(str, words), "--adapter", str(adapter), "--device", "cpu"])
        return (code, *capsys.readouterr())

    yield call


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_call_loads_base_and_adapter_and_predicts_what_the_model_computes(made: Run) -> None:
    predictor = uora.load_predictor(made.adapter, device="cpu")
    assert predictor.classes == tuple(NAMES) and predictor.name == "image-classification"
    found = predictor(made.files, batch=4, embeddings=True)
    for path, one in zip(made.files, found, strict=True):
        torch.testing.assert_close(one.probabilities, made.wanted(path), atol=2e-3, rtol=0)
        assert one.answer == NAMES[int(one.probabilities.argmax())] and one.embedding.shape == (32,)
        shares = one.embedding @ made.model.head.weight.T + made.model.head.bias
        torch.testing.assert_close(shares.softmax(0), one.probabilities, atol=1e-5, rtol=0)
    assert len({one.answer for one in found}) > 1
    assert found[0].top(9)[0][0] == found[0].answer and len(found[0].top(9)) == 3


def test_an_image_may_be_a_path_bytes_pixels_or_of_pil(made: Run) -> None:
    predictor, path = uora.load_predictor(made.adapter, device="cpu"), made.files[0]
    with Image.open(path) as image:
        forms = [str(path), path, path.read_bytes(), np.asarray(image), image.copy()]
    first, *others = (predictor(form).probabilities for form in forms)
    assert all(torch.equal(first, other) for other in others)
    for wrong in (3.0, np.zeros((4, 4), dtype=np.uint8), np.zeros((4, 4, 3))):
        with pytest.raises(uora.DataError, match=r"got|not float"):
            predictor(wrong)


def test_a_second_save_keeps_classes_and_preprocessing(made: Run, tmp_path: Path) -> None:
    base = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SIZES)
    again = uora.save(uora.load(base, made.adapter, check_base=False), tmp_path / "again")
    assert read_folder(again).about == read_folder(made.adapter).about
    uora.save(base, tmp_path / "named", labels=("x", "y", "z"))
    about = read_folder(tmp_path / "named").about
    assert about["labels"] == ["x", "y", "z"] and about["preprocessing"]["crop_pct"] == 0.8


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_the_result_has_a_row_for_each_image(
    ending: str, made: Run, predict: Callable[..., Any], tmp_path: Path
) -> None:
    code, said, _ = predict(made.photos, "--top", 2, "--embeddings", "--compare", "--output", f"out.{ending}")
    assert code == 0 and "10 predictions" in said
    if ending == "csv":
        found: list[Any] = rows("out.csv")
    elif ending == "json":
        found = json.loads(Path("out.json").read_text())
    else:
        import pandas as pd

        found = pd.read_parquet("out.parquet").to_dict("records")
    assert [row["path"] for row in found] == [str(path) for path in made.files]
    for path, row in zip(made.files, found, strict=True):
        shares = made.wanted(path).sort(descending=True)
        assert [row["class"], row["class_2"]] == [NAMES[i] for i in shares.indices[:2]]
        assert float(row["probability"]) == pytest.approx(shares.values[0].item(), abs=2e-3)
        assert len(json.loads(row["embedding"]) if ending == "csv" else row["embedding"]) == 32
        assert row["base_class"] in NAMES
    assert [row["base_probability"] for row in found] != [row["probability"] for row in found]


def test_images_are_prepared_by_timm_unless_it_says_otherwise(made: Run, tmp_path: Path) -> None:
    base = timm.create_model(f"local-dir:{made.base}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(base) | {"input_size": (3, *base.patch_embed.img_size)}
    assert config["crop_pct"] < 1 and config["interpolation"] == "bicubic"
    uora.inject(base, rank=4)
    for preprocessing in ({}, dict(config)):  # one that says nothing has what the model has
        uora.save(base, tmp_path / "a", labels=list("abcdefg"), preprocessing=preprocessing)
        predictor = uora.load_predictor(tmp_path / "a", model=f"timm/local-dir:{made.base}", device="cpu")
        with Image.open(made.files[0]) as image:
            x = timm.data.create_transform(**config, is_training=False)(image)
        assert torch.equal(predictor.task.read(made.files[0]), x)


def test_without_the_library_that_resizes_it_says_what_to_install(
    made: Run, predict: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "albumentations", None)
    code, _, said = predict(made.photos)
    assert code == 2 and "pip install albumentations" in said and said.count("\n") == 1


def test_compare_is_the_head_without_the_update(made: Run) -> None:
    predictor = uora.load_predictor(made.adapter, device="cpu", merge=False)
    inputs = [predictor.task.read(made.files[0])]
    adapted, base = predictor.predict(inputs), predictor.predict(inputs, base=True)
    assert torch.equal(predictor.predict(inputs)[0].probabilities, adapted[0].probabilities)
    plain = timm.create_model(f"local-dir:{made.base}", pretrained=True).eval()
    plain.reset_classifier(3)
    plain.head.load_state_dict(made.model.head.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(base[0].probabilities, plain(torch.stack(inputs)).softmax(1)[0])
    assert not torch.allclose(base[0].probabilities, adapted[0].probabilities, atol=1e-3)
    with pytest.raises(uora.StateError, match="merge=False"):
        uora.load_predictor(made.adapter, device="cpu").predict(inputs, base=True)


def test_a_run_of_another_method_is_told(made: Run, predict: Callable[..., Any]) -> None:
    Path("lora").mkdir()
    Path("lora/trained.safetensors").touch()
    code, _, said = predict(made.photos, adapter=Path("lora"))
    assert code == 2 and "of another method than uora and vera" in said and said.count("\n") == 1


def test_its_card_and_inspect_tell_classes_and_task(made: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = card(read_folder(made.adapter), "me/ants")
    assert "| task | image-classification |" in text and "| classes | 3: ant, bee, cat |" in text
    assert 'load_predictor("me/ants", model=...)' in text  # its base was in a folder of this machine
    assert main(["inspect", str(made.adapter)]) == 0
    text = capsys.readouterr().out
    assert "task       image-classification\n" in text and "classes    3: ant, bee, cat\n" in text
    assert main(["inspect", str(made.adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == NAMES


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bytes(
    made: Run, predict: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (made.photos, "--batch", 3, "--embeddings")
    assert predict(*words, "--output", "whole.csv")[0] == 0
    compute = predictors.Predictor.predict
    computed: list[int] = []

    def stopping(self: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(len(inputs))
        return compute(self, inputs, *more, **options)

    monkeypatch.setattr(predictors.Predictor, "predict", stopping)
    code, _, said = predict(*words, "--output", "pieces.csv")
    assert code == 130 and "the same command goes on" in said and not Path("pieces.csv").exists()
    partial = Path("pieces.csv.partial")
    partial.write_bytes(partial.read_bytes() + b'{"batch": "half a li')
    code, _, said = predict(*words, "--top", 2, "--output", "pieces.csv")
    assert code == 2 and "unfinished result of another" in said
    computed.clear()
    computed.append(-100)  # two more may be computed before it would stop
    assert predict(*words, "--output", "pieces.csv")[0] == 130 and computed == [-100, 3]
    computed[:] = [0]
    assert predict(*words, "--output", "pieces.csv")[0] == 0 and computed == [0, 1]
    assert Path("pieces.csv").read_bytes() == Path("whole.csv").read_bytes() and not partial.exists()


def test_a_run_goes_on_from_the_first_batch_that_changed(
    made: Run, predict: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, compute = Path(shutil.copytree(made.photos, "photos")), predictors.Predictor.predict
    computed: list[int] = []

    def stopping(self: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(len(inputs))
        return compute(self, inputs, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(predictors.Predictor, "predict", stopping)
        assert predict(photos, "--batch", 3)[0] == 130
    for path in sorted(photos.rglob("*.png"))[3:4]:  # of the second batch
        Image.new("RGB", (50, 50), "red").save(path)
    assert predict(photos, "--batch", 3)[0] == 0
    assert predict(photos, "--batch", 3, "--output", "whole.csv")[0] == 0
    assert Path("predictions.csv").read_bytes() == Path("whole.csv").read_bytes()


def test_a_full_disk_is_one_line_and_what_is_done_is_kept(
    made: Run, predict: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    append, count = results._append, iter(range(9))

    def full(*given: Any) -> None:
        if next(count) == 1:
            raise OSError(28, "No space left on device")
        append(*given)

    monkeypatch.setattr(results, "_append", full)
    code, _, said = predict(made.photos, "--batch", 4)
    assert code == 2 and "cannot be written: no space left on device. Make room" in said and said.count("\n") == 1
    assert len(Path("predictions.csv.partial").read_bytes().splitlines()) == 2
    assert predict(made.photos, "--batch", 4)[0] == 0 and len(rows("predictions.csv")) == 10


def test_images_that_cannot_be_read_are_told_and_left_out(made: Run, predict: Callable[..., Any]) -> None:
    photos = Path(shutil.copytree(made.photos, "photos"))
    for name in ("broken.jpg", "._a.png", ".hidden/b.png", "notes.txt"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"no image")
    code, said, errors = predict(photos)
    assert code == 0 and "10 predictions, 1 could not be read" in said
    assert errors.startswith("skipped: cannot read photos/broken.jpg: ") and errors.count("\n") == 1
    code, _, errors = predict(photos, "--strict", "--output", "strict.csv")
    assert code == 2 and "cannot read photos/broken.jpg" in errors and not Path("strict.csv").exists()
    code, _, errors = predict(photos / "broken.jpg", "--output", "none.csv")
    assert code == 2 and "none of 1 inputs can be read" in errors and not list(Path().glob("none.csv*"))


def test_an_adapter_of_before_class_names_were(made: Run, predict: Callable[..., Any]) -> None:
    base = timm.create_model(f"local-dir:{made.base}", pretrained=True)
    base.reset_classifier(3)
    old = uora.save(uora.inject(base, rank=4), "old")
    code, _, said = predict(made.photos, adapter=old)
    assert code == 2 and "saved without names of its classes" in said and "--classes FILE" in said
    Path("names.txt").write_text("x\n\ny\nz\n")
    words = (made.photos, "--classes", "names.txt", "--model", f"timm/local-dir:{made.base}")
    assert predict(*words, adapter=old)[0] == 0
    assert {row["class"] for row in rows("predictions.csv")} <= {"x", "y", "z"}
    Path("names.txt").write_text("a\nb\nc\nd\n")
    for asked, adapter, message in (
        (words, old, "names of 4 classes, and the model tells 3 apart"),
        ((made.photos, "--classes", "names.txt"), made.adapter, "4 names of classes were given; the adapter tells 3"),
    ):
        code, _, said = predict(*asked, "--output", "four.csv", adapter=adapter)
        assert code == 2 and message in said


def test_a_head_that_tells_more_apart_than_has_names(made: Run) -> None:
    base = timm.create_model(f"local-dir:{made.base}", pretrained=True)
    with torch.no_grad():
        base.head.bias[5] += 100
    predictor = predictors.Predictor(base.eval(), ImageClassification(base, FORM.config()), "", NAMES, True)
    assert predictor(made.files[0]).answer == "output 5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "nowhere does not exist"),
        (("empty",), "no images in empty"),
        (("texts",), "no images in texts; it holds 1 other files, such as a.txt"),
        (("texts", "--output", "out.xlsx"), "must end with .csv, .json, .parquet"),
        (("texts", "--output", "texts"), "must end with"),
        (("texts", "--output", "there.csv"), "there.csv is there already; --overwrite"),
        (("texts", "--classes", "none.txt"), "--classes none.txt cannot be read"),
        (("texts", "--classes", "there.csv"), "holds no names"),
        (("texts", "--output", "there.csv/out.csv"), "cannot be written: "),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, predict: Callable[..., Any]) -> None:
    Path("empty").mkdir()
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("a")
    Path("there.csv").touch()
    code, _, said = predict(*words)
    assert code == 2 and message in said and said.startswith("error: ") and said.count("\n") == 1, said


def test_without_a_network_it_says_what_to_give(
    made: Run, predict: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    code, _, said = predict(made.photos, "--model", "timm/vit_tiny_patch16_224")
    assert code == 2 and "timm/vit_tiny_patch16_224 cannot be made" in said and "--model" in said
    assert list(Path().iterdir()) == []


def test_a_base_that_is_not_where_the_adapter_says(made: Run, predict: Callable[..., Any]) -> None:
    moved = Path(shutil.copytree(made.adapter, "a/b/moved"))
    code, _, said = predict(made.photos, adapter=moved)
    assert code == 2 and "base cannot be made" in said and "--model" in said
    assert predict(made.photos, "--model", f"timm/local-dir:{made.base}", adapter=moved)[0] == 0
