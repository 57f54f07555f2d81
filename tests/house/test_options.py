"""Options are keyword parameters with types; a wrong name is answered with the one that was meant."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_vit

import uora_vision as uora

OF_CONFIG: dict[str, Callable[..., Any]] = {
    "inject": uora.inject, "plan": uora.plan, "replace": uora.UoraConfig.replace,
}  # fmt: skip

OF_REINITIALIZER = (
    ("accelerate", "AcceleratedReinitializer"), ("accelerate", "prepare_reinitializer"), ("lightning", "UoraCallback"),
    ("transformers", "UoraCallback"),
)  # fmt: skip


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and types of what is given by keyword alone."""
    init = function.__init__ if isinstance(function, type) else function
    types = typing.get_type_hints(inspect.unwrap(init))
    parameters = inspect.signature(function).parameters.values()
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)
    return {p.name: types[p.name] for p in parameters if p.kind == p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", OF_CONFIG)
def test_the_options_of_a_config_are_keywords_with_their_types(name: str) -> None:
    types = typing.get_type_hints(uora.UoraConfig)
    fields = {field.name: types[field.name] for field in dataclasses.fields(uora.UoraConfig)}
    found = keywords(OF_CONFIG[name])
    assert {option: found[option] for option in fields} == fields
    assert found.keys() - fields.keys() == (
        {"inject": {"name", "example_input"}, "plan": {"example_input"}}.get(name, set())
    )


@pytest.mark.parametrize(("module", "name"), OF_REINITIALIZER)
def test_the_options_of_a_reinitializer_are_keywords_with_their_types(module: str, name: str) -> None:
    pytest.importorskip("pytorch_lightning" if module == "lightning" else module, reason=f"{module} is not installed")
    types = typing.get_type_hints(inspect.unwrap(uora.Reinitializer.__init__))
    options = {n: t for n, t in types.items() if n not in ("model", "optimizer", "return")}
    found = keywords(getattr(importlib.import_module(f"uora_vision.integrations.{module}"), name))
    assert {option: found[option] for option in options} == options
    assert found.keys() - options.keys() == ({"inform", "inform_loss"} if name == "UoraCallback" else set())


def test_every_option_reaches_the_plan() -> None:
    options: dict[str, Any] = {
        "rank": 5, "targets": "attention", "exclude": "k", "blocks": (1,), "d_init": 0.2, "seed": 3, "layout": "slice",
        "init": "kaiming", "dropout": 0.1, "token_sampling": 1, "train": ("norm",),
    }  # fmt: skip
    want = uora.UoraConfig(**options)
    assert uora.plan(small_vit(), **options).config == want
    assert uora.plan(small_vit(), uora.UoraConfig(token_sampling=4, blocks=(0,)), **options).config == want
    config = uora.UoraConfig(rank=5, blocks=(1,))
    assert uora.plan(small_vit(), config).config == config, "what is left out is as in the config"
    assert uora.plan(small_vit(), config, blocks=None).config == uora.UoraConfig(rank=5), "None is a value"
    model = uora.inject(small_vit(), **options)
    assert uora.adapters(model)["blocks.1.attn.qkv"].bank.config == want


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("r", "rank"), ("target_modules", "targets"), ("lora_alpha", "d_init"), ("modules_to_save", "train"),
        ("lora_dropout", "dropout"), ("exclude_modules", "exclude"), ("layers_to_transform", "blocks"),
        ("ranks", "rank"), ("target", "targets"), ("tokens_sampling", "token_sampling"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("call", ["inject", "plan", "replace", "UoraConfig"])
def test_a_wrong_name_is_answered_with_the_right_one(call: str, wrong: str, meant: str) -> None:
    model = small_vit()
    calls: dict[str, Callable[..., Any]] = {
        "inject": lambda **o: uora.inject(model, **o), "plan": lambda **o: uora.plan(model, **o),
        "replace": uora.UoraConfig().replace, "UoraConfig": uora.UoraConfig,
    }  # fmt: skip
    with pytest.raises(uora.OptionError, match=f"no option '{wrong}'; did you mean '{meant}'"):
        calls[call](**{wrong: 8})
    with pytest.raises(uora.OptionError, match=r"no option 'zzz'; there are .*rank"):
        calls[call](zzz=8)
    assert not hasattr(model, "uora")


def test_a_reinitializer_names_what_was_meant() -> None:
    model = uora.inject(small_vit(), rank=4)
    with pytest.raises(uora.OptionError, match="no option 'treshold'; did you mean 'threshold'"):
        uora.Reinitializer(model, treshold=1e-5)  # type: ignore[call-arg]


def test_a_warning_points_to_the_line_that_called(tmp_path: Path) -> None:
    with pytest.warns(uora.UoraWarning, match="half type") as of_inject:
        model = uora.inject(torch.nn.TransformerEncoderLayer(16, 2, 32).bfloat16(), rank=4)
    uora.save(model, tmp_path)
    with pytest.warns(uora.UoraWarning, match="half type") as of_load:
        uora.load(uora.remove(model), tmp_path)
    with pytest.warns(uora.UoraWarning, match="decay") as of_init:
        uora.Reinitializer(model, optimizer=torch.optim.AdamW(model.parameters()))
    model.norm1.weight.requires_grad_(True)
    with pytest.warns(uora.UoraWarning, match="norm1.weight trains") as of_context, uora.disabled(model):
        pass
    assert {w.filename for said in (of_inject, of_load, of_init, of_context) for w in said} == {__file__}


@pytest.mark.parametrize(
    ("targets", "also"),
    [
        ("qkv", "the pattern '*.qkv'"), ("all-linear", "a pattern over paths"), (["q_proj", "v_proj"], "a role"),
        ("q,v", "a role"), ("blocks.0.attn.qvk", "a role"),
    ],
)  # fmt: skip
def test_a_target_of_another_library_is_answered_with_those_of_this(targets: Any, also: str) -> None:
    with pytest.raises(uora.TargetError, match="no projection matched") as caught:
        uora.inject(small_vit(), targets=targets)
    assert "'qv', 'attention' or 'attention+mlp'" in str(caught.value) and also in str(caught.value)


def test_the_pattern_that_is_named_matches() -> None:
    assert len(uora.plan(small_vit(), targets="*.qkv").projections) == 2


def test_the_wheel_has_its_types_and_the_recipes(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (built,) = wheel.WheelBuilder(str(Path(__file__).parents[2])).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(built).namelist()
    files = [p for p in (Path(__file__).parents[2] / "recipes").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    recipes = {f"uora_vision/{p.relative_to(Path(__file__).parents[2]).as_posix()}" for p in files}
    assert len(recipes) > 50 and {"uora_vision/py.typed", "uora_vision/__init__.pyi"} | recipes <= set(names)
    assert all(name.startswith("uora_vision") for name in names)
