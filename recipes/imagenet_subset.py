"""Teach a pretrained timm model any folder or data set of photos, from a few images of each class.

    python recipes/imagenet_subset.py --demo                                  # no data, no network, about a minute
    python recipes/imagenet_subset.py --data photos/                          # photos/train/CLASS/*.jpg, photos/test/
    python recipes/imagenet_subset.py --data photos/ --model convnext_tiny --targets attention+mlp
    python recipes/imagenet_subset.py --data timm/oxford-iiit-pet --shots 20  # of the Hugging Face hub
    python recipes/imagenet_subset.py --data timm:torch/places365 --shots 20  # what timm.data.create_dataset takes
    accelerate launch recipes/imagenet_subset.py --precision bf16 ...         # several GPUs

The papers of VeRA and UORA: 10 images per class, 10 epochs, queries and values, a ViT-B or ViT-L of ImageNet-21k. These
are the defaults, so that one command is one cell of their table; learning rates are this library's own.

    python recipes/imagenet_subset.py --data cifar100
    python recipes/imagenet_subset.py --data food101
    python recipes/imagenet_subset.py --data flowers102
    python recipes/imagenet_subset.py --data resisc45
    python recipes/imagenet_subset.py --data food101 --model vit_large_patch16_224.augreg_in21k    # the larger model
    python recipes/imagenet_subset.py --data food101 --method lora --rank 8                        # another method

In full: --model vit_base_patch16_224.augreg_in21k --img-size 224 --shots 10 --epochs 10 --targets qv --rank 256.
One run leaves metrics.json, report.html, history.json, config.yaml, adapter/ and tensorboard/ in its output folder.
Ctrl-C leaves a checkpoint, from which the same command with --resume goes on, to the same weights.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common.command import cli
from common.command.choices import Augment, Domain, Method
from common.command.display import Display
from common.command.options import ImageChoice
from typer import Option

SMALL = 64
"""Images up to so many pixels are shown to the model as a whole."""


@dataclass(frozen=True, kw_only=True)
class Options(ImageChoice):
    demo: Annotated[
        bool, Option("--demo", help="digits as JPEG files, a tiny model, every method; needs nothing else")
    ] = False
    data: Annotated[
        str, Option(help="cifar100, food101, flowers102, resisc45, a folder, a table, a data set on the hub, timm:NAME")
    ] = "cifar100"
    model: Annotated[str, Option(help="a timm model, or local-dir:FOLDER")] = "vit_base_patch16_224.augreg_in21k"
    img_size: Annotated[int | None, Option(min=8, help="pixels; by default what the model was pretrained on")] = None
    shots: Annotated[
        int | None,
        Option(min=0, help="per class, to train on; 0 for all; 10 by default, where images have one class"),
    ] = None
    targets: Annotated[str, Option(help="projections to adapt: attention+mlp, attention, qv, ...")] = "qv"
    augment: Annotated[
        Augment | None, Option(help="of training images; resized-crop+flip by default, crop+flip up to 64 pixels")
    ] = None


if __name__ == "__main__":
    options = cli.parse(Options, __doc__)  # first of all: what is imported below takes seconds

import cv2
import numpy as np
import torch
from accelerate import PartialState
from common.data.augment import DomainShift, ModelInput
from common.data.images import load_images
from common.data.loading import Batches, Images, train_loader
from common.report.results import compare
from common.training.digests import digest_of
from common.training.folder import prepare_folder
from common.training.loop import make_optimizer
from common.training.methods import DEFAULTS, AdaptedModel, apply_method
from common.vision.backbone import create_backbone, crop_share, input_format
from common.vision.classify import load_sets, train_images
from common.vision.demo import NEW, OLD, ROWS, SHOTS, pretrain
from common.vision.learn import make_task, outputs
from PIL import Image
from rich.console import Console

import uora_vision as uora


def run(options: Options, comparison: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """Train and measure; returns the metrics, or None where there are none to tell."""
    if options.demo:
        return demo(options)
    if options.shots is None:
        options = dataclasses.replace(options, shots=10 if options.task.one_class else 0)
    chosen = options.method_options(DEFAULTS)
    config = cli.plain(options) | {"rank": chosen.rank, "lr": chosen.lr, "head_lr": chosen.head_lr}
    name = f"{Path(options.data).name.removeprefix('timm:')}-{options.method}"
    folder = prepare_folder(options.output, options.resume, name, config)

    # The data: what to train on, and what to measure.
    splits = load_sets(options)
    train_set, test_set = splits.train, splits.test

    # The model, and how an image gets into it: photos by a random part in training, and by their centre in tests.
    torch.manual_seed(options.seed)
    needed = outputs(options.task, train_set.names)
    model = create_backbone(options.model, needed, options.keep_head, options.img_size, options.drop_path)
    base = digest_of(model)
    photos = max(train_set.read(0).shape) > SMALL
    form = dataclasses.replace(input_format(model), crop=crop_share(model) if photos else 1.0)
    augment = options.augment or (Augment.resized if photos else Augment.flip)
    whole = DomainShift(Domain.none)
    data = Images(train_set, whole, ModelInput(form, augment, options.aa, options.reprob), options.seed)
    task = make_task(options, splits, Images(test_set, whole, ModelInput(form)))

    # What of it trains: by UORA, or by a method to compare it with.
    if chosen.method is Method.uora:
        uora.inject(
            model, rank=chosen.rank, targets=chosen.targets, seed=chosen.seed, init=chosen.init,
            token_sampling=chosen.token_sampling,
        )  # fmt: skip
        groups = uora.param_groups(
            model, lr=chosen.lr, head_lr=chosen.head_lr, weight_decay=chosen.weight_decay,
            layer_decay=chosen.layer_decay,
        )  # fmt: skip
        adapted = AdaptedModel(model, model, groups, chosen)
    else:
        adapted = apply_method(model, chosen)
    if adapted.is_uora:
        uora.verify(model, data[0, 0][0][None])
    adapted.model.to(PartialState().device)
    if chosen.informs:
        batches = train_loader(data, Batches(len(data), options.batch, 1, options.seed), options.workers)
        uora.inform(model, batches, lambda model, batch: task.loss(model, batch)[0])
    optimizer = make_optimizer(adapted, options.opt)
    reinit = None
    if chosen.redraws:
        reinit = uora.Reinitializer(
            model, optimizer=optimizer, scope=chosen.scope.value, threshold=chosen.threshold,
            relative=chosen.relative, alpha=chosen.alpha, every=chosen.every,
        )  # fmt: skip
    return train_images(options, adapted, optimizer, reinit, data, task, splits, base, folder, config, comparison)


def demo(options: Options) -> dict[str, Any] | None:
    """A tiny ViT learns the digits 0 to 4 and is adapted to 5 to 9, JPEG files of many sizes, by every method."""
    folder = prepare_folder(options.output, False, "imagenet-demo")
    display = Display(Console(), options.quiet)
    display.say(f"Pretraining a tiny ViT on the digits {OLD} (8 x 8 pixels, from scikit-learn).")
    model = pretrain(folder / "backbone", options.seed, display)
    data = write_photos(folder / "photos", options.seed)
    display.say(f"Adapting it to JPEG files of the digits {NEW}, {SHOTS} of each, read from {data}.")
    base = dataclasses.replace(
        options, demo=False, data=str(data), model=model, classes=NEW, shots=SHOTS, augment=Augment.none,
        targets="attention+mlp", epochs=30, batch=25, eval_every=5, quiet=True,
    )  # fmt: skip
    return compare(run, base, ROWS, folder, display)


def write_photos(folder: Path, seed: int) -> Path:
    """Digits as a folder of images: 70 to 140 pixels wide and high, with something of the background beside them."""
    chance = np.random.default_rng(seed)
    for split in ("train", "test"):
        digits = load_images("digits", split)
        for index, label in enumerate(digits.labels):
            edge, beside = (int(n) for n in chance.integers((70, 0), (111, 31)))
            picture = cv2.resize(digits.read(index), (edge, edge), interpolation=cv2.INTER_CUBIC)
            sides = (0, 0, beside // 2, beside // 2) if index % 2 else (beside // 2, beside // 2, 0, 0)
            picture = cv2.copyMakeBorder(picture, *sides, cv2.BORDER_REPLICATE)
            file = folder / split / digits.names[label] / f"{index}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file, quality=95)
    return folder


if __name__ == "__main__":
    sys.exit(cli.main(run, options))
