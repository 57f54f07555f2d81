"""An adapted module takes and gives what it did before, whatever the code around it does with that."""

from __future__ import annotations

import pytest
import torch
from conftest import wake
from torch import Tensor, nn

import uora_vision as uora


class InPlace(nn.Module):
    """Writes into the outputs of its layers, as Llama4 and GroupViT do."""

    def __init__(self, layer: type[nn.Module] = nn.Linear, *size: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"fc1": layer(16, 64, *size), "fc2": layer(64, 16, *size)})

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["fc2"](self.mlp["fc1"](x).relu_()).add_(x)


class Apart(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["fc2"](self.mlp["fc1"](x).relu()) + x


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_(True)
    model(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


SHAPES = [(2, 5, 16), (5, 16), (16,), (2, 1, 16), (4, 300, 16), (0, 16), (1, 0, 16), (0, 0, 16)]


@pytest.mark.parametrize("options", [{}, {"dropout": 1e-9}], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_changed_in_place_and_no_tokens(shape: tuple[int, ...], options: dict[str, float]) -> None:
    torch.manual_seed(0)
    model, other = InPlace(), Apart()
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        wake(uora.inject(m, rank=4, **options), seed=1)  # type: ignore[arg-type]
    x = torch.randn(shape)
    found, want = gradients(model, x), gradients(other, x)
    assert len(found) == len(want) == 5
    for g, w in zip(found, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (16, 4, 4), (0, 16, 4, 4)])
def test_convolutions_changed_in_place(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, other = InPlace(nn.Conv2d, 1), Apart(nn.Conv2d, 1)
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        wake(uora.inject(m, rank=4, targets="*"), seed=1)
    x = torch.randn(shape)
    for g, w in zip(gradients(model, x), gradients(other, x), strict=True):
        torch.testing.assert_close(g, w)


def test_an_output_in_a_half_type_is_changed_in_place() -> None:
    model, x = wake(uora.inject(InPlace().bfloat16(), rank=4)), torch.randn(3, 7, 16, dtype=torch.bfloat16)
    assert all(g.isfinite().all() and g.any() for g in gradients(model, x))


class Reading(nn.Module):
    """Reads the weight of a layer, as BeiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.linear(x, self.fc1.weight, self.fc1.bias).relu()
        return nn.functional.linear(h, self.fc2.weight, self.fc2.bias)


def halves(weight: Tensor) -> None:
    for part in weight.chunk(2):
        part.data.normal_(generator=torch.Generator().manual_seed(7))


def assigns(module: nn.Linear) -> None:
    module.weight += 1.0


WRITES = {
    "nn.init": lambda m: nn.init.xavier_uniform_(m.weight, generator=torch.Generator().manual_seed(3)),
    "nn.init.zeros_": lambda m: nn.init.zeros_(m.weight),
    "mul_": lambda m: m.weight.mul_(2.0),
    "data": lambda m: m.weight.data.add_(1.0),
    "data =": lambda m: setattr(m.weight, "data", torch.ones(64, 16)),
    "a row": lambda m: m.weight[3].zero_(),
    "an item": lambda m: m.weight.__setitem__((slice(None), 2), 5.0),
    "+=": assigns,
    "transposed": lambda m: m.weight.t()[2].fill_(1.0),
    "detached": lambda m: m.weight.detach().copy_(torch.ones(64, 16)),
    "halves": lambda m: halves(m.weight),
    "out=": lambda m: torch.add(torch.ones(64, 16), 1.0, out=m.weight.detach()),
    "foreach": lambda m: torch._foreach_mul_([m.weight.detach()], 3.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_into_a_read_weight_is_in_the_weight(write: str) -> None:
    torch.manual_seed(0)
    plain, model = Reading(), Reading()
    model.load_state_dict(plain.state_dict())
    wake(uora.inject(model, rank=4))
    fc1, x = model.fc1, torch.rand(3, 16)
    change = fc1.weight.detach().clone() - plain.fc1.weight
    assert change.abs().max() > 0.01
    with torch.no_grad():
        WRITES[write](plain.fc1)
    with torch.no_grad():
        WRITES[write](fc1)
    want = plain.fc1.weight
    assert torch.equal(model.state_dict()["fc1.weight"], want) and not torch.equal(want, Reading().fc1.weight)
    torch.testing.assert_close(fc1.weight.detach() + 0, want + change)
    model(x).sum().backward()
    assert all(a.b.grad is not None and a.b.grad.any() for a in uora.adapters(model).values())


def test_a_read_weight_is_w_plus_dw_for_whoever_reads() -> None:
    model = wake(uora.inject(Reading(), rank=4))
    fc1 = model.fc1
    held = fc1.weight
    assert type(held * 1.0) is Tensor and held.grad is None and held.shape == (64, 16)
    other = torch.zeros(64, 16)
    other.copy_(held.detach())  # written from, not into
    want = model.state_dict()["fc1.weight"] + fc1.uora.delta_weight(torch.float32)[0]
    torch.testing.assert_close(other, want.detach())
    fc1.weight.requires_grad_(True)
    assert dict(model.named_parameters())["fc1.weight"].requires_grad


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList, nn.ModuleDict])
def test_a_container_keeps_its_members(kind: type[nn.Module]) -> None:
    layers = {"0": nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), "1": nn.Linear(8, 3)}
    model = (
        kind(layers)
        if kind is nn.ModuleDict
        else kind(*layers.values())
        if kind is nn.Sequential
        else kind(layers.values())
    )
    uora.inject(model, rank=4, targets="*", name="a")
    wake(uora.inject(model, rank=4, seed=5, targets="*", name="b"))
    assert len(model) == 2 and list(model.children()) == list(layers.values())
    for name in ("b", "a"):
        uora.activate(model, name)
        matrices = [t for path, t in model.double().named_buffers() if not path.endswith(".mark")]
        assert matrices and all(t.dtype == torch.float64 for t in matrices)
    uora.merge(model)
    assert not list(model.buffers()) and not any("uora" in n for n, _ in model.named_modules())
