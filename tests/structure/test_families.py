"""timm's transformer families, small: what is adapted is called what it is, trains, and comes off again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import mostly_slow, wake
from families import FAMILIES, small
from torch import Tensor, nn

import uora_vision as uora


@pytest.mark.parametrize(
    "name", mostly_slow(FAMILIES, "vit_base_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224",
                        "swinv2_tiny_window8_256", "davit_tiny", "maxvit_rmlp_pico_rw_256", "convnext_tiny")
)  # fmt: skip
def test_inject_verify_merge(name: str) -> None:
    model, x = small(name)
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    with torch.no_grad():
        base = model.requires_grad_(False)(x)  # torch may sum in another order for weights that train
        uora.inject(model, rank=4)
        assert torch.equal(model(x), base)
        assert all(k in model.state_dict() for k in keys)
        norms = uora.verify(model, x)
        assert len(norms) == len(uora.Reinitializer(model).layers)
        wake(model, 1.0)
        awake = model(x)
        assert (awake - base).abs().max() > 1e-4
        uora.merge(model)
        torch.testing.assert_close(model(x), awake, rtol=1e-3, atol=1e-4)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes


def qkv_owners(model: nn.Module) -> dict[type, tuple[str, Any]]:
    """One weight with the roles q, k and v of every class of attention: (path, its Projection)."""
    found: dict[type, tuple[str, Any]] = {}
    for p in uora.plan(model).projections:
        if {r.name for r in p.roles} == {"q", "k", "v"}:
            owner = p.path.rpartition(".")[0]
            found.setdefault(type(model.get_submodule(owner)), (owner, p))
    return found


def scale(owner: nn.Module, linear: nn.Linear, role: Any, factor: float) -> None:
    with torch.no_grad():
        rows = role.span.indices()
        linear.weight[rows] *= factor
        if linear.bias is not None:
            linear.bias[rows] *= factor
        if isinstance(extra := getattr(owner, f"{role.name}_bias", None), Tensor):  # of BEiT and EVA
            extra *= factor


# Attention whose rows are right although the laws below do not hold: q stands for the values (davit's channels).
LAWLESS = {"ChannelAttention"}
HEADS_FIRST = {
    name: (64, {"img_size": 64, "depths": (1, 1), "embed_dim": (64, 128), "stem_width": 16})
    for name in ("maxvit_nano_rw_256", "maxvit_rmlp_pico_rw_256")
}


@pytest.mark.parametrize("name", [*FAMILIES, *HEADS_FIRST])
def test_rows_called_q_k_and_v_act_as_such(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is a function of q k^T and linear in v: 3q with k/3 changes nothing, 3v makes 3 times."""
    monkeypatch.setitem(FAMILIES, name, FAMILIES.get(name) or HEADS_FIRST[name])
    model, x = small(name)
    calls: dict[str, Any] = {}
    owners = {cls: found for cls, found in qkv_owners(model).items() if cls.__name__ not in LAWLESS}
    for path, _ in owners.values():
        hook = lambda m, args, kwargs, path=path: calls.setdefault(path, copy.deepcopy((args, kwargs)))  # noqa: E731
        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(x)
    for path, projection in owners.values():
        assert (projection.roles[0].block > 0) == (name in {*HEADS_FIRST, "tiny_vit_5m_224"}), (
            "the parts of a head lie together, or not"
        )
        owner = model.get_submodule(path)
        linear = model.get_submodule(projection.path)
        q, k, v = projection.roles
        args, kwargs = calls[path]

        def run(owner: nn.Module = owner, args: Any = args, kwargs: Any = kwargs) -> Tensor:
            with torch.no_grad():
                out = owner(*copy.deepcopy(args), **kwargs)
            return out[0] if isinstance(out, tuple) else out

        with torch.no_grad():
            for name in ("rel_pos_h", "rel_pos_w"):  # of SAM: they add a function of q alone to the scores
                if isinstance(table := getattr(owner, name, None), Tensor):
                    table.zero_()
            linear.weight *= 8  # so that attention is not nearly uniform
            if owner.proj.bias is not None:
                owner.proj.bias.zero_()
        before = run()
        scale(owner, linear, q, 3.0), scale(owner, linear, k, 1 / 3)
        torch.testing.assert_close(run(), before, rtol=1e-3, atol=1e-4 * before.abs().max().item())
        scale(owner, linear, q, 1 / 3), scale(owner, linear, k, 3.0), scale(owner, linear, v, 3.0)
        torch.testing.assert_close(run(), 3 * before, rtol=1e-3, atol=1e-4 * before.abs().max().item())
