"""Real models of transformers of every structure: all is found, the roles are true, and everything trains."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from conftest import mostly_slow, wake
from torch import Tensor, nn

pytest.importorskip("transformers")

from proof.complete import judge
from structures import STRUCTURES, built

import uora_vision as uora

# What was found by no rule once, or called wrongly: path in the model -> roles.
FOUND: dict[str, dict[str, str]] = {
    "llama": {"layers.0.mlp.gate_proj": "mlp.gate_proj", "layers.1.mlp.down_proj": "mlp.down_proj"},
    "modernbert": {"layers.0.attn.Wqkv": "attn.q attn.k attn.v", "layers.0.attn.Wo": "attn.proj"},
    "mamba2": {"layers.0.mixer.in_proj": "attn.in_proj", "layers.1.mixer.out_proj": "attn.proj"},
    "albert": {"encoder.albert_layer_groups.0.albert_layers.0.ffn": "mlp.ffn"},
    "xlnet": {f"layer.0.rel_attn.{n}": f"attn.{'proj' if n == 'o' else n}" for n in "qkvo"},
    "deepseek_v3": {"layers.1.mlp.shared_experts.up_proj": "mlp.up_proj",
                    "layers.0.self_attn.kv_b_proj": "attn.k attn.v"},
    "qwen3_5_text": {"layers.0.linear_attn.in_proj_qkv": "attn.q attn.k attn.v",
                     "layers.0.linear_attn.in_proj_z": "attn.in_proj_z", "layers.0.linear_attn.out_proj": "attn.proj"},
    "recurrent_gemma": {"layers.0.temporal_block.linear_x": "attn.linear_x",
                        "layers.0.temporal_block.linear_out": "attn.proj"},
    "lfm2": {"layers.0.conv.in_proj": "attn.in_proj", "layers.0.conv.out_proj": "attn.proj"},
    "jetmoe": {"layers.0.self_attention.experts.input_linear": "attn.input_linear_0 attn.input_linear_1 "
               "attn.input_linear_2", "layers.0.self_attention.kv_proj": "attn.k attn.v"},
    "falcon_h1": {"layers.0.mamba.in_proj": "attn.in_proj"},
    "longcat_flash": {"layers.0.mlp.experts.gate_up_proj": " ".join(f"mlp.{n}_{e}" for e in range(4)
                                                                  for n in ("gate", "up"))},
    "rwkv": {"blocks.0.attention.receptance": "attn.receptance"},
    "deberta": {"encoder.layer.0.attention.self.in_proj": "attn.q attn.k attn.v"},
    "squeezebert": {"encoder.layers.0.post_attention.conv1d": "attn.proj"},
    "mobilebert": {"encoder.layer.0.intermediate.dense": "mlp.intermediate"},
    "ctrl": {"h.0.multi_head_attention.Wq": "attn.q"},
    "gpt_bigcode": {"h.0.attn.c_attn": "attn.q attn.k attn.v"},
    "persimmon": {"layers.0.self_attn.query_key_value": "attn.q attn.k attn.v"},
    "gpt_neox_japanese": {"layers.0.attention.query_key_value": "attn.q attn.k attn.v"},
    "wav2vec2-conformer": {"encoder.layers.0.self_attn.linear_q": "attn.q",
                           "encoder.layers.0.self_attn.linear_out": "attn.proj"},
    "poolformer": {"encoder.block.0.0.output.conv1": "mlp.conv1"},
    "dinov3_convnext": {"model.stages.0.layers.0.pointwise_conv1": "mlp.pointwise_conv1"},
    "sam_vision_model": {"vision_encoder.layers.0.attn.qkv": "attn.q attn.k attn.v"},
    "internvl_vision": {"encoder.layer.0.attention.projection_layer": "attn.proj"},
    "focalnet": {"encoder.stages.0.layers.0.modulation.projection_in": "attn.projection_in"},
    "swiftformer": {"encoder.network.0.blocks.0.local_representation.point_wise_conv1": "mlp.point_wise_conv1"},
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_all_is_found_and_called_what_the_model_takes_it_for(name: str) -> None:
    model, x = built(name)
    plan = uora.plan(model, rank=4, train=())
    roles = {p.path: " ".join(r.label for r in p.roles) for p in plan.projections}
    for path, wanted in FOUND[name].items():
        assert roles.get(path) == wanted, (path, [p for p in roles if ".0." in p])
    assert judge(model, plan, {s.path: s.reason for s in plan.skipped})["missed"] == []
    traced = uora.plan(model, rank=4, train=(), example_input=x)
    assert [(d.path, d.message) for d in traced.differences or () if d.kind != "unused"] == []
    assert not any(s.reason.startswith("no rule") for s in plan.skipped)


@pytest.mark.parametrize(
    "name", mostly_slow(STRUCTURES, "mamba2", "deepseek_v3", "qwen3_5_text", "persimmon", "poolformer")
)
def test_everything_trains_changes_the_output_and_merges(name: str) -> None:
    model, x = built(name)
    with torch.no_grad():
        base = model(**x)[0]
        uora.inject(model, rank=4, train=())
        assert torch.equal(model(**x)[0], base)
    uora.verify(model, x)
    with torch.no_grad():
        awake = wake(model)(**x)[0]
        assert (awake - base).abs().max() > 1e-3 * base.abs().max()
        uora.merge(model)
        torch.testing.assert_close(model(**x)[0], awake, rtol=1e-3, atol=1e-4 * awake.abs().max().item())


@pytest.mark.parametrize("name", ["modernbert", "deepseek_v3", "squeezebert", "xlnet", "gpt_bigcode", "qwen3_5_text"])
def test_queries_and_values_by_their_shorthand(name: str) -> None:
    plan = uora.plan(built(name)[0], rank=4, train=(), targets="qv")
    kinds = {role.kind for p in plan.projections for role in p.roles}
    assert kinds == ({"attn.q_b", "attn.v"} if name == "deepseek_v3" else {"attn.q", "attn.v"})


def block(**parts: nn.Module) -> nn.Module:
    """A model of two equal blocks with attention, and what is beside it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    layers = [owner(attention=Attention(), **copy.deepcopy(parts)) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


def found(model: nn.Module) -> dict[str, str]:
    plan = uora.plan(model, rank=4, train=())
    return {p.path: " ".join(r.label for r in p.roles) for p in plan.projections} | {
        s.path: re.sub("; .*", "", s.reason) for s in plan.skipped
    }


def owner(**parts: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


class TestByStructure:
    def test_layers_that_lead_into_a_width_and_back_are_an_mlp_whatever_they_are_called(self) -> None:
        got = found(block(there=nn.Linear(16, 40), back=nn.Linear(40, 16)))
        assert (got["layers.0.there"], got["layers.1.back"]) == ("mlp.there", "mlp.back")

    def test_two_ways_in_and_one_back(self) -> None:
        got = found(block(a=nn.Linear(16, 40), b=nn.Linear(16, 40), c=nn.Linear(40, 16)))
        assert [got[f"layers.0.{n}"] for n in "abc"] == ["mlp.a", "mlp.b", "mlp.c"]

    def test_what_does_not_lead_back_is_on_request(self) -> None:
        got = found(block(merging=nn.Linear(64, 32)))
        assert got["layers.0.merging"] == "not of attention or MLP"

    def test_outside_of_blocks_nothing_is_guessed(self) -> None:
        got = found(nn.ModuleDict({"body": block(), "there": nn.Linear(16, 40), "back": nn.Linear(40, 16)}))
        assert got["there"] == got["back"] == "not of attention or MLP"

    def test_gates_and_outputs_in_an_attention(self) -> None:
        model = block()
        for layer in model["layers"]:
            layer.attention.g = nn.Linear(16, 16)
            layer.attention.merge = nn.Linear(16, 16)
        got = found(model)
        assert (got["layers.0.attention.g"], got["layers.0.attention.merge"]) == ("attn.g", "attn.proj")

    @pytest.mark.parametrize(
        ("part", "reason"),
        [
            ("router", "routes to experts"), ("rel_pos", "position bias"),
            ("indexer", "cannot receive a gradient: it picks what attention looks at"),
            ("patch_embed", "not of attention or MLP"), ("timestep_proj", "embedding of time"),
            ("ada_norm", "scale of a norm"), ("se", "squeeze-and-excitation"),
        ],
    )  # fmt: skip
    def test_reasons_come_first(self, part: str, reason: str) -> None:
        got = found(block(**{part: owner(up=nn.Linear(16, 40), down=nn.Linear(40, 16))}))
        wanted = "patch embedding" if part == "patch_embed" else reason
        assert got[f"layers.0.{part}.up"] == got[f"layers.0.{part}.down"] == wanted

    def test_a_head_in_the_midst_of_a_model_stays(self) -> None:
        model = nn.ModuleDict({"iou_head": owner(fc1=nn.Linear(16, 40), fc2=nn.Linear(40, 16)), "body": block()})
        assert found(model)["iou_head.fc1"] == "head inside of the model"

    def test_a_gate_of_experts_routes_and_another_does_not(self) -> None:
        experts = nn.ModuleList([nn.Linear(16, 16)])
        got = found(block(moe=owner(gate=nn.Linear(16, 4), experts=experts)))
        assert got["layers.0.moe.gate"] == "routes to experts"


class Bare(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))


class Linear(Bare):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w)


class Turned(Bare):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.t()


class Times(Bare):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.w)


class Heads(Bare):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bth,hnd->btnd", x, self.w).flatten(2)


class Back(Bare):
    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (2, -1))
        return torch.einsum("btnd,hnd->bth", x, self.w)


class Added(Bare):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.w


@pytest.mark.parametrize(
    ("module", "form", "shape"),
    [
        (Linear(12, 8), "matrix", (12, 8)), (Turned(12, 8), "matrix", (12, 8)), (Times(8, 12), "transposed", (12, 8)),
        (Heads(8, 2, 6), "transposed", (12, 8)), (Back(10, 2, 4), "kernel", (10, 8)), (Added(8, 8), None, None),
    ],
)  # fmt: skip
def test_bare_tensors_are_found_where_the_code_multiplies_with_them(module: nn.Module, form: Any, shape: Any) -> None:
    model, x = nn.ModuleDict({"lin": nn.Linear(8, 8), "one": module}), torch.randn(2, 3, 8)
    plan = uora.plan(model, targets="other", rank=4, train=())
    bare = [p for p in plan.projections if p.path == "one.w"]
    assert [(p.form, p.shape, p.read) for p in bare] == ([(form, shape, True)] if form else [])
    if form:
        before = module(x)
        uora.inject(model, targets="*.w*", rank=4, train=())
        wake(model)
        (adapter,) = (a for n, a in uora.adapters(model).items() if n == "one.w")
        (change,) = adapter.delta_weight(torch.float32)
        assert change.shape == shape
        torch.testing.assert_close(module(x) - before, x @ change.t(), rtol=1e-4, atol=1e-4)
        assert module.w.grad_fn is not None
