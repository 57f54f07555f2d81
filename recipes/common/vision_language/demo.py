"""The embedded example of images and texts: a tiny CLIP reads the digits 0 to 4, to be adapted to the others."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from open_clip.push_to_hf_hub import save_for_hf

from uora_vision.predict.dual import load_dual

from ..command.choices import Domain, Method
from ..command.display import Display
from ..command.options import Defaults, MethodOptions
from ..data.augment import DomainShift, ModelInput
from ..data.images import load_images
from ..data.loading import Images
from ..language.toy import word_tokenizer
from ..training.loop import make_optimizer, train
from ..training.parts import TrainOptions
from ..vision.demo import FORM
from .contrastive import Naming, prompts
from .towers import Towers, adapt_towers, plan_towers

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE = "the digit {}"
SPECIAL, LENGTH = ("<unk>", "<pad>", "<start>", "<end>"), 6
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 8, "patch_size": 2, "width": 64, "head_width": 32, "layers": 2},
    "text_cfg": {
        "context_length": LENGTH, "vocab_size": len(SPECIAL) + 2 + len(WORDS), "width": 64, "heads": 2, "layers": 2,
        "pool_type": "eos", "eos_id": SPECIAL.index("<end>"), "pad_id": SPECIAL.index("<pad>"),
        "hf_tokenizer_name": "words",  # any name: beside the weights there is a tokenizer
    },
}  # fmt: skip
OLD, NEW = "0-4", "5-9"
SHOTS = 20
ROWS = {  # rank and learning rates, chosen on training images of the digits 5 to 9 that were held out
    Method.linear: Defaults(None, 0.01, 0.01),
    Method.bitfit: Defaults(None, 0.03, 0.03),
    Method.lora: Defaults(4, 0.01, 0.01),
    Method.vera: Defaults(64, 0.05, 0.01),
    Method.uora: Defaults(64, 0.05, 0.01),
    Method.full: Defaults(None, 0.001, 0.001),
}


def save_untrained(folder: Path, seed: int) -> None:
    """A tiny CLIP of open_clip's own classes, with random weights, in a folder for `--model`."""
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**CONFIG)
    with torch.no_grad():  # words that are as different as those of a text tower that has read them
        model.token_embedding.weight.normal_(std=0.5)
    open_clip.model.set_model_preprocess_cfg(
        model, {"size": 8, "mode": "RGB", "mean": FORM.mean, "std": FORM.std, "interpolation": "bicubic",
                "resize_mode": "shortest", "fill_color": 0},
    )  # fmt: skip
    tokenizer = word_tokenizer(prompts(TEMPLATE, WORDS), SPECIAL, "<start> $A <end>")
    save(model, tokenizer, folder)


def save(model: torch.nn.Module, tokenizer: object, folder: Path) -> None:
    save_for_hf(model, tokenizer, CONFIG, str(folder), safe_serialization=True)


def pretrain(folder: Path, seed: int, display: Display) -> str:
    """Train a tiny CLIP from nothing on the digits 0 to 4; returns its name for `--model`."""
    save_untrained(folder, seed)
    dual = load_dual(str(folder))
    rates = MethodOptions(Method.full, None, lr=3e-3, head_lr=3e-3, weight_decay=0.05)
    adapted = adapt_towers(dual, rates, plan_towers(dual, rates, Towers(scale=True)))
    data, tests = (
        Images(load_images("digits", split, range(5)), DomainShift(Domain.none), ModelInput(FORM), seed)
        for split in ("train", "test")
    )
    task = Naming(dual, tests, dual.tokenize(prompts(TEMPLATE, WORDS[:5])), False, 64, 0)
    shown = Display(display.console, display.quiet, "pretraining, epoch")
    how = TrainOptions(epochs=24, batch=32, eval_every=8)
    train(adapted, make_optimizer(adapted), None, data, task, how, display=shown)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    save(dual.model.cpu(), tokenizer, folder)
    return f"local-dir:{folder}"
