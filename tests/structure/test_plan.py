"""Choosing what to adapt: terms, blocks, and what must never be adapted."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import uora_vision as uora

ALL = {"attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2"}


def meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def roles(what: uora.Plan) -> list[str]:
    """`path.role` of all that would be adapted."""
    return [f"{p.path}.{r.name}" for p in what.projections for r in p.roles]


def labels(what: uora.Plan) -> set[str]:
    return {r.label for p in what.projections for r in p.roles}


class TestTargets:
    @pytest.mark.parametrize(
        ("targets", "wanted"),
        [
            ("attention+mlp", ALL), ("all", ALL), ("attention", {"attn.q", "attn.k", "attn.v", "attn.proj"}),
            ("mlp", {"mlp.fc1", "mlp.fc2"}), ("qv", {"attn.q", "attn.v"}), ("q+v", {"attn.q", "attn.v"}),
            (["q", "mlp.fc2"], {"attn.q", "mlp.fc2"}), ({"k", "proj"}, {"attn.k", "attn.proj"}),
            (" q + fc1 ", {"attn.q", "mlp.fc1"}), ("blocks.*.attn.*", {"attn.q", "attn.k", "attn.v", "attn.proj"}),
            ("*.qkv.k", {"attn.k"}), ("qv+mlp", {"attn.q", "attn.v", "mlp.fc1", "mlp.fc2"}),
        ],
        ids=lambda terms: str(sorted(terms) if isinstance(terms, set) else terms),
    )  # fmt: skip
    def test_terms(self, vit: nn.Module, targets: Any, wanted: set[str]) -> None:
        what = uora.plan(vit, targets=targets)
        assert labels(what) == wanted and len(roles(what)) == 2 * len(wanted)

    def test_a_whole_path_means_all_of_its_roles(self, vit: nn.Module) -> None:
        assert roles(uora.plan(vit, targets="blocks.1.attn.qkv")) == [f"blocks.1.attn.qkv.{r}" for r in "qkv"]

    def test_exclusions_are_taken_away(self, vit: nn.Module) -> None:
        what = uora.plan(vit, targets="attention", exclude=["k", "blocks.1.attn.proj"])
        want = ["blocks.0.attn.qkv.q", "blocks.0.attn.qkv.v", "blocks.0.attn.proj.proj",
                "blocks.1.attn.qkv.q", "blocks.1.attn.qkv.v"]  # fmt: skip
        assert roles(what) == want

    def test_rows_of_each_role_of_a_fused_weight(self, vit: nn.Module) -> None:
        fused = uora.plan(vit, targets="v+k").projections[0]
        assert [(r.name, r.start, r.rows) for r in fused.roles] == [("k", 64, 64), ("v", 128, 64)]

    @pytest.mark.parametrize(("blocks", "want"), [([0], {0}), ([-1], {3}), (range(1, 3), {1, 2}), ([0, -4], {0})])
    def test_blocks(self, blocks: Any, want: set[int]) -> None:
        what = uora.plan(meta("vit_tiny_patch16_224", depth=4), blocks=blocks)
        assert {int(r.split(".")[1]) for r in roles(what)} == want
        assert {p.block for p in what.projections} == want and len(roles(what)) == 6 * len(want)

    def test_blocks_of_staged_models_are_counted_through(self) -> None:
        model = meta("swin_tiny_patch4_window7_224")
        what = uora.plan(model, blocks=[2, -1])
        assert {p.path.rpartition(".blocks.")[0] + "." + p.path.split(".blocks.")[1][0] for p in what.projections} == {
            "layers.1.0", "layers.3.1",
        }  # fmt: skip

    def test_a_block_that_does_not_exist_is_answered_with_their_number(self, vit: nn.Module) -> None:
        with pytest.raises(uora.ConfigError, match=r"\[2\].*this model has 2"):
            uora.plan(vit, blocks=[0, 2])

    def test_a_choice_that_leaves_nothing_says_so(self, vit: nn.Module) -> None:
        with pytest.raises(uora.TargetError, match="leave nothing"):
            uora.plan(vit, targets="q", exclude="attention")

    def test_options_change_a_given_configuration(self, vit: nn.Module) -> None:
        config = uora.UoraConfig(rank=7, targets="q")
        what = uora.plan(vit, config, rank=9)
        assert what.config.rank == 9 and labels(what) == {"attn.q"} and what.parameters == 2 * (64 + 9)


class TestPlan:
    def test_is_what_inject_does(self, vit: nn.Module) -> None:
        what = uora.plan(vit, rank=8, exclude="k")
        got = uora.adapters(uora.inject(vit, rank=8, exclude="k"))
        assert {p.path: p.roles for p in what.projections} == {path: a.roles for path, a in got.items()}
        assert sum(p.numel() for a in got.values() for p in a.parameters()) == what.parameters

    def test_touches_nothing(self, vit: nn.Module) -> None:
        before, keys = copy.deepcopy(vit.state_dict()), [sorted(vars(m)) for m in vit.modules()]
        uora.plan(vit, rank=8)
        assert keys == [sorted(vars(m)) for m in vit.modules()] and all(p.requires_grad for p in vit.parameters())
        assert all(torch.equal(t, vit.state_dict()[k]) for k, t in before.items())

    def test_json_lists_every_linear_and_convolution_once(self, vit: nn.Module) -> None:
        data = json.loads(uora.plan(vit, rank=8, targets="qv").to_json())
        listed = [p["path"] for p in data["projections"] + data["skipped"]]
        assert sorted(listed) == sorted(n for n, m in vit.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
        assert data["parameters"] == 2 * 2 * (64 + 8) and data["config"]["rank"] == 8
        assert data["projections"][0]["roles"][1] == {
            "name": "v", "group": "attn", "start": 128, "rows": 64, "block": 0, "stride": 0,
        }  # fmt: skip

    def test_table_names_roles_counts_and_what_is_left(self, vit: nn.Module) -> None:
        text = str(uora.plan(vit, rank=8, targets="qv"))
        assert "attn.q" in text and "64 x 64" in text and "part of the head" in text and "not asked for" in text

    @given(
        rank=st.integers(1, 999), targets=st.sets(st.sampled_from(["q", "mlp", "attn.k", "blocks.*"]), min_size=1),
        blocks=st.none() | st.lists(st.integers(-3, 3), min_size=1), seed=st.integers(0, 2**40),
        train=st.sets(st.sampled_from(["head", "norm", "bias"])), layout=st.sampled_from(["shape", "slice"]),
        dropout=st.floats(0, 0.9),
    )  # fmt: skip
    @pytest.mark.slow
    def test_a_configuration_survives_json(self, **options: Any) -> None:
        config = uora.UoraConfig(**options)
        assert uora.UoraConfig(**json.loads(json.dumps(config.to_dict()))) == config


# Modules that look like projections and are not; more of them are in test_rules.py, each with its reason.
TRAPS = {
    "vit_srelpos_small_patch16_224": ("shared_rel_pos",),
    "maxvit_rmlp_pico_rw_256": ("rel_pos", "se"),
    "pit_ti_224": ("pool",),
    "vit_base_patch16_siglip_224": (),
}


@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.slow
def test_what_only_looks_like_a_projection_is_left(name: str) -> None:
    model = meta(name, num_classes=10)
    paths = [p.path for p in uora.plan(model).projections]
    for trap in TRAPS[name]:
        assert any(trap in n.split(".") for n, m in model.named_modules()), f"{trap} is not in {name}"
        assert not [p for p in paths if trap in p.split(".")]
    assert not [p for p in paths if p.split(".")[0] in ("head", "patch_embed", "stem", "classifier")]


HEADS = {
    "vit_base_patch16_224": {"head"}, "deit_base_distilled_patch16_224": {"head", "head_dist"},
    "caformer_s18": {"head.fc.fc1", "head.fc.fc2"}, "convnext_tiny": {"head.fc"},
    "crossvit_tiny_240": {"head.0", "head.1"}, "swin_tiny_patch4_window7_224": {"head.fc"},
    "volo_d1_224": {"head", "aux_head"},
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.slow
def test_heads_train_and_are_not_adapted(name: str) -> None:
    model = meta(name)
    paths = {p.path for p in uora.plan(model).projections}
    assert not paths & HEADS[name]
    uora.inject(model, rank=4)
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad and ".uora." not in n}
    assert HEADS[name] <= trained
    assert all(t.split(".")[0] in {h.split(".")[0] for h in HEADS[name]} for t in trained)
