"""What a call that fails must leave alone, and whether it did."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a failing call must leave alone."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "identity": {n: id(p) for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


def assert_same(before: dict[str, Any], model: nn.Module) -> None:
    after = snapshot(model)
    for part in ("classes", "grad", "identity", "training", "attributes"):
        assert before[part] == after[part], part
    for part in ("state", "buffers"):
        assert before[part].keys() == after[part].keys()
        assert all(torch.equal(t, after[part][k]) for k, t in before[part].items()), part
