"""Options that recipes share, as dataclasses to inherit from; see `cli.parse`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from ..errors import RecipeError
from .choices import Method, Scope, Target

FREE = {"output", "resume", "workers", "checkpoint_every", "max_steps", "max_seconds", "track", "quiet", "demo"}
"""Options that may change when a run is resumed: they do not change what it computes."""

TRACKERS = {"tensorboard": "tensorboard", "csv": None, "wandb": "wandb", "mlflow": "mlflow"}
"""Where the numbers of a run can go, and the package that this needs."""

NUMBER = r"\d+(\.\d+)?"
POLICY = (
    rf"(v0|v0r|original|originalr|3a)(-mstd{NUMBER})?|rand(-([mn]\d+|mmax\d+|inc[01]|(p|mstd){NUMBER}))*|"
    rf"augmix(-([mw]\d+|d-?\d+|b[01]|(a|mstd){NUMBER}))*"
)
"""Automatic augmentation, in the words of timm."""

_M, _R, _O, _C = Target.multilabel, Target.regression, Target.ordinal, Target.classification
UNFIT = {
    "shots": ((_M, _R), "images are counted by their class, and here an image has none, or several"),
    "classes": ((_R,), "numbers have no classes"),
    "keep_head": ((_M, _R, _O), "a pretrained head tells classes apart"),
    "smoothing": ((_M, _R, _O), "it spreads the share of one class over all others"),
    "mixup": ((_O,), "between two ranks lie others"),
    "cutmix": ((_O,), "between two ranks lie others"),
    "class_weights": ((_R,), "numbers have no classes"),
    "sampler": ((_R,), "numbers have no classes"),
    "demo": ((_M, _R, _O), "the demo tells classes apart"),
    "separator": ((_C, _R, _O), "it is between several labels of an image"),
}
"""Options that some tasks of images cannot have, and why."""

LR = 0.05
"""Rate of UORA and our VeRA, in the scale of `uora.param_groups`: one for all models, ranks and tasks."""
PEFT_LR = LR / 2**0.5
"""Of PEFT's VeRA, which has one rate for b and d: with its banks, of gain 2, it does what LR does with ours."""


@dataclass(frozen=True)
class Defaults:
    """What a method uses where nothing is asked for: rank (None: it has none) and AdamW learning rates."""

    rank: int | None
    lr: float
    head_lr: float


@dataclass(frozen=True)
class MethodOptions:
    """What to train.

    Args:
        rank: of the adapter, for the methods that have one.
        targets: which projections to adapt, in the words of `uora.inject`. LoRA and PEFT's VeRA adapt whole weights, so
            for them any role of a fused weight selects all of it.
        lr: of what the method adds or unfreezes; for UORA and its VeRA in the scale of `uora.param_groups`.
        head_lr: of the head.
        weight_decay: of matrices.
        seed: of the adapter's random matrices.
        scope, threshold, relative, alpha, every: of UORA's reinitialisation; see `uora.Reinitializer`.
        init: of UORA's A and B; see `uora.UoraConfig`.
        token_sampling: see `uora.UoraConfig`; for UORA and its VeRA.
        layer_decay: factor of the rates from each block to the one below it; the head has its own.
    """

    method: Method = Method.uora
    rank: int | None = 256
    targets: str = "attention+mlp"
    lr: float = LR
    head_lr: float = 4e-3
    weight_decay: float = 0.0
    seed: int = 0
    scope: Scope = Scope.shared
    threshold: float = 1e-5
    relative: bool = False
    alpha: float = 0.5
    every: int = 1
    init: Literal["haar", "svd"] = "haar"
    token_sampling: int = 1
    layer_decay: float = 1.0

    @property
    def redraws(self) -> bool:
        """Whether directions are drawn again while training."""
        return self.method is Method.uora and self.scope not in (Scope.never, Scope.informed)

    @property
    def informs(self) -> bool:
        """Whether rows of A come from the gradient."""
        return self.method is Method.uora and self.scope is Scope.informed


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Options that are checked while the command line is read."""

    def __post_init__(self) -> None:
        """Each class looks at its own fields, and calls this of the others.

        Raises:
            RecipeError: one of them cannot be used.
        """

    def _need(self, name: str, right: bool, expected: str) -> None:
        if not right:
            raise RecipeError(f"--{name.replace('_', '-')} must be {expected}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class MethodChoice(Choice):
    """What trains."""

    method: Annotated[Method, Option(help="what to train")] = Method.uora
    rank: Annotated[int | None, Option(min=1, help="of the adapter; by default 256, and 8 for lora")] = None
    targets: Annotated[str, Option(help="projections to adapt: attention+mlp, attention, qv, ...")] = "attention+mlp"
    lr: Annotated[float | None, Option(min=0, help="of the adapter; by default what the method wants")] = None
    head_lr: Annotated[float | None, Option(min=0, help="of the head")] = None
    weight_decay: Annotated[float, Option(min=0, help="of matrices; vectors never decay")] = 0.0
    reinit: Annotated[Scope, Option(help="uora: what a redraw changes; informed: rows by gradient")] = Scope.shared
    threshold: Annotated[float, Option(min=0, help="uora: redraw where |d| is below")] = 1e-5
    relative: Annotated[bool, Option("--relative/--absolute", help="uora: threshold times the layer's median |d|")] = (
        False
    )
    alpha: Annotated[float, Option(min=0, max=1, help="uora: share of the old direction that stays")] = 0.5
    every: Annotated[int, Option(min=1, help="uora: redraw at every n-th step below the threshold")] = 1
    init: Annotated[
        Literal["haar", "svd"], Option(help="uora: random orthogonal A and B, or singular vectors of each weight")
    ] = "haar"
    token_sampling: Annotated[int, Option(min=1, help="uora, vera: gradients from one token of every n")] = 1
    layer_decay: Annotated[float, Option(help="factor of the rates from each block to the one below it")] = 1.0
    seed: Annotated[int, Option(min=0, help="of everything random")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need("layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")

    def method_options(self, defaults: dict[Method, Defaults]) -> MethodOptions:
        """With the method's own rank and rates where none were asked for."""
        own = defaults[self.method]
        return MethodOptions(
            method=self.method,
            rank=own.rank if self.rank is None or own.rank is None else self.rank,
            targets=self.targets,
            lr=own.lr if self.lr is None else self.lr,
            head_lr=own.head_lr if self.head_lr is None else self.head_lr,
            weight_decay=self.weight_decay,
            seed=self.seed,
            scope=self.reinit,
            threshold=self.threshold,
            relative=self.relative,
            alpha=self.alpha,
            every=self.every,
            init=self.init,
            token_sampling=self.token_sampling,
            layer_decay=self.layer_decay,
        )


@dataclass(frozen=True, kw_only=True)
class TrainChoice(Choice):
    """For how long, and in what steps."""

    epochs: Annotated[int, Option(min=1, help="passes over the training data")] = 10
    batch: Annotated[int, Option(min=1, help="examples per step, over all processes")] = 64
    warmup: Annotated[float, Option(min=0, max=1, help="share of the steps")] = 0.1
    opt: Annotated[str, Option(help="an optimizer that timm knows")] = "adamw"
    clip: Annotated[float, Option(min=0, help="largest norm of the gradient; 0 for none")] = 1.0
    precision: Annotated[Literal["no", "bf16", "fp16"], Option(help="of the products")] = "no"
    workers: Annotated[int, Option(min=0, help="processes that read data")] = 0
    eval_every: Annotated[int, Option(min=1, help="epochs between evaluations")] = 1
    accumulate: Annotated[int, Option(min=1, help="compute a batch in so many parts, which needs less memory")] = 1
    best: Annotated[str | None, Option(help="keep the evaluation that is best by this measure: accuracy, loss")] = None
    patience: Annotated[int | None, Option(min=1, help="stop after so many evaluations without a better --best")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and self.best is None:
            raise RecipeError("--patience needs --best, the measure that is to get better: --best accuracy")


@dataclass(frozen=True, kw_only=True)
class RunChoice(Choice):
    """Where to, and when to stop."""

    output: Annotated[Path | None, Option(help="folder for the results; by default a new one in runs/")] = None
    checkpoint_every: Annotated[str, Option(help="steps (500) or minutes (10m); 0 for only at the end")] = "10m"
    resume: Annotated[bool, Option("--resume", help="go on with the run in --output")] = False
    max_steps: Annotated[int | None, Option(min=1, help="stop there, with a checkpoint")] = None
    max_seconds: Annotated[float | None, Option(min=0, help="stop then, with a checkpoint")] = None
    track: Annotated[
        str, Option(help=f"where the numbers of every step go, with commas: {', '.join(TRACKERS)}; or none")
    ] = "tensorboard"
    quiet: Annotated[bool, Option("--quiet", help="print nothing but errors")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.cadence
        for name in self.trackers:
            if name not in TRACKERS:
                raise RecipeError(f"--track knows {', '.join(TRACKERS)} and none, got {name!r}")
            package = TRACKERS[name]
            if package is not None and find_spec(package) is None:
                raise RecipeError(f"--track {name} needs the package {package}: pip install {package}")

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers, each once."""
        if self.track == "none":
            return ()
        return tuple(dict.fromkeys(name.strip() for name in self.track.split(",")))

    @property
    def cadence(self) -> tuple[int, float]:
        """`500` as (500 steps, 0 seconds), `10m` as (0 steps, 600 seconds)."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)m", self.checkpoint_every)
        if match is None:
            raise RecipeError(
                f"--checkpoint-every takes steps such as 500 or minutes such as 10m, got {self.checkpoint_every!r}"
            )
        return int(match[1] or 0), 60 * float(match[2] or 0)


@dataclass(frozen=True, kw_only=True)
class TableChoice:
    """How a table of texts is read."""

    columns: Annotated[str | None, Option(help="names of the columns of files without header: label,sentence")] = None

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.columns.split(",")) if self.columns else ()


@dataclass(frozen=True, kw_only=True)
class TargetChoice(Choice):
    """What is learned of images, and from which columns of a table."""

    task: Annotated[Target, Option(help="what is learned of an image")] = Target.classification
    path_column: Annotated[str | None, Option(help="of a table: the images; by default path, file_name, ...")] = None
    target_columns: Annotated[
        str | None, Option(help="of a table: what is learned, with commas; by default label, target, ...")
    ] = None
    split_column: Annotated[str | None, Option(help="of a table: train or test; by default split, if there")] = None
    separator: Annotated[str | None, Option(help="multilabel: between labels in one column; by default | ; or ,")] = (
        None
    )
    class_weights: Annotated[
        Literal["none", "balanced"], Option(help="balanced: the rarer a class, the more it counts in the loss")
    ] = "none"
    sampler: Annotated[
        Literal["none", "balanced"], Option(help="balanced: images are drawn so that all classes come equally often")
    ] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need("separator", self.separator != "", "at least one character")
        _ = self.target_names

    @property
    def target_names(self) -> tuple[str, ...]:
        """The columns asked for; none where the default is."""
        if self.target_columns is None:
            return ()
        names = tuple(name.strip() for name in self.target_columns.split(","))
        if "" in names or len(set(names)) < len(names):
            raise RecipeError(f"--target-columns takes names with commas, each once, got {self.target_columns!r}")
        if len(names) > 1 and self.task.one_class:
            raise RecipeError(f"--task {self.task} has one column of targets, got {self.target_columns!r}")
        return names


@dataclass(frozen=True, kw_only=True)
class ImageChoice(RunChoice, TrainChoice, MethodChoice, TargetChoice):
    """Which images, and which model learns them."""

    data: Annotated[str, Option(help="cifar100, digits, a folder, a table, or a data set on the Hugging Face hub")] = (
        "cifar100"
    )
    model: Annotated[str, Option(help="a timm model, or local-dir:FOLDER")] = "vit_small_patch16_224"
    classes: Annotated[str | None, Option(help="only these classes: 60-99 or apple,bear")] = None
    shots: Annotated[int | None, Option(min=1, help="training images per class; all by default")] = None
    strict: Annotated[bool, Option("--strict", help="stop at an image that cannot be read; else it is left out")] = (
        False
    )
    validation: Annotated[
        float, Option(min=0, max=0.9, help="evaluate on this share of the training images, held out")
    ] = 0
    keep_head: Annotated[bool, Option("--keep-head", help="train on from the model's own head")] = False
    mixup: Annotated[float, Option(help="mix images and their labels: alpha of the shares; 0 for not")] = 0.0
    cutmix: Annotated[float, Option(help="paste parts of images into others: alpha of their areas; 0 for not")] = 0.0
    smoothing: Annotated[float, Option(help="share of a label that is spread over all classes")] = 0.0
    aa: Annotated[str | None, Option(help="AutoAugment, RandAugment or AugMix as timm has it: rand-m9-mstd0.5")] = None
    reprob: Annotated[float, Option(help="share of the training images of which a part is erased")] = 0.0
    drop_path: Annotated[float, Option(help="rate at which blocks are skipped, in the last one; 0 in the first")] = 0.0
    ema: Annotated[float | None, Option(help="measure and keep an average of the weights, of this decay: 0.999")] = None
    find_lr: Annotated[bool, Option("--find-lr", help="try rates before training, and suggest one in the report")] = (
        False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (tasks, why) in UNFIT.items():
            if self.task in tasks and getattr(self, name, None) not in (None, 0, False, "none"):
                raise RecipeError(f"--{name.replace('_', '-')} does not go with --task {self.task}: {why}")
        for name in ("mixup", "cutmix"):
            self._need(name, 0 <= getattr(self, name) <= 100, "from 0 to 100")
        for name in ("smoothing", "drop_path"):
            self._need(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._need("reprob", 0 <= self.reprob <= 1, "from 0 to 1")
        self._need("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, such as 0.999")
        told = "as timm writes it: rand-m9-mstd0.5-inc1, v0, original, augmix-m3-w3"
        self._need("aa", self.aa is None or re.fullmatch(POLICY, self.aa) is not None, told)
