"""The code on the pages of the docs, and a program that runs it: `python tests/pages.py PAGE ...` in an empty folder.

What a page takes as given (a model, a loader, files) is made here, small and without a network.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}


def blocks(page: str, language: str = "python") -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(), re.MULTILINE | re.DOTALL)


def small(classes: int = 2) -> Any:
    """A ViT that is always the same."""
    import torch
    from timm.models import create_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model("vit_tiny_patch16_224", num_classes=classes, depth=2)


def create_model(name: str, pretrained: bool = False, **options: Any) -> Any:
    """In place of timm's: nothing is downloaded."""
    from timm.models import create_model

    if pretrained and ":" not in name:
        return small(options["num_classes"])
    return create_model(name, pretrained=pretrained, **options)


def given() -> dict[str, Any]:
    """What every page takes as given."""
    import timm
    import torch

    import uora_vision as uora

    timm.create_model = create_model
    images = torch.randn(3, 3, 224, 224)
    return {
        "uora": uora, "torch": torch, "model": small(), "images": images,
        "loader": [(images[:2], torch.tensor([0, 1]))] * 2,
    }  # fmt: skip


def of_method() -> dict[str, Any]:
    import torch

    import uora_vision as uora

    there = given()
    model = uora.inject(there["model"], rank=4)
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    optimizer = torch.optim.AdamW(uora.param_groups(model))
    return there | {"batches": there["loader"], "loss": loss, "optimizer": optimizer}


def of_serving() -> dict[str, Any]:
    import uora_vision as uora

    there = given()
    for name in ("cats", "dogs"):
        uora.save(uora.inject(small(), rank=4), f"adapters/{name}")
    return there | {"names": ["cats", "dogs"]}


def of_predict() -> dict[str, Any]:
    import shutil

    from predicting import Run

    import uora_vision as uora

    run = Run(Path("made").absolute())
    there = given()
    uora.inject(there["model"], rank=4)
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(run.files[0], name)
    shutil.rmtree(run.photos)
    run.adapter.parent.rename(run.photos)  # runs/photos/adapter, and its base in runs/base
    run.photos.parent.rename("runs")
    return there


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": given, "docs/index.md": given, "docs/choosing.md": given, "docs/heads.md": given,
    "docs/towers.md": given, "docs/from_peft.md": given, "docs/serving.md": of_serving, "docs/predict.md": of_predict,
    "docs/method.md": of_method, "docs/extending.md": given,
}  # fmt: skip
"""The pages that run, and what each is given. The last one changes the library."""
ALONE = ("docs/choosing.md", "docs/method.md")
"""Pages of which every block begins anew."""


def run(page: str) -> None:
    there = GIVEN[page]()
    for number, block in enumerate(blocks(page)):
        if page in ALONE:
            there = GIVEN[page]()
            if "inject(" in block and page == "docs/method.md":
                there["model"] = small()
        exec(compile(block, f"{page}, block {number + 1}", "exec"), there)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(name)
        print(name)
