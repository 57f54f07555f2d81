"""Parameter groups for any torch or timm optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from .inject import adapters
from .walker import head_names


def param_groups(
    model: nn.Module, lr: float, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """What an injected model trains, in groups for an optimizer.

    Args:
        lr: learning rate of b and d, and of norms and biases that train.
        head_lr: of the head; `lr` if None.
        weight_decay: of the head's matrices. Vectors never decay: a decaying d would fire by itself.

    Returns:
        Groups named `adapter`, `base`, `head` and `head_vectors`, those that are not empty.

    Raises:
        StateError: the model is not injected.
    """
    vectors = {id(p) for adapter in adapters(model).values() for p in adapter.parameters()}
    heads = head_names(model)
    groups: dict[str, list[nn.Parameter]] = {"adapter": [], "base": [], "head": [], "head_vectors": []}
    for name, p in model.named_parameters():
        if id(p) in vectors:
            groups["adapter"].append(p)
        elif p.requires_grad:
            in_head = any(name.startswith(head + ".") for head in heads)
            groups[("head" if p.dim() > 1 else "head_vectors") if in_head else "base"].append(p)
    rates = {"adapter": lr, "base": lr}
    return [
        {
            "name": name,
            "params": params,
            "lr": rates.get(name, lr if head_lr is None else head_lr),
            "weight_decay": weight_decay if name == "head" else 0.0,
        }
        for name, params in groups.items()
        if params
    ]
