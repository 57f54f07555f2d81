"""Teach a pretrained vision transformer the classes of CIFAR-100, or of any folder of images.

    python recipes/vit_cifar100.py --demo                                   # no data, no network, about a minute
    python recipes/vit_cifar100.py --model vit_base_patch16_224 --shots 10  # CIFAR-100, downloaded once
    python recipes/vit_cifar100.py --data photos/ --method lora             # photos/train/CLASS/*.jpg, photos/test/...
    accelerate launch recipes/vit_cifar100.py --precision bf16 ...          # several GPUs

One run leaves metrics.json, report.html, history.json, adapter/ and tensorboard/ in its output folder. Ctrl-C leaves a
checkpoint; the same command with --resume goes on from it, to the same weights as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated, Any

from common.command import cli
from common.command.choices import Augment, Domain, Method
from common.command.display import Display
from common.command.options import ImageChoice
from typer import Option


@dataclass(frozen=True, kw_only=True)
class Options(ImageChoice):
    demo: Annotated[bool, Option("--demo", help="digits, a tiny model and every method; needs nothing else")] = False
    domain: Annotated[Domain, Option(help="a fixed change of every image, training and test")] = Domain.none
    augment: Annotated[Augment, Option(help="random changes of training images")] = Augment.flip


if __name__ == "__main__":
    options = cli.parse(Options, __doc__)  # first of all: what is imported below takes seconds

import torch
from accelerate import PartialState
from common.data.augment import DomainShift, ModelInput
from common.data.loading import Batches, Images, train_loader
from common.report.results import compare
from common.training.digests import digest_of
from common.training.folder import prepare_folder
from common.training.loop import make_optimizer
from common.training.methods import DEFAULTS, AdaptedModel, apply_method
from common.vision.backbone import create_backbone, input_format
from common.vision.classify import load_sets, train_images
from common.vision.demo import NEW, OLD, ROWS, SHOTS, pretrain
from common.vision.learn import make_task, outputs
from rich.console import Console

import uora_vision as uora


def run(options: Options, comparison: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """Train and measure; returns the metrics, or None where there are none to tell."""
    if options.demo:
        return demo(options)
    chosen = options.method_options(DEFAULTS)
    config = cli.plain(options) | {"rank": chosen.rank, "lr": chosen.lr, "head_lr": chosen.head_lr}
    folder = prepare_folder(options.output, options.resume, options.method.value, config)

    # The data: what to train on, and what to measure.
    splits = load_sets(options)
    train_set, test_set = splits.train, splits.test

    # The model, and how an image gets into it.
    torch.manual_seed(options.seed)
    needed = outputs(options.task, train_set.names)
    model = create_backbone(options.model, needed, options.keep_head, drop_path=options.drop_path)
    base = digest_of(model)
    form, shift = input_format(model), DomainShift(options.domain)
    data = Images(train_set, shift, ModelInput(form, options.augment, options.aa, options.reprob), options.seed)
    task = make_task(options, splits, Images(test_set, shift, ModelInput(form)))

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
    """A tiny ViT learns the digits 0 to 4 and is adapted to 5 to 9 by every method."""
    folder = prepare_folder(options.output, False, "demo")
    display = Display(Console(), options.quiet)
    display.say(f"Pretraining a tiny ViT on the digits {OLD} (8 x 8 pixels, from scikit-learn).")
    model = pretrain(folder / "backbone", options.seed, display)
    display.say(f"Adapting it to the digits {NEW}, {SHOTS} images of each. 290 test images leave 3 points of chance.")
    base = dataclasses.replace(
        options, demo=False, data="digits", model=model, classes=NEW, shots=SHOTS, augment=Augment.none, epochs=30,
        batch=25, eval_every=5, quiet=True,
    )  # fmt: skip
    return compare(run, base, ROWS, folder, display)


if __name__ == "__main__":
    sys.exit(cli.main(run, options))
