"""The embedded example of images: a tiny ViT learns half of the handwritten digits, to be adapted to the others."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from ..command.choices import Domain, Method
from ..command.display import Display
from ..command.options import Defaults, MethodOptions
from ..data.augment import DomainShift, InputFormat, ModelInput
from ..data.images import load_images
from ..data.loading import Images
from ..training.loop import make_optimizer, train
from ..training.methods import apply_method
from ..training.parts import TrainOptions
from .evaluation import Classification

FORM = InputFormat((8, 8), (0.3, 0.3, 0.3), (0.35, 0.35, 0.35))
MODEL = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
}
OLD, NEW = "0-4", "5-9"
SHOTS = 20
ROWS = {  # rank and learning rates, chosen on training images of the digits 5 to 9 that the demo never sees
    Method.linear: Defaults(None, 0.05, 0.05),
    Method.bitfit: Defaults(None, 0.03, 0.05),
    Method.lora: Defaults(4, 0.01, 0.01),
    Method.vera: Defaults(64, 0.05, 0.01),
    Method.uora: Defaults(64, 0.05, 0.01),
    Method.full: Defaults(None, 0.002, 0.01),
}


def pretrain(folder: Path, seed: int, display: Display) -> str:
    """Train a ViT from nothing on the digits 0 to 4; returns its name for `--model`."""
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **MODEL)
    adapted = apply_method(model, MethodOptions(Method.full, None, lr=5e-3, head_lr=5e-3, weight_decay=0.05))
    data, tests = (
        Images(load_images("digits", split, range(5)), DomainShift(Domain.none), ModelInput(FORM), seed)
        for split in ("train", "test")
    )
    shown = Display(display.console, display.quiet, "pretraining, epoch")
    how = TrainOptions(epochs=24, batch=32, eval_every=8)
    train(adapted, make_optimizer(adapted), None, data, Classification(tests), how, display=shown)
    model.pretrained_cfg.update(mean=FORM.mean, std=FORM.std, input_size=(3, *FORM.size), crop_pct=1.0)
    timm.models.save_for_hf(model, folder, model_config={"model_args": MODEL}, safe_serialization=True)
    return f"local-dir:{folder}"
