"""Models by name on the command line: found in the sources of the libraries, and nothing waits for a network."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import transformers
from huggingface_hub import constants
from multimodal import MODELS
from timm.models._registry import _deprecated_models
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from uora_vision.__main__ import main
from uora_vision.cli import models
from uora_vision.cli.names import names, resolved


def test_the_names_are_those_that_the_libraries_have() -> None:
    assert names("timm") == {*timm.list_models(), *(name.partition(".")[0] for name in _deprecated_models)}
    assert names("open_clip") == set(open_clip.list_models())
    assert names("transformers") == set(CONFIG_MAPPING_NAMES)


def test_a_name_is_found_where_it_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for given, found in {
        "vit_base_patch16_224": ("timm", "vit_base_patch16_224"),
        "vit_base_patch16_224.augreg_in21k": ("timm", "vit_base_patch16_224.augreg_in21k"),
        "timm/hf-hub:me/model": ("timm", "hf-hub:me/model"),
        "ViT-B-32": ("open_clip", "ViT-B-32"),
        "open_clip/ViT-B/32": ("open_clip", "ViT-B/32"),
        "bert": ("transformers", "bert"),
        "transformers/me/model": ("transformers", "me/model"),
        "mine": ("transformers", "mine"),
        "timm/convnext_base": ("timm", "convnext_base"),
    }.items():
        assert resolved(given) == found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "timm/vit_base_patch16_22",
            "timm has no model 'vit_base_patch16_22'; did you mean timm/vit_base_patch16_224 or",
        ),
        ("vit_base_patch16_225.augreg", "did you mean timm/vit_base_patch16_224 or"),
        ("open_clip/vit-b-23", "open_clip has no model 'vit-b-23'; did you mean open_clip/ViT-B-32 or"),
        ("qwen2_5vl", "did you mean transformers/qwen2_5_vl or"),
        ("bert-base-uncased", "did you mean transformers/bert. Write timm/NAME, open_clip/NAME or transformers/NAME"),
        ("google/vit", "did you mean transformers/vit"),
        ("timm/bert", "timm has no model 'bert'; did you mean transformers/bert?"),
        ("convnext_base", "is in several libraries: write timm/convnext_base or open_clip/convnext_base"),
        ("", "'' is no model of timm, open_clip, transformers. Write"),
    ],
)
def test_what_may_have_been_meant(given: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", given]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network and an empty cache. Gives the hosts that were asked for; whoever waits to ask again fails."""
    hosts: list[str] = []

    def nowhere(host: Any, *_: Any, **__: Any) -> Any:
        hosts.append(str(host))
        raise socket.gaierror(-2, "Name or service not known")

    def wait(seconds: float) -> None:
        raise AssertionError(f"waits for {seconds} s to ask again")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return hosts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "transformers/bert-base-uncased"], "neither a folder nor a model type, and the Hugging Face hub does "
         "not answer; give a folder with its config.json, or a type; did you mean transformers/bert?"),
        (["plan", "transformers/me/it/now"], "is neither a folder nor a model type, and the Hugging Face hub"),
        (["plan", "open_clip/roberta-ViT-B-32"], "configuration of its text tower from roberta-base"),
    ],
)  # fmt: skip
def test_nothing_waits_for_a_hub_that_does_not_answer(
    arguments: list[str], message: str, alone: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ")
    assert len(alone) == 1 and not constants.HF_HUB_OFFLINE


@pytest.mark.slow
def test_types_and_folders_ask_nobody(alone: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.CLIPConfig(**MODELS["clip"]).save_pretrained(tmp_path / "clip")
    assert main(["plan", str(tmp_path / "clip"), "--targets", "vision:attention", "--json", "--rank", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {t["name"]: t["weights"] for t in found["towers"]} == {"vision": 8, "language": 0}
    assert found["config"]["targets"] == ["vision:attention"]
    assert main(["plan", "bert"]) == 0
    assert "72 weights to adapt at rank 256: 101,376 parameters" in capsys.readouterr().out
    assert main(["plan", "ViT-B-32", "--targets", "vision:mlp+language:qv"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "vision visual 24 52,224" in text and "language text_projection, transformer.resblocks 12 " in text
    assert alone == []


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    class Session:
        def head(self, url: str, timeout: float) -> str:
            asked.append((url, timeout))
            return "any answer"

    def from_pretrained(name: str) -> Any:
        assert not constants.HF_HUB_OFFLINE
        return transformers.CLIPConfig(**MODELS["clip"])

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    assert main(["plan", "transformers/me/clip", "--rank", "4"]) == 0
    assert asked == [(constants.ENDPOINT, 3.0)] and "24 weights to adapt" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama4", "sam", "whisper", "clip", "detr", "siglip", "llava", "t5"])
def test_every_type_has_a_model_and_an_input(name: str) -> None:
    model, example = models.on_meta(f"transformers/{name}")
    assert next(model.parameters()).is_meta and isinstance(example, dict)
