"""Whether two things are the same, told by a few letters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def digest_of(content: nn.Module | Iterable[Any]) -> str:
    """Of a model's parameters and buffers, by name; or of values that JSON can hold, in their order."""
    found = hashlib.sha256()
    if isinstance(content, nn.Module):
        for name, tensor in content.state_dict().items():
            if isinstance(tensor, Tensor):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        for value in content:
            found.update(json.dumps(value, sort_keys=True, default=str).encode())
            found.update(b"\n")
    return found.hexdigest()
