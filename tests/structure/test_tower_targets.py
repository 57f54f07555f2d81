"""What can be asked for in one tower, in every family of models that are made of towers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mostly_slow, small_vit, wake
from multimodal import BUILT_BY_HAND, MODELS, multimodal
from torch import nn

import uora_vision as uora

VL = {"vision": ["vision_tower"], "connector": ["multi_modal_projector"], "language": ["language_model"]}
QWEN = {"vision": ["visual"], "connector": ["visual.merger"], "language": ["language_model"]}
SAM = {"vision": ["vision_encoder"], "encoder": ["prompt_encoder"], "decoder": ["mask_decoder"]}
DETR = {"backbone": ["backbone"], "encoder": ["encoder"], "decoder": ["decoder"]}
TOWERS: dict[str, dict[str, list[str]]] = {
    "clip": {"language": ["text_model", "text_projection"], "vision": ["vision_model", "visual_projection"]},
    "llava": VL,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN | {"connector": ["visual.merger", "visual.deepstack_merger_list"]},
    "internvl": VL,
    "smolvlm": {"vision": ["vision_model"], "connector": ["connector"], "language": ["text_model"]},
    "paligemma": VL,
    "gemma3": VL,
    "llama4": VL | {"vision": ["vision_model"]},
    "blip-2": {"vision": ["vision_model"], "connector": ["qformer", "language_projection"],
               "language": ["language_model"]},
    "florence2": VL,
    "whisper": {"encoder": ["encoder"], "decoder": ["decoder"]},
    "sam": SAM,
    "sam2": SAM,
    "mask2former": {"backbone": ["pixel_level_module.encoder"],
                    "decoder": ["pixel_level_module.decoder", "transformer_module.decoder"]},
    "detr": DETR,
    "rt_detr": DETR,
    "open_clip CLIP": {"vision": ["visual"], "language": ["text_projection", "transformer.resblocks"]},
    "open_clip CustomTextCLIP": {"vision": ["visual"], "language": ["text"]},
}  # fmt: skip
WITHOUT = {"backbone": {"detr", "rt_detr"}, "encoder": {"sam", "sam2"}}
"""Towers that hold convolutions only."""


def paths(plan: uora.Plan) -> set[str]:
    return {p.path for p in plan.projections}


@pytest.mark.parametrize(
    "name", mostly_slow([*MODELS, *BUILT_BY_HAND], "qwen3_vl", "blip-2", "whisper", "sam2", "open_clip CLIP")
)
def test_each_tower_can_be_asked_for_by_name_and_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    model = multimodal(name)
    whole = uora.plan(model, rank=4, train=())
    assert {t.name: list(t.modules) for t in whole.towers} == TOWERS[name]
    assert sum(t.weights for t in whole.towers) == len(whole.projections)
    assert sum(t.parameters for t in whole.towers) == whole.parameters
    seen: set[str] = set()
    for tower, modules in TOWERS[name].items():
        if name in WITHOUT.get(tower, ()):
            with pytest.raises(uora.TargetError, match=rf"nothing in the tower '{tower}' is asked for; it has: conv"):
                uora.plan(model, rank=4, train=(), targets=f"{tower}:attention+mlp")
            continue
        if tower != "connector":
            mine = paths(uora.plan(model, rank=4, train=(), targets=f"{tower}:attention+mlp"))
            assert mine and mine == paths(uora.plan(model, rank=4, train=(), targets=tower)) and not mine & seen
            assert all(path.startswith(tuple(f"{module}." for module in modules)) for path in mine)
            seen |= mine
    assert seen == {p for p in paths(whole) if not p.startswith(tuple(TOWERS[name].get("connector", ["-"])))}

    first, *_, last = (t.name for t in whole.towers if t.weights or t.name == "connector")
    targets = [f"{last}:qv", "connector" if "connector" in TOWERS[name] else f"{first}:mlp"]
    trained = wake(uora.inject(copy.deepcopy(model), rank=4, train=(), targets=targets))
    counts = {t.name: t.weights for t in uora.summary(trained).towers}
    assert {t for t, n in counts.items() if n} == {last, targets[1].partition(":")[0]}
    uora.save(trained, tmp_path)
    again = uora.load(model, tmp_path)
    assert uora.adapters(again).keys() == uora.adapters(trained).keys()
    assert all(torch.equal(a.b, uora.adapters(again)[p].b) for p, a in uora.adapters(trained).items())
    assert set(again.uora.config.targets) == set(targets)


@pytest.mark.parametrize(
    ("targets", "terms"),
    [
        ("vision:attention+mlp", ("vision:attention", "vision:mlp")),
        ("vision:attention + mlp+ language : qv", ("vision:attention", "vision:mlp", "language:qv")),
        (["vision:attention+mlp", "language:qv"], ("vision:attention", "vision:mlp", "language:qv")),
        (["vision:attention", "mlp", "connector"], ("mlp", "connector", "vision:attention")),
        pytest.param({"vision:q+k", "v"}, ("v", "vision:k", "vision:q"), id="a set"),
        ("mlp+vision:attention", ("mlp", "vision:attention")),
        ("vision:*.layers.1.*", ("vision:*.layers.1.*",)),
        ("attention+ mlp", ("attention", "mlp")),
    ],
    ids=str,
)
def test_a_tower_goes_for_the_terms_behind_it(targets: Any, terms: tuple[str, ...]) -> None:
    config = uora.UoraConfig(targets=targets, exclude=targets)
    assert config.targets == config.exclude == terms
    assert uora.UoraConfig(**config.to_dict()) == config == config.replace(targets="+".join(terms))


@pytest.mark.parametrize("targets", ["vision:", "mlp+vision: +q", ["a", "text:"]], ids=str)
def test_a_tower_of_which_nothing_is_asked_is_refused(targets: Any) -> None:
    with pytest.raises(uora.ConfigError, match=r"asks for nothing in '(vision|text)'; write '(vision|text):attention"):
        uora.UoraConfig(targets=targets)


def test_terms_mean_the_same_in_a_tower_as_in_a_model() -> None:
    model = multimodal("llava")

    def found(targets: Any, **options: Any) -> set[str]:
        plan = uora.plan(model, rank=4, targets=targets, train=(), **options)
        return {f"{p.path}.{role.name}" for p in plan.projections for role in p.roles}

    whole, projector = found("all"), {f"multi_modal_projector.linear_{i}.linear_{i}" for i in (1, 2)}
    vision = {role for role in whole if role.startswith("vision_tower.")}
    assert found("vision:all") == found("vision") == found("image:all") == found("all", exclude="text:all") == vision
    assert found("text:qv") == {role for role in whole if role.startswith("lang") and role.endswith(("q_proj.q", ".v"))}
    assert found("vision:*.layers.1.*") == {role for role in vision if ".layers.1." in role}
    assert found("vision:vision_tower.encoder.layers.0.mlp.fc1") == {"vision_tower.encoder.layers.0.mlp.fc1.fc1"}
    assert found(["mlp", "vision:q"]) == found("mlp") | found("vision:q") != found("vision:mlp+q")
    assert found("connector") == found("projector:other") == projector
    assert found(["vision", "connector", "language"]) == whole | projector
    assert found("conv+q") > found("conv+q", exclude="vision") == found("language:q")  # without the patch embedding
    assert found("attention", exclude="vision") == found("language:attention")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("visoin:attention", r"no tower 'visoin'; this model has vision \(vision_tower\), connector "
         r"\(multi_modal_projector\), language \(language_model\)\. Did you mean 'vision'\?"),
        ("audio:qv", r"no tower 'audio'; this model has vision"),
        ("langauge", r"no tower 'langauge'; this model has .* Did you mean 'language'\?"),
        ("vision:gate_proj", r"no projection matched 'gate_proj'; that tower has: attn\.k"),
        ("connector:attention", r"nothing in the tower 'connector' is asked for; it has: other \(2\)"),
        ("vision:vision_tower.encoder", r"'vision_tower.encoder' is a CLIPEncoder, not a weight"),
    ],
)  # fmt: skip
def test_a_wrong_tower_is_answered_with_those_that_there_are(targets: str, message: str) -> None:
    with pytest.raises(uora.TargetError, match=message):
        uora.plan(multimodal("llava"), targets=targets)


def test_a_model_that_is_one_tower_says_so() -> None:
    with pytest.raises(uora.TargetError, match=r"no tower 'vision': this model is not made of towers; leave out"):
        uora.plan(small_vit(), targets="vision:attention")
    assert uora.plan(small_vit()).towers == () and "Adapted by tower" not in str(uora.plan(small_vit()))


@pytest.mark.slow
def test_plan_and_summary_count_by_tower_also_those_of_which_nothing_trains() -> None:
    model = multimodal("llava")
    plan = uora.plan(model, rank=4, targets="vision:qv", train=())
    assert [(t["name"], t["weights"], t["parameters"]) for t in json.loads(plan.to_json())["towers"]] == [
        ("vision", 4, 4 * (32 + 4)), ("connector", 0, 0), ("language", 0, 0),
    ]  # fmt: skip
    summary = uora.summary(uora.inject(model, rank=4, targets="vision:qv", train=()))
    assert summary.towers == plan.towers
    for text in (str(plan), str(summary)):
        rows = text[text.index("Adapted by tower") :].split("\n")
        assert rows[4].split() == ["vision", "vision_tower", "4", "144"]
        assert rows[6].split() == ["language", "language_model", "0", "0"]


class Clip(nn.Module):
    """Hand-written, with modules of customary names around timm and torch."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = small_vit(num_classes=0)
        self.text_encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True), 2)
        self.mm_projector = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))


def test_towers_of_ones_own() -> None:
    plan = uora.plan(Clip(), rank=4, train=())
    assert {t.name: (t.modules, t.weights) for t in plan.towers} == {
        "vision": (("image_encoder",), 8), "language": (("text_encoder",), 8),
    }  # fmt: skip
    pair = nn.ModuleDict({"user:buys": nn.Linear(8, 8), "user:likes": nn.Linear(8, 8)})
    # A path may have a colon of its own.
    assert paths(uora.plan(pair, rank=2, targets="user:buys", train=())) == {"user:buys"}
