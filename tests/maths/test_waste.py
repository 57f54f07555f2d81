"""Nothing wasted: which operations, copies, conversions and waits an adapted model makes beyond the frozen one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import kill, small_vit, wake
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import uora_vision as uora

COPIES = ("_to_copy", "cat", "clone", "copy_", "contiguous", "stack", "index", "index_select", "index_copy", "repeat")
RANK = 8


def tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class Watch(TorchDispatchMode):
    """Every operation, by what it read and wrote. No tensor is kept: one more reference would cause copies of its own.

    Work on the `meta` device stands for work on a GPU: whatever crosses over to or from the host is counted, and 0 is
    what the host reads. Operations whose result depends on values, `nonzero` and the like, raise an error there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []
        self.written = 0
        """Numbers in the largest tensor that was made and is no view of what its operation was given."""
        self.read: Counter[tuple[str, int]] = Counter()
        """Operations by name and address of a storage that they were given and did not give a view of."""
        self.crossed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs, given = func.overloadpacket.__name__, kwargs or {}, tensors((args, kwargs or {}))
        on_meta = any(t.is_meta for t in given)
        if on_meta and name == "_local_scalar_dense":
            self.crossed.append(name)
            return 0
        if on_meta and name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.crossed.append(name)
            return torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        out = func(*args, **kwargs)
        made = tensors(out)
        # A number of the host among the operands is a tensor of no dimensions, and is not sent.
        if any(t.is_meta for t in made) and any(not t.is_meta and t.dim() for t in given):
            self.crossed.append(name)
        there, now = (set(map(address, side)) for side in (given, made))
        self.shapes += [(name, tuple(t.shape)) for t in made[:1]]
        self.written = max(self.written, *(t.numel() for t in made if address(t) not in there), 0)
        self.read.update((name, storage) for storage in there - now)
        return out

    def copies(self) -> Counter[tuple[str, tuple[int, ...]]]:
        return Counter(each for each in self.shapes if each[0] in COPIES)


def flowing(model: nn.Module) -> nn.Module:
    """With a gradient at every projection's input, and a trained head: the floor when nothing else trains."""
    model.patch_embed.register_forward_hook(lambda m, args, y: y.requires_grad_())
    return model


def floor(**options: Any) -> nn.Module:
    model = small_vit(**options).requires_grad_(False)
    model.head.requires_grad_(True)
    return flowing(model)


def adapted(own: bool = False, **options: Any) -> nn.Module:
    """With q, k and v, proj, fc1 and fc2 adapted; `own`: one layer with redrawn rows of its own."""
    model = wake(uora.inject(small_vit(**options), rank=RANK))
    if own:
        kill(model, {"blocks.0.attn.qkv.q": [1]})
        assert uora.Reinitializer(model, scope="layer").step() == 1
    return flowing(model)


def step(model: nn.Module, x: Tensor) -> Watch:
    with Watch() as watch:
        model(x).square().sum().backward()
    return watch


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("patch", [4, 8])
def test_a_step_never_waits_for_the_device_nor_sends_to_it(patch: int, own: bool) -> None:
    """On tensors without values: reading one, to choose a branch or a size, is seen or raises an error."""
    model = adapted(own, patch_size=patch).to("meta")
    assert step(model, torch.randn(1, 3, 32, 32, device="meta")).crossed == []
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("scope", ["shared", "quorum", "layer"])
def test_reinitialisation_without_a_firing_fetches_one_tensor(scope: Any, relative: bool, every: int) -> None:
    """The host sees one copy from the device in a step, and sends nothing there; its decision rests on that copy."""
    model = adapted().to("meta")
    reinit = uora.Reinitializer(model, scope=scope, relative=relative, every=every)
    with Watch() as watch:
        assert reinit.step() == 0
    assert watch.crossed == ["_to_copy"]


@pytest.mark.parametrize("images", [1, 3], ids=["one image", "three"])
@pytest.mark.parametrize("patch", [4, 8], ids=["many tokens, folded", "few, factored"])
def test_a_float32_step_copies_and_converts_nothing_more_than_the_frozen_model(patch: int, images: int) -> None:
    if patch == 8 and images == 3:
        pytest.skip("between the two: 51 tokens fold in some projections")
    x = torch.randn(images, 3, 32, 32)
    more = step(adapted(patch_size=patch), x).copies() - step(floor(patch_size=patch), x).copies()
    assert not more, more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_one_token_writes_nothing_as_large_as_the_weight(dtype: torch.dtype) -> None:
    out, width = 256, 192
    model = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, width)).to(dtype)
    wake(uora.inject(model, rank=RANK, train=()))
    written = {}
    for tokens in (1, 1000):
        with Watch() as watch, torch.no_grad():
            model[0](torch.randn(tokens, width, dtype=dtype))
        written[tokens] = watch.written
    assert written[1] == out, "the output, and nothing larger"
    assert written[1000] >= out * width, "of many tokens, W + dW or [W, L] is seen"


@pytest.mark.parametrize("train", [(), ("head",)])
def test_injection_leaves_the_values_of_the_base_alone(vit: nn.Module, train: tuple[str, ...]) -> None:
    """No operation reads a weight; only of what trains besides, the base's values are set aside."""
    before = {n: (id(p), p.data_ptr(), p._version) for n, p in vit.named_parameters()}
    names = {address(p): n for n, p in vit.named_parameters()}
    with Watch() as watch:
        uora.inject(vit, rank=RANK, train=train)
    read = {(op, names[storage]): n for (op, storage), n in watch.read.items() if storage in names}
    assert read == {("clone", name): 1 for name in ("head.weight", "head.bias") if train}
    after = {n: (id(p), p.data_ptr(), p._version) for n, p in vit.named_parameters()}
    assert before.items() <= after.items()
