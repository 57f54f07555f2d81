"""Small real models for the core's tests."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from torch import Tensor, nn

import uora_vision as uora

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core, each of one thread
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7,
}  # fmt: skip


def need_timm(name: str) -> None:
    """Skip a test of a model that timm before 1.0.31 does not have."""
    if "/" in name and not name.startswith("timm/"):
        return
    if Version(timm.__version__) < Version("1.0.31") and not timm.is_model(name.removeprefix("timm/")):
        pytest.skip(f"timm {timm.__version__} has no {name}")


def mostly_slow(names: Iterable[str], *quick: str) -> list[Any]:
    """Parameters of a test, of which only some are among the quick tests."""
    names = list(names)
    assert set(quick) <= set(names)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def small_vit(seed: int = 0, **options: Any) -> nn.Module:
    """A timm ViT of 0.1M parameters over 32 x 32 images, in eval mode, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options})
        with torch.no_grad():  # timm starts biases at 0, which would hide a bias that is lost
            for name, p in model.named_parameters():
                if name.endswith("bias"):
                    p.normal_(std=0.1)
    return model.eval()


def wake(model: nn.Module, scale: float = 1.0, seed: int = 1) -> nn.Module:
    """Give every b and d of an injected model values as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in uora.adapters(model).values():
            adapter.b.copy_(scale * torch.randn(adapter.b.shape, generator=generator))
            adapter.d.copy_(scale * torch.randn(adapter.d.shape, generator=generator))
    return model


def merged(model: nn.Module, **options: Any) -> nn.Module:
    """A model after `merge`."""
    uora.merge(model, **options)
    return model


def kill(model: nn.Module, places: dict[str, list[int]], value: float = 0.0) -> None:
    """Set some d_i, by role name (`blocks.0.attn.qkv.q`)."""
    with torch.no_grad():
        for name, indices in places.items():
            path, _, role = name.rpartition(".")
            adapter = uora.adapters(model)[path]
            row = [r.name for r in adapter.roles].index(role)
            adapter.d[row, indices] = value


def trained(
    make: Callable[[], nn.Module] = small_vit,
    scope: str | None = None,
    steps: int = 6,
    interpolation: Any = "linear",
    **options: Any,
) -> nn.Module:
    """A model as after training: other b, d and head than at the start, and some firings.

    Firings take long: of one that was made before, in the same state of the generator, it is a copy.
    """
    if scope is None:
        return _trained(make, None, steps, interpolation, options)
    key = (make, scope, steps, repr((interpolation, options)), torch.get_rng_state().numpy().tobytes())
    if " at 0x" in key[3]:  # the address of an object tells nothing of it
        return _trained(make, scope, steps, interpolation, options)
    if key not in _MADE:
        _MADE[key] = _trained(make, scope, steps, interpolation, options), torch.get_rng_state()
    model, after = _MADE[key]
    torch.set_rng_state(after)
    return copy.deepcopy(model)


_MADE: dict[tuple[Any, ...], tuple[nn.Module, Tensor]] = {}


def _trained(
    make: Callable[[], nn.Module], scope: str | None, steps: int, interpolation: Any, options: dict[str, Any]
) -> nn.Module:
    model = wake(uora.inject(make(), **{"rank": 8, **options}))
    with torch.no_grad():
        model.head.weight.normal_(), model.head.bias.normal_()
    if scope is not None:
        options = {"quorum": 0.1, "alpha": 0.3, "threshold": 1e-3, "interpolation": interpolation}
        reinit = uora.Reinitializer(model, scope=scope, **options)  # type: ignore[arg-type]
        for step in range(steps):
            kill(model, {name: [step % 6, step % 6 + 2] for name in reinit.layers[step % 6 :: 2]})
            reinit.step()
        assert reinit.firings > 0
        wake(model, seed=3)
    return model


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@pytest.fixture
def vit() -> nn.Module:
    return small_vit()


@pytest.fixture
def make_vit() -> Callable[..., nn.Module]:
    return small_vit


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def injected(model: nn.Module, rank: int = 8, **options: Any) -> nn.Module:
    return wake(uora.inject(model, rank=rank, **options).eval())


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def banks(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.uora.get_buffer(name).clone() for name in model.uora.matrices}
