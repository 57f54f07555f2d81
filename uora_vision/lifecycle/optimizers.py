"""Whether an optimizer trains an adapter, and leaves it alone otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, warn
from ..tables import shortened
from .library import adapters


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Hold an optimizer against the active adapter of a model: it must have every b and d, and should not decay them.

    Args:
        optimizer: of torch, or a wrapper around one. One of DeepSpeed, which keeps copies of all parameters in a single
            vector, is not looked at.

    Raises:
        ConfigError: the optimizer lacks some b or d.

    Warns:
        UoraWarning: it decays some b or d.
    """
    inner = optimizer
    while not _of_deepspeed(inner) and isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    if _of_deepspeed(inner):
        return
    decay = {id(p): group.get("weight_decay", 0) for group in inner.param_groups for p in group["params"]}
    vectors = {f"{name}.{key}": p for name, a in adapters(model).items() for key, p in (("b", a.b), ("d", a.d))}
    missing = [name for name, p in vectors.items() if id(p) not in decay]
    if missing:
        frozen = " They are frozen: set requires_grad_(True) on them." if _any_frozen(vectors, missing) else ""
        raise ConfigError(
            f"the optimizer has {len(vectors) - len(missing)} of the {len(vectors)} vectors b and d of the adapter; it "
            f"lacks {shortened(missing, 4)}. Make it after inject() or activate(), of uora_vision.param_groups(model, "
            f"lr=...).{frozen}"
        )
    decaying = [name for name, p in vectors.items() if decay[id(p)]]
    if decaying:
        warn(
            f"{len(decaying)} of the {len(vectors)} vectors b and d decay in the optimizer ({shortened(decaying, 3)}) "
            f"and a d that decays falls below the threshold by itself and is redrawn. {REMEDY}"
        )


REMEDY = "uora_vision.param_groups(model, lr=..., weight_decay=...) gives groups in which only matrices decay."


class DecayWatch:
    """Sees d decay, of an optimizer that nobody showed it: by a step in which every d was multiplied by a number below
    1, one for all of its role. Gradients do nothing like it; where they are 0, as before the first step, decay does.

    Args:
        d: (roles, r) before the step.
    """

    def __init__(self, d: Tensor) -> None:
        self.before = d.clone()

    def decayed(self, d: Tensor) -> Tensor:
        """Whether d (roles, r) shows it, as a 0-dimensional bool on its device: nothing waits for the device."""
        old, self.before = self.before.to(d.device), d.clone()
        size = old.abs().amax(dim=1, keepdim=True)
        share = (d * old).sum(dim=1, keepdim=True) / old.square().sum(dim=1, keepdim=True)
        # Wide of rounding, which is 6e-8 in float32.
        fell = (share < 1 - 1e-6) & (share > 0) & ((d - share * old).abs() <= (1 - share) * size * 0.1)
        return fell.all() if d.numel() >= 16 else torch.zeros((), dtype=torch.bool, device=d.device)


def warn_of_decay() -> None:
    warn(
        "in this step every d was made smaller by one factor, as weight decay does: d falls below the threshold by "
        f"itself then, and is redrawn. {REMEDY} Reinitializer(..., optimizer=optimizer) looks at it itself."
    )


def _of_deepspeed(optimizer: Any) -> bool:
    return any(cls.__module__.partition(".")[0] == "deepspeed" for cls in type(optimizer).__mro__)


def _any_frozen(vectors: dict[str, nn.Parameter], names: list[str]) -> bool:
    return any(not vectors[name].requires_grad for name in names)
