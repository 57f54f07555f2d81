"""What the demos of the recipes show. `.ci/run` runs them whole and names their folder in the variable UORA_DEMOS."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm

import uora_vision as uora

FOLDER = os.environ.get("UORA_DEMOS")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="looks at what the demos left; .ci/run runs them, for minutes")
METHODS = {
    "vit_cifar100": {"linear", "bitfit", "lora", "vera", "uora", "full"},
    "imagenet_subset": {"linear", "bitfit", "lora", "vera", "uora", "full"},
    "clip_finetune": {"linear", "bitfit", "lora", "vera", "uora", "full"},
    "glue": {"linear", "bitfit", "lora", "vera", "vera-peft", "uora", "full"},
    "llm_instruct": {"lora", "vera", "vera-peft", "uora", "full"},
    "e2e_nlg": {"bitfit", "lora", "vera", "vera-peft", "uora", "full"},
}


def left(recipe: str) -> tuple[Path, dict[str, Any], dict[str, dict[str, Any]]]:
    """The folder of a demo, its metrics, and those of each method."""
    folder = Path(str(FOLDER)) / recipe
    metrics = json.loads((folder / "metrics.json").read_text())
    return folder, metrics, {row["method"]: row for row in metrics["comparison"]}


@pytest.mark.parametrize("recipe", METHODS)
def test_every_method_is_compared_and_the_last_can_be_loaded(recipe: str) -> None:
    folder, _, rows = left(recipe)
    assert rows.keys() == METHODS[recipe]
    assert (folder / "report.html").read_text().count("data:image/svg+xml;base64,PD94") >= 2  # the start of a drawing
    assert uora.load_predictor(folder / "adapter", device="cpu")


def test_adapters_of_images_learn_what_a_head_alone_does_not() -> None:
    for recipe in ("vit_cifar100", "glue"):
        _, _, rows = left(recipe)
        assert rows["uora"]["accuracy"] > rows["linear"]["accuracy"] + 0.05
    folder, _, _ = left("vit_cifar100")
    backbone = timm.create_model(f"local-dir:{folder / 'backbone'}", pretrained=True, num_classes=5)
    assert uora.load(backbone, folder / "adapter")
    assert left("imagenet_subset")[2]["uora"]["accuracy"] > 0.5


def test_a_clip_learns_new_classes_and_a_share_of_it_forgets_less() -> None:
    folder, metrics, rows = left("clip_finetune")
    assert rows["uora"]["accuracy"] > max(0.4, metrics["accuracy_before"] + 0.2)
    points = json.loads((folder / "strengths.json").read_text())
    assert [point["strength"] for point in points] == [0, 0.25, 0.5, 0.75, 1]
    assert points[2]["other_accuracy"] > points[-1]["other_accuracy"]


def test_language_models_learn() -> None:
    _, metrics, rows = left("llm_instruct")
    assert all(row["loss"] < 0.8 * metrics["loss_before"] for row in rows.values())
    assert left("e2e_nlg")[2]["uora"]["bleu"] > left("e2e_nlg")[2]["bitfit"]["bleu"]
