"""The recipe as a stranger runs it: every method, resuming to the last bit, and what it says to wrong input."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import vit_cifar100
from common.command.choices import Method
from common.training import checkpoint
from recipe_runs import (
    Call,
    assert_it_redraws_by_uora_alone,
    assert_the_options_reach_uora,
    run,
    trained,
)
from rich.console import Console
from tiny_vit import TINY, save_tiny_vit

import uora_vision as uora

SCRIPT = Path(vit_cifar100.__file__)
FIRES = ("--relative", "--threshold", "0.2", "--lr", "0.05")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vit(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the recipe in this process on the digits; gives the exit code and what stood on stderr."""

    def call(*words: object, data: str = "digits", model: str | None = None) -> tuple[int, str]:
        capsys.readouterr()
        code = run(vit_cifar100, ("--data", data, "--model", model or tiny, *words), monkeypatch)
        return code, capsys.readouterr().err

    return call


SHORT = ("--classes", "5-9", "--shots", "6", "--epochs", "2", "--batch", "8", "--quiet")  # 2 x 4 steps


def test_the_options_reach_the_adapter_and_its_reinitialisation(recipe: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_the_options_reach_uora(recipe, monkeypatch, *SHORT)


@pytest.mark.slow
def test_it_redraws_by_uora_alone(recipe: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_it_redraws_by_uora_alone(recipe, monkeypatch, *SHORT)


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, log of redraws and history are equal to the last bit."""
    left, right = trained(first), trained(second)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    histories = [json.loads((folder / "history.json").read_text()) for folder in (first, second)]
    for entry in histories[0] + histories[1]:
        del entry["seconds"]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.slow
def test_every_method_leaves_its_results(method: Method, recipe: Call, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, _ = recipe(*SHORT, "--method", method.value, "--output", folder, *(["--rank", 4] if "a" in method else []))
    assert code == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["steps"] == 8
    assert (metrics["train_images"], metrics["classes"]) == (30, 5)
    assert metrics["trained_parameters"] - metrics["trained_parameters_without_head"] == 5 * 32 + 5
    assert metrics["seconds_per_step"] > 0
    assert metrics["peak_memory_bytes"] > 2**20
    assert metrics["config"]["method"] == method.value
    assert metrics["config"]["lr"] > 0
    assert {"torch", "timm", "python"} <= metrics["versions"].keys()
    assert "<html" in (folder / "report.html").read_text()
    assert any((folder / "tensorboard").iterdir())
    assert not (folder / "checkpoint.pt").exists()
    assert trained(folder)


@pytest.mark.slow
def test_the_saved_adapter_gives_the_measured_accuracy(recipe: Call, tiny: str, tmp_path: Path) -> None:
    from common.command.choices import Domain
    from common.data.augment import DomainShift, ModelInput
    from common.data.images import load_images
    from common.data.loading import Images, eval_loader
    from common.vision.backbone import create_backbone, input_format

    folder = tmp_path / "out"
    assert recipe(*SHORT, "--rank", 4, "--output", folder, "--domain", "invert", *FIRES)[0] == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["firings"] > 0
    model = uora.load(create_backbone(tiny, 5), folder / "adapter").eval()
    data = load_images("digits", "test", [5, 6, 7, 8, 9])
    images = Images(data, DomainShift(Domain.invert), ModelInput(input_format(model)))
    hits = sum((model(x).argmax(1) == y).sum().item() for x, y in eval_loader(images, 64, 0))
    assert hits / len(data) == metrics["accuracy"]
    predictor = uora.load_predictor(folder / "adapter", device="cpu")
    found = predictor([images.picture(index) for index in range(len(data))])
    assert sum(one.answer == data.names[y] for one, y in zip(found, data.labels, strict=True)) == hits
    assert "uora predict FOLDER_OR_IMAGES" in (folder / "report.html").read_text()


RUNS = {
    "uora shared": ("--rank", 8, *FIRES),
    "uora layer": ("--rank", 8, "--reinit", "layer", *FIRES),
    "uora never": ("--rank", 8, "--reinit", "never"),
    "uora informed": ("--rank", 8, "--reinit", "informed"),
    "uora svd": ("--rank", 8, "--init", "svd"),
    "lora": ("--method", "lora", "--rank", 2),
    "vera of peft": ("--method", "vera-peft", "--rank", 4),
    "full, another optimizer": ("--method", "full", "--opt", "lamb", "--weight-decay", 0.1),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_resuming_ends_at_the_same_weights(name: str, recipe: Call, tmp_path: Path) -> None:
    words, whole, pieces = (*SHORT, *RUNS[name]), tmp_path / "whole", tmp_path / "pieces"
    assert recipe(*words, "--output", whole)[0] == 0
    assert recipe(*words, "--output", pieces, "--max-steps", 3)[0] == 0  # in the middle of the first epoch
    assert not (pieces / "metrics.json").exists()
    assert recipe(*words, "--output", pieces, "--max-steps", 4, "--resume")[0] == 0  # at its end
    assert recipe(*words, "--output", pieces, "--resume")[0] == 0
    assert_same_run(whole, pieces)


@pytest.mark.slow
def test_dropout_in_the_model_is_resumed_exactly(recipe: Call, tmp_path: Path) -> None:
    folder = tmp_path / "dropping"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY)
    model.pretrained_cfg.update(mean=[0.5] * 3, std=[0.25] * 3, input_size=(3, 16, 16))
    arguments = {**TINY, "proj_drop_rate": 0.2, "drop_path_rate": 0.2}
    timm.models.save_for_hf(model, folder, model_config={"model_args": arguments}, safe_serialization=True)
    words, name = (*SHORT, "--method", "bitfit"), f"local-dir:{folder}"
    assert recipe(*words, "--output", tmp_path / "whole", model=name)[0] == 0
    assert recipe(*words, "--output", tmp_path / "pieces", "--max-steps", 5, model=name)[0] == 0
    assert recipe(*words, "--output", tmp_path / "pieces", "--resume", model=name)[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.slow
def test_a_failed_write_leaves_a_checkpoint_to_resume_from(recipe: Call, tmp_path: Path, monkeypatch: Any) -> None:
    words = (*SHORT, "--rank", 8, *FIRES, "--checkpoint-every", 2)
    assert recipe(*words, "--output", tmp_path / "whole")[0] == 0
    replace, writes = os.replace, []

    def killed_in_the_third_write(source: Any, target: Any) -> None:
        writes.extend([target] if Path(target).name == "checkpoint.pt" else [])
        if len(writes) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", killed_in_the_third_write)
        assert recipe(*words, "--output", tmp_path / "pieces")[0] == 130
    assert checkpoint.read_checkpoint(tmp_path / "pieces" / "checkpoint.pt")["progress"]["step"] == 4
    assert recipe(*words, "--output", tmp_path / "pieces", "--resume")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_an_interrupt_leaves_a_checkpoint_and_says_how_to_go_on(
    sent: signal.Signals, recipe: Call, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from common.training import loop as training

    step = training.Run.step

    def interrupted(run: Any, *batch: Any) -> None:
        step(run, *batch)
        if run.progress.step == 2:
            os.kill(os.getpid(), sent)

    words = (*SHORT, "--rank", 8)
    assert recipe(*words, "--output", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "step", interrupted)
        patch.setattr(sys, "argv", ["vit_cifar100.py"])
        said: list[str] = []
        patch.setattr(Console, "print", lambda self, text, **_: said.append(str(text)))
        assert recipe(*words, "--output", tmp_path / "pieces")[0] == 130
    assert "stopped after step 2 (interrupted)" in said[-1]
    assert said[-1].endswith("--resume")
    assert recipe(*words, "--output", tmp_path / "pieces", "--resume")[0] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_run_is_resumed_to_the_same_weights(recipe: Call, tiny: str, tmp_path: Path) -> None:
    words = ("--classes", "5-9", "--shots", "20", "--epochs", "5", "--batch", "10", "--quiet", "--rank", "8", *FIRES,
             "--eval-every", "5", "--checkpoint-every", "3")  # fmt: skip
    killed, path = tmp_path / "killed", tmp_path / "killed" / "checkpoint.pt"
    line = [sys.executable, str(SCRIPT), "--data", "digits", "--model", tiny, *words, "--output", str(killed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(line, env=environment) as child:
        while not path.exists() and child.poll() is None:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
    assert not (killed / "metrics.json").exists()
    assert 0 < checkpoint.read_checkpoint(path)["progress"]["step"] < 50
    assert recipe(*words, "--output", killed, "--resume")[0] == 0
    assert recipe(*words, "--output", tmp_path / "whole")[0] == 0
    assert_same_run(tmp_path / "whole", killed)


def test_resuming_with_other_options_names_them(recipe: Call, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert recipe(*SHORT, "--method", "linear", "--output", folder, "--max-steps", 2)[0] == 0
    code, said = recipe(*SHORT, "--method", "linear", "--output", folder, "--resume", "--head-lr", 0.5, "--seed", 1)
    assert code == 2
    assert "--head-lr was 0.004, is now 0.5; --seed was 0, is now 1" in said


@pytest.mark.slow
def test_validation_measures_on_held_out_training_images(recipe: Call, tmp_path: Path) -> None:
    words = ("--classes", "5-9", "--epochs", 1, "--method", "linear", "--quiet", "--validation", 0.25)
    assert recipe(*words, "--output", tmp_path)[0] == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["measured_on"] == "validation"
    share = metrics["test_images"] / (metrics["test_images"] + metrics["train_images"])
    assert share == pytest.approx(0.25, abs=0.01)


def test_nan_stops_at_the_step_and_keeps_the_last_checkpoint(recipe: Call, tmp_path: Path) -> None:
    words = (*SHORT, "--method", "full", "--output", tmp_path, "--checkpoint-every", 1, "--clip", 0)
    code, said = recipe(*words, "--lr", 1e30, "--head-lr", 1e30)
    assert code == 2
    assert "the loss is nan at step" in said or "the loss is inf at step" in said
    assert "checkpoint.pt, is from before that" in said
    assert len(said.splitlines()) == 1
    checkpoint.read_checkpoint(tmp_path / "checkpoint.pt")


WRONG = {
    "unknown method": (("--method", "foo"), "'foo' is not one of 'uora', 'vera', 'vera-peft', 'lora'"),
    "class out of range": (("--classes", "5-12"), "no class 10; there are 10"),
    "rank 0": (("--rank", 0), "'--rank': Input should be greater than or equal to 1"),
    "kept head too small": (("--keep-head",), "the data has 10 classes but the head of"),
    "unknown projection": (("--targets", "q_porj"), "no projection matched 'q_porj'; this model has: attn.q (2)"),
    "unknown optimizer": (("--opt", "adamx"), "timm has no optimizer 'adamx'"),
    "unknown option": (("--shot", 3), "--shot"),
    "no epochs": (("--epochs", 0), "--epochs"),
    "odd cadence": (("--checkpoint-every", "soon"), "takes steps such as 500 or minutes such as 10m"),
    "nothing to resume": (("--resume",), "checkpoint.pt, which does not exist"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_give_one_line_and_code_2(name: str, recipe: Call, tmp_path: Path) -> None:
    words, expected = WRONG[name]
    code, said = recipe("--quiet", "--output", tmp_path, *words)
    assert code == 2
    assert expected in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


def test_resume_without_an_output_folder_says_so(recipe: Call) -> None:
    assert "needs --output" in recipe("--resume")[1]


@pytest.mark.slow
def test_a_run_is_not_overwritten(recipe: Call, tmp_path: Path) -> None:
    words = (*SHORT, "--method", "linear", "--output", tmp_path)
    assert recipe(*words, "--max-steps", 1)[0] == 0
    assert "holds an unfinished run (--resume continues it)" in recipe(*words)[1]
    assert recipe(*words, "--resume")[0] == 0
    before = (tmp_path / "metrics.json").read_bytes()
    code, said = recipe(*words, "--seed", 1)
    assert (code, "holds a finished run" in said) == (2, True)
    assert "nothing to resume" in recipe(*words, "--resume")[1]
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_data_that_cannot_be_used_gives_one_line(recipe: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, said = recipe(data=str(tmp_path / "empty"))
    assert (code, "holds nothing" in said, "--demo" in said) == (2, True, True)
    broken = tmp_path / "photos" / "train" / "cat" / "1.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no image")
    code, said = recipe(data=str(tmp_path / "photos"))
    assert (code, f"cannot read {broken}" in said, len(said.splitlines())) == (2, True, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_off_is_named_in_one_line(workers: int, recipe: Call, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            file = tmp_path / "photos" / split / name / "1.png"
            file.parent.mkdir(parents=True)
            Image.fromarray(pixels).save(file)
    file = tmp_path / "photos" / "train" / "dog" / "1.png"
    file.write_bytes(file.read_bytes()[:3000])
    out = tmp_path / "out"
    code, said = recipe(
        "--method", "linear", "--workers", workers, "--quiet", "--output", out, data=str(tmp_path / "photos")
    )
    assert (code, f"cannot read {file}" in said, len(said.splitlines())) == (2, True, 1)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    def no_name(*_: Any, **__: Any) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("data", "model"), [("cifar100", None), ("someone/photos", None), ("digits", "vit_tiny_patch16_224")]
)
@pytest.mark.slow
def test_without_network_it_says_demo_at_once(
    data: str, model: str | None, recipe: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # what asks again waits first
    code, said = recipe(data=data, model=model)
    assert code == 2
    assert "--demo" in said
    assert len(said.splitlines()) == 1
    assert sum(waits) < 5


def test_a_misspelt_model_is_guessed(recipe: Call) -> None:
    code, said = recipe(model="vit_smal_patch16_224")
    assert (code, "did you mean vit_small_patch16_224" in said) == (2, True)
