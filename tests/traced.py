"""Running a small model under a trace, and what its parts are wanted to be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from uora_vision.structure.trace import Trace, Use, trace

Rows = tuple[int, ...]
PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2, "num_classes": 5}


def grouped_products_on_meta() -> bool:
    """Torch 2.11 has the grouped product of experts on meta in bfloat16 only, 2.15 in float32 too."""
    rows, ends = torch.empty(4, 16, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    try:
        torch._grouped_mm(rows, torch.empty(2, 16, 16, device="meta"), offs=ends)
    except RuntimeError:
        return False
    return True


def traced(make: Callable[[], nn.Module], *shapes: tuple[int, ...], vocabulary: int = 0) -> Trace:
    """The trace of a model, checked to be the same on the meta device and to leave the model's output as it was."""
    inputs = [torch.randint(vocabulary, s) if vocabulary else torch.randn(s) for s in shapes]
    model = make().eval()
    with torch.no_grad():
        before = model(*inputs)
        found = trace(model, tuple(inputs))
        after = model(*inputs)
    torch.testing.assert_close(tensors(after), tensors(before), rtol=0, atol=0)
    with torch.device("meta"):
        hollow = make()
    assert trace(hollow, tuple(t.to("meta") for t in inputs)) == found
    return found


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [t for value in values for t in tensors(value)]


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, **options)


def by_heads(heads: int, *sizes: int) -> list[Rows]:
    """Rows that are laid out (heads, sum of sizes), split along the second."""
    rows = torch.arange(heads * sum(sizes)).view(heads, -1).split(list(sizes), 1)
    return [tuple(part.flatten().tolist()) for part in rows]


def in_turn(*sizes: int) -> list[Rows]:
    return by_heads(1, *sizes)


def qkv(parts: list[Rows]) -> dict[str, Rows]:
    return dict(zip("qkv", parts, strict=True))


def check_packed(found: Trace, name: str, parts: list[Rows]) -> None:
    assert found.rows[name] == tuple(parts)
    assert found.flows[name] == qkv(parts)


def only_use(found: Trace, name: str) -> Use:
    (use,) = found.uses[name]
    return use


LEVIT = {"img_size": 64, "embed_dim": (16, 24), "key_dim": 4, "depth": (1, 1), "num_heads": (2, 3), "num_classes": 5}


# Laws


class Packed(nn.Module):
    """A Linear whose output is handled as told."""

    def __init__(self, out: int, use: Callable[[Tensor], Any], width: int = 6) -> None:
        super().__init__()
        self.packed = nn.Linear(width, out)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(self.packed(x))


def packed(out: int, use: Callable[[Tensor], Any]) -> Trace:
    return traced(lambda: Packed(out, use), (2, 5, 6))
