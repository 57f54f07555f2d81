"""One reading of a model: how often a call walks through the modules of a model, and what a survey says of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import small_vit, wake
from torch import nn

import uora_vision as uora
from uora_vision.structure.survey import Survey, held_at

WALKS = ("named_modules", "modules", "named_parameters", "parameters", "named_buffers", "buffers")

EXAMPLE = torch.zeros(2, 3, 32, 32)

Counting = Callable[[nn.Module], Counter[str]]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """Starts to count the walks through a model, those too that torch makes to answer another."""
    made: Counter[str] = Counter()
    watched: list[nn.Module] = []

    def wrap(name: str) -> None:
        original = getattr(nn.Module, name)

        def walk(self: nn.Module, *args: object, **kwargs: object) -> object:
            if any(self is model for model in watched):
                made[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, walk)

    for name in WALKS:
        wrap(name)

    def start(model: nn.Module) -> Counter[str]:
        watched[:] = [model]
        made.clear()
        return made

    yield start


class TestWalks:
    """Through a small ViT, by what torch itself counts: `parameters` is one of its own, of `named_parameters` and of
    `named_modules`."""

    def test_the_count_counts(self, counting: Counting) -> None:
        made = counting(model := small_vit())
        list(model.parameters())
        assert made == {"parameters": 1, "named_parameters": 1, "named_modules": 1}

    @pytest.mark.parametrize(
        "options", [{}, {"targets": "blocks.0.attn.qkv"}, {"targets": "all", "exclude": "blocks.1.*"}], ids=str
    )
    def test_plan(self, options: dict[str, str], counting: Counting) -> None:
        made = counting(model := small_vit())
        uora.plan(model, **options)
        assert 0 < made.total() <= 1

    def test_plan_with_an_example(self, counting: Counting) -> None:
        made = counting(model := small_vit())
        uora.plan(model, example_input=EXAMPLE)
        assert 0 < made.total() <= 3

    def test_plan_of_a_model_that_hides_a_weight(self, counting: Counting) -> None:
        model = small_vit()
        nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)
        made = counting(model)
        uora.plan(model, exclude="blocks.0.mlp.fc1")
        assert 0 < made.total() <= 1

    @pytest.mark.parametrize("train", [("head",), ("head", "norm", "bias"), ()], ids=str)
    def test_inject(self, train: tuple[str, ...], counting: Counting) -> None:
        made = counting(model := small_vit())
        uora.inject(model, rank=4, train=train)
        assert 0 < made.total() <= 2

    def test_inject_with_an_example(self, counting: Counting) -> None:
        made = counting(model := small_vit())
        uora.inject(model, rank=4, example_input=EXAMPLE)
        assert 0 < made.total() <= 5

    def test_a_second_inject(self, counting: Counting) -> None:
        made = counting(model := uora.inject(small_vit(), rank=4))
        uora.inject(model, rank=8, name="second")
        assert 0 < made.total() <= 10  # the first is taken out and put back for the plan, each wholly or not at all

    def test_load(self, counting: Counting, tmp_path: Path) -> None:
        uora.save(wake(uora.inject(small_vit(), rank=4)), tmp_path)
        made = counting(model := small_vit())
        uora.load(model, tmp_path)
        assert 0 < made.total() <= 3

    def test_a_second_load_with_a_base_that_is_kept(self, counting: Counting, tmp_path: Path) -> None:
        uora.save(wake(uora.inject(small_vit(), rank=4)), tmp_path)
        base = uora.Base(model := small_vit())
        uora.load(model, tmp_path, base=base, name="first")
        made = counting(model)
        uora.load(model, tmp_path, base=base, name="second", activate=False)
        assert made.total() == 0
        uora.load(model, tmp_path, base=base, name="third")
        assert 0 < made.total() <= 3

    def test_an_adapter_beside_others_is_added_wholly_or_not_at_all(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        uora.save(wake(uora.inject(small_vit(), rank=4)), tmp_path)
        uora.load(model := small_vit(), tmp_path, name="first")
        before, trained = uora.adapter_names(model), [p.requires_grad for p in model.parameters()]
        with monkeypatch.context() as patch:
            patch.setattr(nn.Parameter, "requires_grad_", lambda *_: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                uora.load(model, tmp_path, name="second", activate=False)
        assert uora.adapter_names(model) == before == ["first"]
        assert [p.requires_grad for p in model.parameters()] == trained
        uora.load(model, tmp_path, name="second", activate=False)
        assert uora.adapter_names(model) == ["first", "second"]

    @pytest.mark.parametrize("save_banks", [None, "changed", "all"])
    def test_save(self, save_banks: str | None, counting: Counting, tmp_path: Path) -> None:
        made = counting(model := wake(uora.inject(small_vit(), rank=4)))
        uora.save(model, tmp_path, save_banks=save_banks)
        assert 0 < made.total() <= 1


class Tied(nn.Module):
    """One module at two places, one parameter in two modules, a buffer, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.other = nn.Linear(4, 4)
        self.other.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(1))


def tensors_under_every_name(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class TestSurvey:
    @pytest.mark.parametrize("make", [Tied, small_vit, lambda: uora.inject(small_vit(), rank=4)])
    def test_names_and_tensors_are_those_of_torch(self, make: Callable[[], nn.Module]) -> None:
        model = make()
        survey = Survey(model)
        for mine, torchs in (
            (survey.parameters, dict(model.named_parameters())),
            (survey.buffers, dict(model.named_buffers())),
        ):
            assert list(mine) == list(torchs)
            assert all(held.tensor is torchs[name] for name, held in mine.items())
        assert survey.modules == dict(model.named_modules())

    def test_a_tied_parameter_is_listed_under_each_name_of_its_own_modules(self) -> None:
        survey = Survey(Tied())
        assert {"first.weight", "other.weight"} <= survey.weights.keys() and "again.weight" not in survey.weights
        assert "other.weight" not in survey.parameters

    def test_a_place_holds_what_is_there_now(self) -> None:
        model = small_vit()
        held = Survey(model).parameters["head.weight"]
        model.head.weight = nn.Parameter(torch.zeros(7, 64))
        assert held.tensor is model.head.weight

    @pytest.mark.parametrize("name", ["first.weight", "again.weight", "norm.running_mean", "scale"])
    def test_a_tensor_is_found_by_its_name(self, name: str) -> None:
        model = Tied()
        held = held_at(model, name)
        assert held is not None and held.tensor is dict(tensors_under_every_name(model))[name]

    def test_a_tensor_of_a_scripted_module_is_found(self) -> None:
        model = small_vit()
        model.head = torch.jit.script(model.head)
        held = held_at(model, "head.weight")
        assert held is not None and held.tensor.shape == (7, 64)
        assert held_at(model, "head.none") is None

    @pytest.mark.parametrize("name", ["", "first", "first.none", "none.weight", "first.weight.x", "norm.momentum"])
    def test_what_is_no_tensor_is_not_found(self, name: str) -> None:
        assert held_at(Tied(), name) is None

    def test_each_part_is_found_out_once(self) -> None:
        survey = Survey(small_vit())
        for name in ("modules", "weights", "parameters", "buffers", "tensors", "heads", "hidden", "shown",
                     "candidates", "findings"):  # fmt: skip
            assert getattr(survey, name) is getattr(survey, name), name

    def test_adapters_take_turns_over_a_scripted_head(self, tmp_path: Path) -> None:
        first, second = small_vit(), small_vit(seed=1)
        for model in (first, second):
            model.head = torch.jit.script(model.head)
        want = second.head.weight.detach().clone()
        own = first.head.weight.detach().clone()
        uora.save(uora.inject(second, rank=4), tmp_path)
        uora.inject(first, rank=4)
        uora.load(first, tmp_path, name="second", check_base=False)
        assert torch.equal(first.head.weight, want) and not torch.equal(want, own) and first.head.weight.requires_grad
        uora.activate(first, "default")
        assert torch.equal(first.head.weight, own)

    def test_a_head_that_is_tied_to_a_frozen_part_trains_by_its_first_name(self) -> None:
        model = small_vit(num_classes=64)
        model.blocks[0].attn.proj.bias = model.head.bias
        uora.inject(model, rank=4, targets="mlp")
        trained = {name for name, p in model.named_parameters() if p.requires_grad and ".uora." not in name}
        assert trained == {"blocks.0.attn.proj.bias", "head.weight"}
