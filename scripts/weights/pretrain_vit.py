"""Pretrain the small ViT that the CIFAR-100 study adapts.

    python scripts/weights/pretrain_vit.py --data DATA --classes 0-59 --epochs 16 --output weights/vit_cifar60

The result is a folder in timm's own form: `timm.create_model("local-dir:weights/vit_cifar60")`.
Half of the patches are dropped while training (timm's `patch_drop_rate`), except in the last
`--full-epochs` epochs: about twice the images per second, for a small loss of accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def main(
    data: Annotated[Path, typer.Option(help="folder with CIFAR-100 as parquet, or any source of the recipes")],
    output: Annotated[Path, typer.Option(help="folder to write, in timm's form")],
    classes: Annotated[str, typer.Option(help="label numbers to train on, such as 0-59")] = "0-59",
    epochs: int = 16,
    full_epochs: Annotated[int, typer.Option(help="last epochs without patch dropping")] = 2,
    width: int = 192,
    depth: int = 7,
    batch: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    patch_drop: float = 0.5,
    seed: int = 0,
) -> None:
    from pretraining import pretrain

    pretrain(data, output, classes, epochs, full_epochs, width, depth, batch, lr, weight_decay, patch_drop, seed)


if __name__ == "__main__":
    typer.run(main)
