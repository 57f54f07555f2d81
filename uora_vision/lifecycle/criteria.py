"""By what a Reinitializer tells that a direction has died, a score of each, and what it puts in its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, OptionError

Criterion = Literal["magnitude", "saliency"]
Scope = Literal["shared", "quorum", "layer"]
Source = Literal["random", "informed", "none"]

_KEPT = 0.9
"""Share of a running mean that a step leaves. Adam's own means would save r numbers a role, but other optimizers have
none, signs cancel in them, and they are cleared where directions fire."""


class Score(Protocol):
    def __call__(self, d: Tensor, grad: Tensor) -> Tensor:
        """Scores (roles, r), low where a direction is of little use.

        Args:
            d: (roles, r), every d of the adapter after the step.
            grad: (roles, r), the gradient by which it was taken.
        """
        ...


def saliency(d: Tensor, grad: Tensor) -> Tensor:
    """|d g|: how much the loss would change to first order without the direction."""
    return (d * grad).abs()


def scorer(criterion: Criterion | Score, relative: bool) -> Score | None:
    """The function of a criterion; None for `magnitude`, which has no memory.

    Raises:
        ConfigError: there is no such criterion, or it needs `relative`.
    """
    if callable(criterion):
        return criterion
    if criterion not in get_args(Criterion):
        raise ConfigError(f"criterion must be one of {', '.join(get_args(Criterion))} or a function, got {criterion!r}")
    if criterion == "magnitude":
        return None
    if not relative:
        raise ConfigError(
            "criterion='saliency' has no scale of its own: give relative=True and a threshold in multiples of the "
            "role's median, such as threshold=0.1"
        )
    return saliency


class RunningScore:
    """The running mean of a score over steps.

    Args:
        score: see `Score`.
        roles, rank: how many directions there are.
    """

    def __init__(self, score: Score, roles: int, rank: int) -> None:
        self.score = score
        self.values = torch.full((roles, rank), torch.nan, dtype=torch.float32, device="cpu")
        """(roles, r); NaN where there was none yet, which is below no threshold."""

    def update(self, d: Tensor, grad: Tensor) -> Tensor:
        """The mean after one more step, (roles, r). Scores that are not finite are left out.

        Raises:
            OptionError: the function gives no scores.
        """
        new = self.score(d, grad)
        if not isinstance(new, Tensor) or new.shape != d.shape or new.is_complex():
            shown = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise OptionError(
                f"a criterion gives a score for each direction, of shape {tuple(d.shape)}, and gave {shown}"
            )
        old, new = self.values.to(d.device), new.to(d.device, torch.float32)
        mean = torch.where(old.isnan(), new, _KEPT * old + (1 - _KEPT) * new)
        self.values = torch.where(new.isfinite(), mean, old)
        return self.values

    def restart(self, fired: Tensor) -> None:
        """Directions that fired (roles, r) go on from the median of their role, so that they are given some time."""
        median = self.values.median(dim=1, keepdim=True).values
        self.values = torch.where(fired.to(self.values.device), median, self.values)


def check_source(source: Source, scope: Scope, alpha: Any, interpolation: str, batches: Any, loss: Any) -> None:
    """Whether fresh rows can be had from a source.

    Raises:
        ConfigError: they cannot.
    """
    if source != "random" and (alpha != 0.5 or interpolation != "linear"):
        raise ConfigError(f"alpha and interpolation mix old rows with random ones, and source={source!r} draws none")
    if source != "informed":
        if batches is not None or loss is not None:
            raise ConfigError(f"batches and loss are for source='informed', got source={source!r}")
        return
    if scope != "layer":
        raise ConfigError(
            f"source='informed' needs scope='layer': a row is informed by the gradient of one weight, and in scope "
            f"{scope!r} all layers would get it"
        )
    if batches is None:
        raise ConfigError("source='informed' needs batches=..., of which the gradient is taken, and loss=... as inform")
    if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
        raise ConfigError(
            f"batches must be a list, a DataLoader or the like, that can be gone through again each time directions "
            f"fire, got {type(batches).__name__}"
        )
