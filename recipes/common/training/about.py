"""What a recipe's adapter says of its task, so that it can predict without the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uora_vision.predict.models import relative_source
from uora_vision.storage.preprocessing import sections_of


def described(
    folder: Path, task: str, model: str, checkpoint: str | None = None, *, labels: Sequence[str] | None = None,
    **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """`labels` and `preprocessing` for `uora.save`.

    Args:
        folder: of the run.
        task: as the hub names it.
        model: the base, as `uora.load_predictor` takes it.
        checkpoint: its weights, where the name does not tell them.
        fields: of `preprocessing`; None for none.

    Raises:
        uora.OptionError: a name of a class cannot be written into an adapter: told before the run, not after it.
    """
    adapter = folder / "adapter"
    about = {"task": task, "model": relative_source(model, adapter), **fields}
    if checkpoint is not None:
        about["checkpoint"] = relative_source(checkpoint, adapter)
    sections_of(labels, about)
    return {"labels": None if labels is None else list(labels), "preprocessing": about}
