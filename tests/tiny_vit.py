"""A ViT of 28k parameters on disk, random but in the form of a pretrained one, for the recipes of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def save_tiny_vit(folder: Path) -> str:
    """Write it, with a head of 7 classes; returns its name for `--model`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **TINY)
    model.pretrained_cfg.update(mean=[0.5] * 3, std=[0.25] * 3, input_size=(3, 16, 16))
    timm.models.save_for_hf(model, folder, model_config={"model_args": TINY}, safe_serialization=True)
    return f"local-dir:{folder}"
