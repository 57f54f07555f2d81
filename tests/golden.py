"""A small model whose weights are the same in every version of torch and timm, and an adapter of it, as after training.

`tests/data/adapter_v2` and `adapter_v3` were written by `save` of those format versions; `expected.safetensors` beside
them holds what loading them must give.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import uora_vision as uora

DATA = Path(__file__).parent / "data"


def numbers(count: int, start: int, scale: float) -> Tensor:
    """Exact binary fractions in no visible order, (count,)."""
    return ((torch.arange(count) * 37 + start * 101) % 127 - 63).float() * (scale / 64)


def golden_model() -> nn.Module:
    """A ViT of 5,000 parameters, filled by a formula."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2,
        num_classes=3,
    )  # fmt: skip
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(numbers(p.numel(), i, 0.25).view_as(p))
    return model.eval()


def golden_adapter() -> nn.Module:
    """Adapted, with a trained head and norms, and redrawn rows of the whole bank and of single layers."""
    model = uora.inject(golden_model(), rank=4, seed=11, train=("head", "norm"))
    fill(model, 0)
    shared = uora.Reinitializer(model, threshold=1e-3, alpha=0.3)
    layer = uora.Reinitializer(model, threshold=1e-3, alpha=0.7, scope="layer", interpolation="spherical")
    for step, reinit in enumerate((shared, layer, layer, shared)):
        for i, adapter in enumerate(uora.adapters(model).values()):
            with torch.no_grad():
                adapter.d[0, (i + step) % 4] = 0
        reinit.steps = step
        reinit.step()
        fill(model, step)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.requires_grad and ".uora." not in name:
                p.copy_(numbers(p.numel(), i, 0.5).view_as(p))
    return model


def fill(model: nn.Module, start: int) -> None:
    """Give every b and d new numbers, none of them near 0."""
    with torch.no_grad():
        for i, adapter in enumerate(uora.adapters(model).values()):
            for k, p in enumerate((adapter.b, adapter.d)):
                p.copy_(numbers(p.numel(), start + 2 * i + k, 0.5).view_as(p) + 0.00390625)


def state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that an adapter brings into a model: vectors, trained parts of the base, shared and own rows."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {f"bank.{name}": model.uora.get_buffer(name) for name in model.uora.matrices}
    for path, adapter in uora.adapters(model).items():
        for side, matrices in zip("ab", adapter.matrices(), strict=True):
            tensors |= {f"matrices.{path}.{side}{k}": m for k, m in enumerate(matrices)}
    return {name: t.detach().clone().contiguous() for name, t in tensors.items()}


def golden_images() -> Tensor:
    """(2, 3, 8, 8)."""
    return numbers(2 * 3 * 64, 5, 1.0).view(2, 3, 8, 8)
