"""The adapted convolution, against W + dW written out in float64 and convolved by torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import wake
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d

import uora_vision as uora
from uora_vision.maths.convolution import Geometry, convolve
from uora_vision.maths.update import Update
from uora_vision.weights.matrix import Span, Spans

CONV: dict[int, Any] = {1: conv1d, 2: conv2d, 3: conv3d}
WHOLE = ((0, 6), (6, 6))


@dataclass
class Case:
    """Inputs of one convolution, 12 channels out."""

    weight: Tensor
    bias: Tensor | None
    geometry: Geometry
    spans: Spans
    b: Tensor
    d: Tensor
    a: list[Tensor]
    bm: list[Tensor]
    dims: int = field(init=False)

    def __post_init__(self) -> None:
        self.dims = self.weight.dim() - 2

    @property
    def update(self) -> Update:
        return Update(self.b, self.d, self.spans, tuple(self.a), tuple(self.bm))

    def call(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.geometry, self.update)

    def draw_input(self, batch: int = 2, size: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(batch, self.weight.shape[1] * self.geometry.groups, *[size] * self.dims).to(dtype)


def case(
    spans: tuple[tuple[int, ...], ...] = WHOLE,
    kernel: int = 3,
    dims: int = 2,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    width: int = 4,
    rank: int = 3,
    bias: bool = True,
    own: bool = False,
    base: torch.dtype = torch.float64,
    vectors: torch.dtype = torch.float64,
) -> Case:
    """`own`: every role has an A and a B of its own, as after a firing in the scope of a layer."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    given, n, points = tuple(Span(*s) for s in spans), len(spans), width * kernel**dims
    one_b = not own and len({s.rows for s in given}) == 1
    return Case(
        weight=(draw(12, width, *[kernel] * dims) / points**0.5).to(base),
        bias=draw(12).to(base) if bias else None,
        geometry=Geometry(*[(value,) * dims for value in (stride, padding, dilation)], groups),
        spans=given,
        b=draw(sum(s.rows for s in given)).to(vectors),
        d=draw(n, rank).to(vectors),
        a=[(draw(rank, points) / points**0.5).to(base) for _ in range(n if own else 1)],
        bm=[(draw(s.rows, rank) / rank**0.5).to(base) for s in given[: 1 if one_b else n]],
    )


def reference_weight(c: Case, weight: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """W + diag(b) B diag(d) A, output channel by output channel."""
    kernels = list(weight.flatten(1))
    first = 0
    for k, span in enumerate(c.spans):
        a, bm = c.a[k % len(c.a)].double(), c.bm[k % len(c.bm)].double()
        for i, row in enumerate(span.indices()):
            kernels[row] = kernels[row] + b[first + i] * ((bm[i] * d[k]) @ a)
        first += span.rows
    return torch.stack(kernels).view(weight.shape)


def reference(c: Case, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of sum(y * g), in float64 by plain autograd."""
    x, weight, b, d = (t.detach().double().requires_grad_() for t in (x, c.weight, c.b, c.d))
    bias = None if c.bias is None else c.bias.detach().double().requires_grad_()
    y = CONV[c.dims](x, reference_weight(c, weight, b, d), bias, *c.geometry)
    (y * g.double()).sum().backward()
    grads = {"x": x.grad, "weight": weight.grad, "b": b.grad, "d": d.grad, "bias": None if bias is None else bias.grad}
    return {"y": y.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}


def measured(c: Case, x: Tensor, g: Tensor, train_weight: bool = False) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    leaves = {"x": x, "b": c.b.requires_grad_(), "d": c.d.requires_grad_()}
    if c.bias is not None:
        leaves["bias"] = c.bias.requires_grad_()
    if train_weight:
        leaves["weight"] = c.weight.requires_grad_()
    y = c.call(x)
    grads = torch.autograd.grad((y * g.to(y.dtype)).sum(), list(leaves.values()))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    for name, value in got.items():
        error = largest(value.double() - want[name]) / max(largest(want[name]), 1e-3)
        assert value.shape == want[name].shape and error <= tolerance, f"{name}: {error:.3g} of its scale"


def compare(c: Case, x: Tensor, tolerance: float = 1e-12, train_weight: bool = False) -> dict[str, Tensor]:
    shape = CONV[c.dims](x.double(), c.weight.double(), None, *c.geometry).shape
    g = torch.randn(shape, dtype=torch.float64).to(x.dtype)
    got = measured(c, x, g, train_weight)
    assert_agree(got, reference(c, x, g), tolerance)
    return got


GEOMETRIES: dict[str, dict[str, Any]] = {
    "1x1": {"kernel": 1},
    "1x1 apart": {"kernel": 1, "stride": 2},
    "3x3": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "strided past the end": {"stride": 3, "padding": 0},
    "dilated": {"dilation": 2, "padding": 2},
    "1-D": {"dims": 1, "padding": 2},
    "3-D": {"dims": 3, "stride": 2, "padding": 1},
    "groups": {"groups": 2, "padding": 1},
    "groups in 1-D": {"groups": 2, "dims": 1, "stride": 2},
    "1x1 groups": {"groups": 2, "kernel": 1},
    "one of two groups": {"groups": 2, "spans": ((6, 6),)},
    "unequal roles": {"spans": ((0, 2), (2, 10))},
    "some rows": {"spans": ((1, 3), (8, 2))},
    "interleaved": {"spans": ((0, 6, 3, 6), (3, 6, 3, 6))},
    "wide rank": {"rank": 40},
}


@pytest.mark.parametrize("how", ["shared", "own", "trained weight", "no bias"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_output_and_gradients_follow_the_formula(geometry: str, how: str) -> None:
    c = case(**GEOMETRIES[geometry], own=how == "own", bias=how != "no bias")
    compare(c, c.draw_input(size=5 if c.dims == 3 else 8), train_weight=how == "trained weight")


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [2, 30])
def test_gradcheck(rank: int, groups: int) -> None:
    c = case(groups=groups, width=2, rank=rank)
    leaves = tuple(t.requires_grad_() for t in (c.draw_input(1, 3), c.bias, c.b, c.d) if t is not None)
    run = lambda x, bias, b, d: convolve(x, c.weight, bias, c.geometry, c.update._replace(b=b, d=d))  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_an_image_without_a_batch_and_a_batch_without_images(groups: int, own: bool) -> None:
    c = case(groups=groups, own=own)
    compare(c, c.draw_input()[0])
    got = compare(c, c.draw_input(batch=0))
    assert got["y"].shape == (0, 12, 5, 5) and not got["b"].any()


@pytest.mark.parametrize("rank", [3, 40])
def test_channels_last(rank: int) -> None:
    c = case(rank=rank, padding=1)
    x = c.draw_input().to(memory_format=torch.channels_last)
    got = compare(c, x)
    assert got["y"].stride() == conv2d(x, c.weight, None, *c.geometry).stride()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("base", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_base_types(base: torch.dtype, tolerance: float, groups: int, own: bool) -> None:
    c = case(groups=groups, own=own, base=base, vectors=torch.float32)
    got = compare(c, c.draw_input(dtype=base), tolerance)
    assert got["y"].dtype == got["x"].dtype == got["bias"].dtype == base and got["b"].dtype == torch.float32
    with torch.no_grad():
        assert_agree({"y": c.call(x := c.draw_input(dtype=base))}, {"y": plain(c, x)}, tolerance)


def plain(c: Case, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = reference_weight(c, c.weight.double(), c.b.double(), c.d.double())
        return CONV[c.dims](x.double(), weight, None if c.bias is None else c.bias.double(), *c.geometry)


@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_type_and_leaves_gradients_in_theirs(base: torch.dtype, train_weight: bool) -> None:
    c = case(base=base, vectors=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = compare(c, c.draw_input(dtype=torch.float32), 2e-2, train_weight)
        assert c.call(c.draw_input(dtype=torch.float32)).dtype == torch.bfloat16
    assert got["x"].dtype == got["b"].dtype == got["d"].dtype == torch.float32 and got["bias"].dtype == base


@pytest.mark.parametrize("how", ["shared", "own", "trained weight"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_a_young_update_of_a_half_kernel_acts(base: torch.dtype, how: str) -> None:
    """One so small that nearly all of W + dW rounds to W: the weights are as good as 1, the outputs 0 without it."""
    c = case(own=how == "own", base=base, vectors=torch.float32, bias=False, width=2)
    c.weight.copy_(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand_as(c.weight))
    c.b *= 0.05 * torch.finfo(base).eps
    exact = reference_weight(c, c.weight.double(), c.b.double(), c.d.double())
    assert (exact.to(base) == c.weight).float().mean() > 0.95
    c.weight.requires_grad_(how == "trained weight")
    x = torch.ones(1, 2, 3, 3, dtype=base)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = c.call(x)
        want = plain(c, x)
        assert (y.double() - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("channels", "rank", "kept_of_x"), [(2, 8, True), (16, 2, False)])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_the_smaller_of_input_and_reduced_input_is_all_that_is_kept(
    base: torch.dtype, channels: int, rank: int, kept_of_x: bool, groups: int
) -> None:
    c = case(width=channels, rank=rank, groups=groups, padding=1, base=base, vectors=torch.float32)
    c.b.requires_grad_(), c.d.requires_grad_()
    known = {t.data_ptr() for t in (c.weight, c.bias, c.b, c.d, *c.a, *c.bm) if t is not None}
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            kept.append(t.numel())
        return t

    x = c.draw_input(dtype=base).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        c.call(x)
    assert sum(kept) == 2 * 7 * 7 * groups * (channels if kept_of_x else rank)


MODULES: dict[str, tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "1x1": (nn.Conv2d, {"kernel_size": 1}, (4, 6, 6)),
    "padded": (nn.Conv2d, {"kernel_size": 3, "padding": (1, 2), "stride": (2, 1)}, (4, 6, 6)),
    "same": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": 2}, (4, 6, 6)),
    "same, even": (nn.Conv2d, {"kernel_size": 4, "padding": "same"}, (4, 6, 6)),
    "valid": (nn.Conv2d, {"kernel_size": (3, 1), "padding": "valid", "bias": False}, (4, 6, 6)),
    "circular": (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (4, 6, 6)),
    "reflect, same": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"}, (4, 6, 6)),
    "groups": (nn.Conv2d, {"kernel_size": 3, "groups": 2}, (4, 6, 6)),
    "1-D": (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 1}, (4, 9)),
    "1-D, circular": (
        nn.Conv1d, {"kernel_size": 3, "groups": 2, "padding": 2, "padding_mode": "circular"}, (4, 9),
    ),
    "3-D": (nn.Conv3d, {"kernel_size": 2, "padding": "same", "groups": 2}, (4, 4, 5, 4)),
}  # fmt: skip


def module(name: str) -> tuple[nn.Module, Tensor]:
    make, options, shape = MODULES[name]
    return nn.Sequential(make(4, 6, **options)), torch.randn(2, *shape)


class TestModules:
    @pytest.mark.parametrize("name", MODULES)
    def test_with_b_zero_the_output_is_that_of_the_base_to_the_bit(self, name: str) -> None:
        model, x = module(name)
        base, one = model(x), model(x[0])
        uora.inject(model, targets="conv", rank=3)
        assert torch.equal(model(x), base) and torch.equal(model(x[0]), one)
        with torch.no_grad():
            assert torch.equal(model(x), base)

    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("name", MODULES)
    def test_it_computes_what_torch_does_with_the_sum_of_the_weights(self, name: str, own: bool) -> None:
        model, x = module(name)
        dense = copy.deepcopy(model).double()
        wake(uora.inject(model, targets="conv", rank=3))
        adapter = uora.adapters(model)["0"]
        assert len(adapter.roles) == model[0].groups
        if own:
            with torch.no_grad():
                adapter.d[-1, 1:] = 0
            uora.Reinitializer(model, scope="layer").step()
            wake(model, seed=2)
            assert len(adapter.matrices()[0]) == len(adapter.roles) and adapter._own
        change = torch.cat(adapter.delta_weight(torch.float64)).view_as(dense[0].weight)
        dense[0].weight = nn.Parameter(dense[0].weight + change.detach())
        want = dense(x.double())
        torch.testing.assert_close(model(x).double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x[0]).double(), dense(x[0].double()), rtol=1e-5, atol=1e-5)
        g = torch.randn_like(want)
        x64, x32 = x.double().requires_grad_(), x.clone().requires_grad_()
        (dense(x64) * g).sum().backward(), (model(x32) * g).sum().backward()
        assert x32.grad is not None and x64.grad is not None
        torch.testing.assert_close(x32.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
        uora.merge(model)
        torch.testing.assert_close(model(x).double(), want, rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["same", "1-D, circular"])
    def test_compiled_as_one_graph(self, name: str) -> None:
        model, x = module(name)
        wake(uora.inject(model, targets="conv", rank=3))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        vectors = [p for p in model.parameters() if p.requires_grad]
        want, got = model(x), compiled(x)
        torch.testing.assert_close(got, want)
        g = torch.randn_like(want)
        for one, two in zip(torch.autograd.grad(got, vectors, g), torch.autograd.grad(want, vectors, g), strict=True):
            torch.testing.assert_close(one, two)

    def test_dropout_acts_on_the_branch_while_training(self) -> None:
        model, x = module("padded")
        base = model(x)
        wake(uora.inject(model.train(), targets="conv", rank=3, dropout=0.5))
        with torch.no_grad():
            draws = torch.stack([model(x) - base for _ in range(200)])
            change = model.eval()(x) - base
        assert (draws[0] - draws[1]).norm() > 0.1 * change.norm()
        assert (draws.mean(0) - change).norm() < 0.2 * change.norm()
