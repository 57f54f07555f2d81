"""What all commands have in common: JSON on stdout that a program can read, and help with an example."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden import DATA
from predicting import NAMES, Run

from uora_vision.__main__ import main

COMMANDS = ("plan", "train", "predict", "features", "runs", "inspect", "merge", "export", "verify", "upgrade")


def told(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """What a command prints as JSON; nothing else may stand on stdout."""
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_every_command_speaks_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Run(tmp_path)
    (made.photos / "broken.png").write_text("no image")
    adapter, out = made.adapter, tmp_path / "out"

    merged = told(capsys, "merge", adapter, "--output", out)
    assert merged["output"] == str(out / "model.safetensors") and (out / "model.safetensors").is_file()
    assert merged["weights"] == 8 and 0 <= merged["weight_error"] < 1e-6 < merged["output_scale"]
    assert 0 <= merged["output_error"] < 1e-4

    lora = told(capsys, "export", adapter, "--to", "peft-lora", "--rank", 2, "--output", tmp_path / "lora")
    assert (lora["output"], lora["kind"], set(lora["ranks"].values())) == (str(tmp_path / "lora"), "LoRA", {2})
    assert set(lora["errors"]) == set(lora["ranks"]) and 0 < max(lora["errors"].values()) < 1
    assert lora["size"] == sum(p.stat().st_size for p in (tmp_path / "lora").iterdir())

    done = told(capsys, "predict", made.photos, "--adapter", adapter, "--output", tmp_path / "p.csv")
    assert (done["output"], done["predictions"], sum(done["classes"].values())) == (str(tmp_path / "p.csv"), 10, 10)
    assert set(done["classes"]) <= set(NAMES) and list(done["skipped"]) == [str(made.photos / "broken.png")]

    old = shutil.copytree(DATA / "adapter_v2", tmp_path / "old")
    for upgraded in (True, False):
        assert told(capsys, "upgrade", old) == {"folder": str(old), "upgraded": upgraded, "format_version": 4}
    assert [one["passed"] for one in told(capsys, "verify", adapter)] == [True] * 4
    assert told(capsys, "inspect", adapter)["labels"] == NAMES
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert " --json " in capsys.readouterr().out, name


def test_a_plan_of_some_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    plan = told(capsys, "plan", "timm/test_vit", "--blocks", "0-1,3, -1", "--targets", "qv")
    assert {one["block"] for one in plan["projections"]} == {0, 1, 3, 5}
    wrong = {
        "2-1": "0-5,11, or",
        "a": "not 'a'",
        "": "not ''",
        "1,,2": "ranges such as",
        "1-": "",
        "99": "99",
        "0-999999999": "ranges",
    }
    for given, said in wrong.items():
        assert main(["plan", "timm/test_vit", f"--blocks={given}"]) == 2
        assert said in (error := capsys.readouterr().err) and error.startswith("error: ") and error.count("\n") == 1


def test_help_has_an_example_of_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert tuple(re.findall(r"^  (\w+)  +\w", listed.partition("Commands:")[2], re.MULTILINE)) == COMMANDS
    assert ": ".join(("uora_vision", ", ".join(COMMANDS))) in " ".join(listed.split())
    assert "..." not in listed.partition("Commands:")[2]  # each is told in a line
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"`uora {name} " in " ".join(capsys.readouterr().out.split()), name


def test_a_model_is_meant_by_a_close_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = shutil.copytree(DATA / "adapter_v2", tmp_path / "a")
    given = ("predict", "a.png", "--adapter"), ("merge", "--output", "m"), ("verify",), ("export", "--to", "onnx",
             "--output", "l")  # fmt: skip
    for words in given:
        assert main([*words, str(adapter), "--model", "timm/vit_base_patch16_22"]) == 2, words
        assert "did you mean timm/vit_base_patch16_224" in capsys.readouterr().err, words
