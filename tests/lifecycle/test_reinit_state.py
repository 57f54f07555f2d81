"""A run's reinitialisation state: continued to the bit, refused elsewhere; what a step waits for; bad options."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import banks, injected, outputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import uora_vision as uora

Make = Callable[..., nn.Module]


def drive(model: nn.Module, reinit: uora.Reinitializer, steps: range) -> None:
    """Steps in which every step kills other indices."""
    for step in steps:
        g = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for a in uora.adapters(model).values():
                a.d.copy_(torch.randn(a.d.shape, generator=g))
                a.d[torch.rand(a.d.shape, generator=g) < 0.1] = 0
        reinit.step()


class TestState:
    @pytest.mark.parametrize("scope", ["shared", "quorum", "layer"])
    @pytest.mark.parametrize("interpolation", ["linear", "spherical"])
    def test_a_run_continues_to_the_bit_from_its_state(
        self, make_vit: Make, images: Tensor, scope: str, interpolation: str, tmp_path: Any
    ) -> None:
        options: dict[str, Any] = {"scope": scope, "interpolation": interpolation, "every": 2, "quorum": 0.1}
        options |= {"alpha": uora.AlphaDecay(0.9), "threshold": 1e-3}
        whole, first, second = (injected(make_vit()) for _ in range(3))
        one = uora.Reinitializer(whole, **options)
        drive(whole, one, range(12))
        two = uora.Reinitializer(first, **options)
        drive(first, two, range(6))
        torch.save(two.state_dict(), tmp_path / "state.pt")
        three = uora.Reinitializer(second, **options)
        drive(second, three, range(50, 52))  # what it did before must not matter
        three.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert three.firings == two.firings and three.steps == 6
        drive(second, three, range(6, 12))
        assert one.firings > 20
        assert (one.history() == three.history()).all()
        assert torch.equal(one._counts, three._counts)
        assert all(torch.equal(t, banks(second)[n]) for n, t in banks(whole).items())
        assert torch.equal(outputs(whole, images), outputs(second, images))

    def test_a_state_taken_does_not_move_with_the_run(self, vit: nn.Module) -> None:
        model = injected(vit)
        reinit = uora.Reinitializer(model)
        drive(model, reinit, range(2))
        state = reinit.state_dict()
        before = copy.deepcopy(state)
        drive(model, reinit, range(2, 5))
        assert torch.equal(state["counts"], before["counts"]) and torch.equal(state["history"], before["history"])
        assert torch.equal(state["log"]["entries"], before["log"]["entries"])

    def test_a_state_of_another_model_is_refused(self, make_vit: Make) -> None:
        state = uora.Reinitializer(injected(make_vit(), rank=8)).state_dict()
        for other in (injected(make_vit(), rank=9), injected(make_vit(), targets="qv"), injected(make_vit(depth=1))):
            with pytest.raises(uora.FormatError, match="other adapters or another rank"):
                uora.Reinitializer(other).load_state_dict(state)

    @pytest.mark.parametrize("option", [{"seed": 1}, {"init": "kaiming"}, {"layout": "slice"}])
    def test_a_state_over_other_banks_is_refused(self, make_vit: Make, option: dict[str, Any]) -> None:
        model = injected(make_vit())
        reinit = uora.Reinitializer(model)
        drive(model, reinit, range(2))
        other = uora.Reinitializer(injected(make_vit(), **option))
        with pytest.raises(uora.FormatError):
            other.load_state_dict(reinit.state_dict())


class Syncs(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in (
            "_local_scalar_dense",
            "item",
            "nonzero",
            "is_nonzero",
            "equal",
            "unique",
            "masked_select",
            "_to_copy",
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("relative", [False, True])
def test_a_step_without_firing_waits_for_the_device_once_at_most(vit: nn.Module, relative: bool) -> None:
    model = injected(vit)
    reinit = uora.Reinitializer(model, threshold=0.0, relative=relative)
    with Syncs() as syncs:
        reinit.step()
    assert len(syncs.seen) <= 1, syncs.seen


class TestBadOptions:
    @pytest.mark.parametrize(
        ("option", "text"),
        [
            ({"threshold": -1.0}, "threshold"), ({"threshold": math.nan}, "threshold"),
            ({"threshold": math.inf}, "threshold"),
            ({"threshold": "small"}, "threshold"), ({"alpha": 1.5}, "alpha"), ({"alpha": -0.1}, "alpha"),
            ({"alpha": math.nan}, "alpha"), ({"alpha": None}, "alpha"), ({"every": 0}, "every"),
            ({"every": 1.5}, "every"),
            ({"every": "2"}, "every"), ({"quorum": 0.0}, "quorum"), ({"quorum": 1.1}, "quorum"),
            ({"scope": "global"}, "shared, quorum, layer"), ({"interpolation": "cubic"}, "linear, spherical"),
            ({"reset_moments": True}, "optimizer"),
        ],
    )  # fmt: skip
    def test_are_refused_by_name(self, vit: nn.Module, option: dict[str, Any], text: str) -> None:
        with pytest.raises(uora.UoraError, match=text):
            uora.Reinitializer(injected(vit), **option)

    def test_a_plain_model(self, vit: nn.Module) -> None:
        with pytest.raises(uora.StateError, match="inject"):
            uora.Reinitializer(vit)

    @pytest.mark.parametrize("layout", ["shape", "slice"])
    def test_spherical_without_room_is_refused_before_training(self, vit: nn.Module, layout: str) -> None:
        model = injected(vit, rank=64, layout=layout)
        with pytest.raises(uora.ConfigError, match="rank below every width"):
            uora.Reinitializer(model, interpolation="spherical", scope="layer")
