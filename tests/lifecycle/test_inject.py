"""What injection changes in a model, and what it must not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from conftest import wake
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora

Make = Callable[..., nn.Module]


class TestParameters:
    @pytest.mark.parametrize(("name", "count"), [("vit_base_patch16_224", 24_576), ("vit_large_patch16_224", 61_440)])
    @pytest.mark.slow
    def test_q_and_v_at_rank_256_train_the_published_number(self, name: str, count: int) -> None:
        with torch.device("meta"):
            model = timm.create_model(name)
        assert uora.plan(model, targets="qv", rank=256).parameters == count
        uora.inject(model, targets="qv", rank=256, train=())
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        assert uora.summary(model).adapter_parameters == uora.summary(model).trained == count

    def test_all_projections_at_rank_256_on_vit_base(self) -> None:
        with torch.device("meta"):
            model = timm.create_model("vit_base_patch16_224")
        assert uora.plan(model).parameters == 12 * (3 * (768 + 256) + (768 + 256) + (3072 + 256) + (768 + 256))

    def test_b_and_d_are_the_only_new_ones(self, vit: nn.Module) -> None:
        before = set(dict(vit.named_parameters()))
        buffers = set(vit.state_dict()) - before
        uora.inject(vit, rank=8)
        new = set(dict(vit.named_parameters())) - before
        assert new == {f"{path}.uora.{v}" for path in uora.adapters(vit) for v in "bd"}
        assert set(vit.state_dict()) == before | buffers | new | {"uora.mark", "uora._extra_state"}

    def test_b_starts_at_zero_and_d_at_its_value_one_row_a_role(self, vit: nn.Module) -> None:
        uora.inject(vit, rank=5, d_init=-0.25)
        adapter = uora.adapters(vit)["blocks.1.attn.qkv"]
        assert adapter.b.shape == (192,) and adapter.d.shape == (3, 5)
        assert not adapter.b.any() and (adapter.d == -0.25).all()

    @pytest.mark.parametrize(
        ("train", "wanted"),
        [
            ((), set()),
            ("head", {"head.weight", "head.bias"}),
            ("norm", {f"blocks.{i}.norm{k}.{p}" for i in range(2) for k in (1, 2) for p in ("weight", "bias")}
             | {"norm.weight", "norm.bias"}),
            ("bias", {"patch_embed.proj.bias", "norm.bias", "head.bias"}
             | {f"blocks.{i}.{n}.bias" for i in range(2)
                for n in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}),
            (("head", "norm"), None),
        ],
        ids=["none", "head", "norm", "bias", "two"],
    )  # fmt: skip
    def test_what_else_trains(self, vit: nn.Module, train: Any, wanted: set[str] | None) -> None:
        uora.inject(vit, rank=4, train=train)
        got = {n for n, p in vit.named_parameters() if p.requires_grad and ".uora." not in n}
        assert got == wanted if wanted is not None else {"head.weight", "norm.bias"} <= got and len(got) == 12
        assert all(p.requires_grad for a in uora.adapters(vit).values() for p in a.parameters())

    def test_optimizer_groups_hold_what_trains_once(self, vit: nn.Module) -> None:
        uora.inject(vit, rank=4, train=("head", "norm"))
        groups = uora.param_groups(vit, lr=1.0, head_lr=2.0, weight_decay=0.5)
        held = [id(p) for g in groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in vit.parameters() if p.requires_grad)
        rest = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups if g["name"] != "adapter"}
        assert rest == {"base": (2.0, 0.0), "head": (2.0, 0.5), "head_vectors": (2.0, 0.0)}
        # d, then b of out-widths 64 and 256, whose gains are 1/4 and 1/8: see test_optim.py.
        assert sorted(g["lr"] for g in groups if g["name"] == "adapter") == pytest.approx([1, 4, 8])
        assert all(g["weight_decay"] == 0 for g in groups if g["name"] == "adapter")


class TestFunction:
    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("options", [{}, {"layout": "slice"}, {"init": "kaiming"}, {"dropout": 0.5}, {"rank": 100}])
    def test_an_injected_model_computes_the_base_to_the_bit(
        self, vit: nn.Module, images: Tensor, options: dict[str, Any], batch: int
    ) -> None:
        before = vit(images[:batch])
        uora.inject(vit, **{"rank": 8, **options})
        assert torch.equal(vit(images[:batch]), before)
        with torch.no_grad():
            assert torch.equal(vit(images[:batch]), before)

    def test_and_under_autocast(self, vit: nn.Module, images: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            before = vit(images)
            assert torch.equal(uora.inject(vit, rank=8)(images), before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_half_base_to_within_its_rounding(self, vit: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
        vit.to(dtype)
        before = vit(images.to(dtype)).float()
        after = uora.inject(vit, rank=8)(images.to(dtype)).float()
        assert (after - before).abs().max() <= 8 * torch.finfo(dtype).eps * before.abs().max()
        assert uora.adapters(vit)["blocks.0.attn.qkv"].b.dtype == torch.float32

    def test_awake_adapters_change_every_output_as_dense_weights_would(self, vit: nn.Module, images: Tensor) -> None:
        dense, base = copy.deepcopy(vit), vit(images)
        wake(uora.inject(vit, rank=8))
        for path, adapter in uora.adapters(vit).items():
            weight = dense.get_submodule(path).weight
            for role, change in zip(adapter.roles, adapter.delta_weight(torch.float32), strict=True):
                with torch.no_grad():
                    weight[role.start : role.start + role.rows] += change
        torch.testing.assert_close(vit(images), dense(images), rtol=1e-4, atol=1e-4)
        assert (vit(images) - base).abs().max() > 0.05

    def test_the_base_keeps_its_keys_values_and_classes(self, vit: nn.Module) -> None:
        before = {k: v.clone() for k, v in vit.state_dict().items()}
        identity = {n: id(p) for n, p in vit.named_parameters()}
        assert uora.inject(vit, rank=8) is vit
        after = vit.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())
        assert all(id(dict(vit.named_parameters())[n]) == i for n, i in identity.items())
        assert isinstance(vit.blocks[0].attn.qkv, nn.Linear) and isinstance(vit, timm.models.VisionTransformer)

    def test_a_base_checkpoint_still_loads(self, make_vit: Make, images: Tensor) -> None:
        other = make_vit(seed=9)
        model = uora.inject(make_vit(), rank=8)
        report = model.load_state_dict(other.state_dict(), strict=False)
        assert not report.unexpected_keys and all(".uora." in f".{k}" for k in report.missing_keys)
        assert torch.equal(model(images), other(images))

    def test_an_injected_checkpoint_loads_into_an_injected_model(self, make_vit: Make, images: Tensor) -> None:
        one, two = wake(uora.inject(make_vit(), rank=8)), uora.inject(make_vit(seed=4), rank=8)
        two.load_state_dict(one.state_dict())
        assert torch.equal(one(images), two(images))

    def test_the_seed_decides_the_function(self, make_vit: Make, images: Tensor) -> None:
        y = [wake(uora.inject(make_vit(), rank=8, seed=s))(images) for s in (0, 0, 1)]
        assert torch.equal(y[0], y[1]) and not torch.allclose(y[0], y[2], atol=1e-2)

    def test_it_does_not_move_the_global_generator(self, vit: nn.Module) -> None:
        state = torch.get_rng_state()
        uora.inject(vit, rank=8)
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_adapter_takes_the_mode_of_its_module(self, vit: nn.Module) -> None:
        assert not any(a.training for a in uora.adapters(uora.inject(vit, rank=4)).values())
        assert all(a.training for a in uora.adapters(vit.train()).values())


class TestFailing:
    @pytest.mark.parametrize(
        "options",
        [{"rank": 0}, {"rank": -1}, {"rank": True}, {"rank": 1.5}, {"rank": "8"}, {"seed": -1}, {"seed": 0.5},
         {"d_init": 0.0}, {"d_init": float("nan")}, {"d_init": "a"}, {"dropout": 1.0}, {"dropout": -0.1},
         {"dropout": "0"}, {"layout": "x"}, {"init": "normal"}, {"train": "everything"}, {"train": 3}, {"targets": ""},
         {"targets": 5}, {"targets": "q_porj"}, {"exclude": "q_porj"}, {"exclude": "all"}, {"blocks": [2]},
         {"blocks": []}, {"blocks": 1}, {"blocks": ["1"]}, {"rnak": 8}],
        ids=str,
    )  # fmt: skip
    def test_a_bad_option_is_refused_and_leaves_the_model(self, vit: nn.Module, options: dict[str, Any]) -> None:
        before = snapshot(vit)
        with pytest.raises(uora.UoraError) as caught:
            uora.inject(vit, **options)
        assert isinstance(caught.value, ValueError | TypeError)
        assert_same(before, vit)

    def test_a_misspelt_role_is_answered_with_those_there_are(self, vit: nn.Module) -> None:
        with pytest.raises(uora.TargetError, match=r"'q_porj'.*attn.q \(2\), attn.k \(2\), .*mlp.fc2 \(2\)"):
            uora.inject(vit, targets="q_porj")

    def test_a_misspelt_option_is_answered_with_the_nearest(self, vit: nn.Module) -> None:
        with pytest.raises(uora.OptionError, match=r"rnak.*'rank'"):
            uora.inject(vit, rnak=8)

    def test_a_model_without_projections(self) -> None:
        model = timm.create_model("resnet18", num_classes=3)
        before = snapshot(model)
        with pytest.raises(uora.TargetError, match="ResNet has no attention or MLP"):
            uora.inject(model)
        assert_same(before, model)

    def test_twice(self, vit: nn.Module, images: Tensor) -> None:
        wake(uora.inject(vit, rank=8))
        before, y = snapshot(vit), vit(images)
        with pytest.raises(uora.StateError, match="already has an adapter"):
            uora.inject(vit, rank=4)
        assert_same(before, vit)
        assert torch.equal(vit(images), y)

    @pytest.mark.parametrize(
        "where",
        ["Bank", "Adapter", "attach"],
    )
    def test_an_error_half_way_leaves_the_model(
        self, vit: nn.Module, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        """Also one that no check foresees."""
        import importlib

        places = {"Bank": "apply", "Adapter": "entry", "attach": "library"}
        module = importlib.import_module(f"uora_vision.lifecycle.{places[where]}")
        real, calls = getattr(module, where), []

        def breaks(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == (1 if where == "Bank" else 3):
                raise MemoryError
            return real(*args, **kwargs)

        vit.head.weight.requires_grad_(False)
        before = snapshot(vit)
        monkeypatch.setattr(module, where, breaks)
        with pytest.raises(MemoryError):
            uora.inject(vit, rank=8)
        assert_same(before, vit)

    def test_a_model_that_has_an_attribute_of_our_name(self, vit: nn.Module) -> None:
        vit.uora = nn.Identity()
        before = snapshot(vit)
        with pytest.raises(uora.UoraError, match="uora"):
            uora.inject(vit, rank=8)
        assert_same(before, vit)

    @pytest.mark.parametrize("call", ["adapters", "summary", "merge", "remove"])
    def test_asking_a_plain_model(self, vit: nn.Module, call: str) -> None:
        with pytest.raises(uora.StateError, match="inject"):
            getattr(uora, call)(vit)


class TestRemove:
    @pytest.mark.parametrize("frozen", [(), ("head.weight", "norm.bias"), "all"])
    def test_gives_the_model_back(self, vit: nn.Module, images: Tensor, frozen: Any) -> None:
        for name, p in vit.named_parameters():
            p.requires_grad_(frozen != "all" and name not in frozen)
        before, y = snapshot(vit), vit(images)
        wake(uora.inject(vit, rank=8))
        assert uora.remove(vit) is vit
        assert_same(before, vit)
        assert torch.equal(vit(images), y) and not hasattr(vit, "uora")

    def test_and_another_adapter_can_follow(self, vit: nn.Module, images: Tensor) -> None:
        uora.remove(uora.inject(vit, rank=8))
        uora.inject(vit, rank=3, targets="qv")
        assert {a.d.shape for a in uora.adapters(vit).values()} == {(2, 3)}
        assert uora.verify(vit, images)


class TestSummary:
    def test_counts_add_up(self, vit: nn.Module) -> None:
        total = sum(p.numel() for p in vit.parameters())
        s = uora.summary(uora.inject(vit, rank=8))
        assert s.total == total and s.trained == sum(p.numel() for p in vit.parameters() if p.requires_grad)
        assert sum(row[3] for row in s.rows) == s.adapter_parameters == uora.plan(uora.remove(vit), rank=8).parameters
        text = str(s)
        assert "attn.q" in text and "256 x 64" in text and f"{s.trained:,}" in text
