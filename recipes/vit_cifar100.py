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

import torch
from common.command import cli
from common.command.display import Display
from common.data.augment import Augment, Domain, DomainShift, ModelInput
from common.data.loading import Images
from common.report.results import compare
from common.training.folder import prepare_folder
from common.training.methods import DEFAULTS
from common.vision.backbone import create_backbone, input_format
from common.vision.classify import ImageChoice, load_sets, train_images
from common.vision.demo import NEW, OLD, ROWS, SHOTS, pretrain
from rich.console import Console
from typer import Option


@dataclass(frozen=True, kw_only=True)
class Options(ImageChoice):
    demo: Annotated[bool, Option("--demo", help="digits, a tiny model and every method; needs nothing else")] = False
    domain: Annotated[Domain, Option(help="a fixed change of every image, training and test")] = Domain.none
    augment: Annotated[Augment, Option(help="random changes of training images")] = Augment.flip


def run(options: Options, comparison: list[dict[str, Any]] | None = None) -> dict[str, Any] | None:
    """Train and measure; returns the metrics, or None where there are none to tell."""
    if options.demo:
        return demo(options)
    chosen = options.method_options(DEFAULTS)
    config = cli.plain(options) | {"rank": chosen.rank, "lr": chosen.lr, "head_lr": chosen.head_lr}
    folder = prepare_folder(options.output, options.resume, options.method.value, config)

    # The data: what to train on, and what to measure.
    train_set, test_set = load_sets(options)

    # The model, and how an image gets into it.
    torch.manual_seed(options.seed)
    backbone = create_backbone(options.model, len(train_set.names), options.keep_head)
    form, shift = input_format(backbone), DomainShift(options.domain)
    data = Images(train_set, shift, ModelInput(form, options.augment), options.seed)
    tests = Images(test_set, shift, ModelInput(form))
    return train_images(options, chosen, backbone, data, tests, folder, config, comparison)


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


app = cli.application(run, Options, __doc__)

if __name__ == "__main__":
    sys.exit(cli.main(app))
