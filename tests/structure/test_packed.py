"""Rows of packed weights: what is called q, k and v acts as such, in every order that models use."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import mostly_slow, need_timm
from proof.zoo import call, entries
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.weights.role import Role

LINEAR = {"timm/efficientvit_b0"}
"""Linear attention, normalised: the length of q alone does not matter."""
WRAPPERS = {"linear", "conv", "c"}
PACKED = [
    "timm/levit_128s", "timm/levit_conv_128s", "timm/tiny_vit_5m_224", "timm/efficientformer_l1",
    "timm/efficientvit_b0", "timm/lowformer_b0", "timm/cpubone_b0_bfrobust",
    "timm/botnet26t_256", "timm/gcvit_xxtiny", "timm/twins_svt_small",
    "timm/hiera_tiny_224", "timm/vit_pwee_patch16_reg1_gap_256",
    "timm/maxvit_nano_rw_256", "timm/coatnet_nano_rw_224", "timm/visformer_tiny", "timm/nest_tiny",
    "open_clip/ViT-B-32", "transformers/gpt2", "transformers/gpt_neox", "transformers/bloom", "transformers/falcon",
    "transformers/falcon_multi_query", "transformers/falcon_new", "transformers/mpt", "transformers/codegen",
    "transformers/phi3", "transformers/siglip",
]  # fmt: skip


def owner_of(path: str) -> str:
    """The attention that takes the output of a projection apart."""
    parts = path.split(".")
    while parts[-1] in WRAPPERS:
        parts.pop()
    return ".".join(parts[:-1])


def scale(model: nn.Module, projection: Any, role: Role, factor: float) -> None:
    """Multiply what a projection computes."""
    module, rows = model.get_submodule(projection.module_path), role.span.indices()
    weight = module._parameters[projection.tensor]
    bias = module._parameters.get("in_proj_bias" if projection.tensor == "in_proj_weight" else "bias")
    with torch.no_grad():
        (weight.t() if projection.form == "transposed" else weight)[rows] *= factor
        if bias is not None:
            bias[rows] *= factor


@pytest.mark.parametrize(
    "name", mostly_slow(PACKED, "timm/levit_128s", "timm/hiera_tiny_224", "timm/maxvit_nano_rw_256",
                        "open_clip/ViT-B-32", "transformers/gpt2", "transformers/falcon_new", "transformers/phi3")
)  # fmt: skip
def test_rows_act_as_what_they_are_called(name: str) -> None:
    """Attention is a function of q k^T: 3q with k/3 changes nothing, 3q alone does, and so does 3v."""
    need_timm(name)
    (entry,) = entries(name)
    torch.manual_seed(0)
    model, example = entry.real()
    found = {p.path: p for p in uora.plan(model).projections if {"q", "k", "v"} <= {r.name for r in p.roles}}
    owners: dict[type, Any] = {}
    for projection in found.values():
        owners.setdefault(type(model.get_submodule(owner_of(projection.path))), projection)
    assert owners, "the model has a packed weight"
    calls: dict[str, Any] = {}
    for projection in owners.values():
        path = owner_of(projection.path)
        hook = lambda m, args, kwargs, path=path: calls.setdefault(path, copy.deepcopy((args, kwargs)))  # noqa: E731
        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        call(model, example)
    for projection in owners.values():
        owner, args, kwargs = model.get_submodule(owner_of(projection.path)), *calls[owner_of(projection.path)]
        plain(owner)
        role = {r.name: r for r in projection.roles}

        def run(owner: nn.Module = owner, args: Any = args, kwargs: Any = kwargs) -> Tensor:
            with torch.no_grad():
                out = owner(*copy.deepcopy(args), **copy.deepcopy(kwargs))
            return out[0] if isinstance(out, tuple) else out

        for which, factor in (("q", 4.0), ("k", 4.0)):  # so that attention is far from uniform
            scale(model, projection, role[which], factor)
        before = run()
        size = before.abs().max().item()
        scale(model, projection, role["q"], 3.0)
        assert ((run() - before).abs().max() > 1e-3 * size) == (name not in LINEAR)
        scale(model, projection, role["k"], 1 / 3)
        torch.testing.assert_close(run(), before, rtol=1e-3, atol=1e-4 * size)
        scale(model, projection, role["v"], 3.0)
        assert (run() - before).abs().max() > 1e-2 * size


@torch.no_grad()
def plain(owner: nn.Module) -> None:
    """What is between a projection and q k^T made linear in it: batch norms without shift, no bias that follows q."""
    for module in owner.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.zero_(), module.bias.zero_()
    for name, p in owner.named_parameters():
        if "pos_embed" in name or "rel_pos" in name:
            p.zero_()


class TestPacked:
    def test_sizes_and_repetition(self) -> None:
        owner = nn.Identity()
        q, k, v = uora.Packed("qkv", lambda m: (2, 2, 4), lambda m: 3).roles(owner, 24, "attn") or ()
        assert q.span.indices() == [0, 1, 8, 9, 16, 17] and k.span.indices() == [2, 3, 10, 11, 18, 19]
        assert v.span.indices() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]

    @pytest.mark.parametrize("rows", [23, 25, 0])
    def test_rows_that_do_not_add_up_are_not_divided(self, rows: int) -> None:
        assert uora.Packed("qkv", lambda m: (2, 2, 4), lambda m: 3).roles(nn.Identity(), rows, "attn") is None
