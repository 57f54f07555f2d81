"""A tiny adapter for images that says what it is for, with its base and some images, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from conftest import wake
from PIL import Image
from torch import Tensor

import uora_vision as uora
from uora_vision.predict.images import InputFormat

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
NAMES = ["ant", "bee", "cat"]
FORM = InputFormat((32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bilinear", crop=0.8)


class Run:
    """What the tests share: the folder of an adapter, and images."""

    def __init__(self, folder: Path) -> None:
        self.adapter, self.photos, self.base = folder / "run" / "adapter", folder / "photos", folder / "base"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SIZES)
            timm.models.save_for_hf(base, self.base, model_config={"model_args": SIZES}, safe_serialization=True)
            base.reset_classifier(3)
            self.model = wake(uora.inject(base.eval(), rank=4), 2.0)
        about = {"task": "image-classification", "model": "timm/local-dir:../../base", **FORM.config()}
        uora.save(self.model, self.adapter, labels=NAMES, preprocessing=about)
        chance = np.random.default_rng(0)
        for number in range(10):
            file = self.photos / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(chance.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)).save(file)
        self.files = sorted(self.photos.rglob("*.png"))

    def wanted(self, path: Path) -> Tensor:
        """Probabilities, by what the recipes make of an image: sized, cut and normalised here by other means."""
        import cv2

        image = np.asarray(Image.open(path))
        edge = int(32 / 0.8)
        scale = edge / min(image.shape[:2])
        sides = tuple(round(n * scale) for n in image.shape[:2])
        image = cv2.resize(image, sides[::-1], interpolation=cv2.INTER_LINEAR)
        top, left = (image.shape[0] - 32) // 2, (image.shape[1] - 32) // 2
        image = image[top : top + 32, left : left + 32] / 255
        x = torch.tensor((image - FORM.mean) / FORM.std, dtype=torch.float32).permute(2, 0, 1)
        with torch.no_grad():
            return self.model(x[None]).softmax(1)[0]
