"""The lines that load what a run has trained, and predict with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEXT = "a text, or as many as an example has"
INPUTS = {  # of a task: what to give the command, and what to give the function
    "image-classification": ("FOLDER_OR_IMAGES", '"image.jpg"'),
    "image-multilabel-classification": ("FOLDER_OR_IMAGES", '"image.jpg"'),
    "image-regression": ("FOLDER_OR_IMAGES", '"image.jpg"'),
    "image-ordinal-regression": ("FOLDER_OR_IMAGES", '"image.jpg"'),
    "zero-shot-image-classification": ("FOLDER_OR_IMAGES", '"image.jpg"'),
    "text-classification": ("sentences.csv", TEXT),
    "text-regression": ("sentences.csv", TEXT),
    "text-generation": ("prompts.csv", '"a prompt"'),
}


def usage(adapter: Path, preprocessing: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of a sentence and lines of code; none for a task that `uora predict` does not have."""
    found = INPUTS.get(str(preprocessing.get("task")))
    if found is None:
        return []
    files, one = found
    if one == TEXT:
        texts = ['"a text"'] * len(preprocessing.get("columns", ("text",)))
        one = texts[0] if len(texts) == 1 else f"({', '.join(texts)})"
    command = f"uora predict {files} --adapter {shlex.quote(str(adapter))} --output predictions.csv"
    code = (
        "import uora_vision as uora\n\n"
        f"predictor = uora.load_predictor({json.dumps(str(adapter))})\n"
        f"print(predictor({one}).answer)"
    )
    return [("On the command line, for a file of predictions:", command), ("In Python:", code)]
