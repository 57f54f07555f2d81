"""What is given in place of a model, an option or a schedule is named where it is given."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import kill
from torch import Tensor, nn

import uora_vision as uora

USES: dict[str, Callable[[Any], Any]] = {
    "inject": lambda m: uora.inject(m, rank=4),
    "plan": lambda m: uora.plan(m, rank=4),
    "load": lambda m: uora.load(m, "nowhere"),
    "save": lambda m: uora.save(m, "nowhere"),
    "merge": uora.merge,
    "unmerge": uora.unmerge,
    "remove": uora.remove,
    "verify": lambda m: uora.verify(m, torch.zeros(1)),
    "summary": uora.summary,
    "param_groups": lambda m: uora.param_groups(m, lr=1.0),
    "adapters": uora.adapters,
    "Reinitializer": uora.Reinitializer,
    "Base": uora.Base,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (None, "return"), ("vit_base_patch16_224", r"create_model\('vit_base"), (nn.Linear, "class Linear; make"),
        ({"a": torch.zeros(1)}, "load_state_dict"), (object(), "attribute"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_named(use: str, given: Any, hint: str) -> None:
    with pytest.raises(uora.OptionError, match=hint):
        USES[use](given)


@pytest.mark.parametrize("config", ["attention", 16, {"rank": 8}])
def test_what_is_no_config_is_named(vit: nn.Module, config: Any) -> None:
    with pytest.raises(uora.OptionError, match="UoraConfig"):
        uora.inject(vit, config)


@pytest.mark.parametrize("name", [None, "", 3])
def test_what_is_no_name_is_named(vit: nn.Module, name: Any) -> None:
    with pytest.raises(uora.OptionError, match="name of an adapter"):
        uora.inject(vit, rank=4, name=name)


@pytest.mark.parametrize(
    "options",
    [
        {"start": 1.2},
        {"floor": -0.1},
        {"start": 0.4},
        {"by": -0.1},
        {"by": float("nan")},
        {"start": "1"},
        {"floor": None},
    ],
)
def test_alpha_decay_is_checked_where_it_is_made(options: Any) -> None:
    with pytest.raises(uora.ConfigError, match="AlphaDecay needs"):
        uora.AlphaDecay(**options)


@pytest.mark.parametrize(
    "options",
    [{"by": 0.0}, {"by": -1e-6}, {"low": -1.0}, {"low": 1.0}, {"high": float("inf")}, {"steps": 0}, {"steps": 2.5}],
)
def test_threshold_wave_is_checked_where_it_is_made(options: Any) -> None:
    with pytest.raises(uora.ConfigError, match="ThresholdWave needs"):
        uora.ThresholdWave(**options)


@pytest.mark.parametrize("wrong", [None, -1.0, float("nan"), "0"])
def test_a_schedule_of_ones_own_must_give_a_threshold(vit: nn.Module, wrong: Any) -> None:
    reinit = uora.Reinitializer(uora.inject(vit, rank=4), threshold=lambda step: wrong)
    with pytest.raises(uora.ConfigError, match="threshold must give"):
        reinit.step()


@pytest.mark.parametrize("wrong", [0.5, torch.tensor([2.0]), torch.tensor([0.1, 0.1]), torch.tensor([torch.nan])])
def test_a_schedule_of_ones_own_must_give_shares(vit: nn.Module, wrong: Any) -> None:
    reinit = uora.Reinitializer(uora.inject(vit, rank=4), alpha=lambda draws: wrong)
    kill(vit, {"blocks.0.attn.proj.proj": [1]})
    with pytest.raises(uora.ConfigError, match="1 share"):
        reinit.step()


def test_merging_measures_nothing_where_no_output_is_of_floats(vit: nn.Module, images: Tensor) -> None:
    class Label(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = vit

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(-1)

    reports: list[uora.MergeReport] = []
    uora.merge(uora.inject(Label(), rank=4), images, on_report=reports.append)
    assert reports[0].weights == 8 and reports[0].output_error is None


def test_merging_measures_outputs_without_entries_as_zero(vit: nn.Module, images: Tensor) -> None:
    reports: list[uora.MergeReport] = []
    uora.merge(uora.inject(vit, rank=4), images[:0], on_report=reports.append)
    assert (reports[0].output_error, reports[0].output_scale) == (0.0, 0.0)


@pytest.mark.slow
def test_every_package_that_is_imported_is_declared() -> None:
    root = Path(inspect.getfile(uora)).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {d.partition(">")[0] for d in project["dependencies"]}
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('numpy', 'rich', 'timm', 'transformers', 'typer'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from uora_vision import *"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=root)
    assert declared == {"torch", "safetensors", "rich", "lazy-loader", "numpy"}
