"""Adapters written for PEFT, loaded by PEFT itself: the same outputs, or an error that names what it cannot express."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from conftest import small_vit, trained, wake
from mechanisms import make as make_one
from mechanisms import run
from peft_models import close, loaded
from safetensors.torch import load_file
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision.export import to_peft_lora, to_peft_vera

peft = pytest.importorskip("peft")


def check(
    adapted: nn.Module, plain: nn.Module, args: tuple[Tensor, ...], folder: Path, export: Any = to_peft_lora
) -> Any:
    with torch.no_grad():
        want, base = run(adapted, args), run(plain, args)
        before = snapshot(adapted)
        report = export(adapted, folder)
        assert_same(before, adapted)
        assert report.worst == 0 and report.size == sum(p.stat().st_size for p in folder.iterdir())
        tolerance = 1e-12 if want.dtype == torch.float64 else 1e-5
        close(run(loaded(copy.deepcopy(plain), folder), args), want, base, tolerance)
    return report


class TestLora:
    @pytest.mark.parametrize("scope", [None, "shared", "layer"])
    @pytest.mark.parametrize("targets", ["attention+mlp", "v+fc2"])
    def test_is_the_same_function(self, images: Tensor, tmp_path: Path, scope: str | None, targets: str) -> None:
        report = check(trained(scope=scope, targets=targets), small_vit(), (images,), tmp_path)
        assert report.ranks["blocks.0.mlp.fc2"] == 8
        if scope is None:
            assert set(report.ranks.values()) == {8}, "q, k and v share A, so they are one LoRA of the same rank"
        files = load_file(tmp_path / "adapter_model.safetensors")
        assert files["base_model.model.head.weight"].shape == (7, 64)
        assert sum(t.numel() for n, t in files.items() if ".lora_" in n) == report.parameters

    @pytest.mark.parametrize("name", ["vit", "convnext", "sequence", "gpt2"])
    def test_every_kind_of_layer_that_peft_adapts(self, name: str, tmp_path: Path) -> None:
        plain, args = make_one(name)
        check(wake(uora.inject(copy.deepcopy(plain), rank=4), 2.0), plain, args, tmp_path)

    @pytest.mark.parametrize("targets", ["q+k+v+mlp", "qv"])
    def test_in_projections_of_attention_modules(self, targets: str, tmp_path: Path) -> None:
        plain, args = make_one("clip")
        check(wake(uora.inject(copy.deepcopy(plain), rank=4, targets=targets), 2.0), plain, args, tmp_path)

    def test_a_linear_with_a_forward_of_its_own(self, tmp_path: Path) -> None:
        options = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        plain = transformers.FalconForCausalLM(transformers.FalconConfig(**options)).eval()
        model = wake(uora.inject(copy.deepcopy(plain), rank=4), 2.0)
        check(model, plain, (torch.randint(50, (2, 7)),), tmp_path / "lora")
        check(model, plain, (torch.randint(50, (2, 7)),), tmp_path / "vera", to_peft_vera)

    def test_one_tower_does_not_catch_the_other(self, tmp_path: Path) -> None:
        plain, args = make_one("clip")
        model = wake(uora.inject(copy.deepcopy(plain), rank=4, targets="transformer.*", exclude="visual.*+proj"), 3.0)
        check(model, plain, args, tmp_path)
        assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"], str)

    @pytest.mark.slow
    def test_float64(self, images: Tensor, tmp_path: Path) -> None:
        model = trained(lambda: small_vit().double(), scope="layer")
        check(model, small_vit().double(), (images.double(),), tmp_path)

    @pytest.mark.parametrize("export", [to_peft_lora, to_peft_vera])
    def test_a_bfloat16_base_gets_factors_in_float32(self, images: Tensor, tmp_path: Path, export: Any) -> None:
        model = trained(lambda: small_vit().bfloat16())
        want, base = model(images.bfloat16()), small_vit().bfloat16()(images.bfloat16())
        export(model, tmp_path)
        files = load_file(tmp_path / "adapter_model.safetensors")
        assert all(t.dtype == torch.float32 for name, t in files.items() if "lora_" in name or "vera_" in name)
        close(loaded(small_vit().bfloat16(), tmp_path)(images.bfloat16()), want, base, 2**-5)

    def test_a_rank_above_the_width(self, images: Tensor, tmp_path: Path) -> None:
        report = check(trained(rank=100, init="kaiming", layout="slice"), small_vit(), (images,), tmp_path)
        assert set(report.ranks.values()) == {64}

    def test_norms_and_biases_that_trained(self, images: Tensor, tmp_path: Path) -> None:
        model = trained(train=("head", "norm", "bias"))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
        check(model, small_vit(), (images,), tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["bias"] == "all" and {"head", "norm", "blocks.0.norm1"} <= set(config["modules_to_save"])

    @pytest.mark.slow
    def test_statistics_of_batch_norms_that_moved(self, tmp_path: Path) -> None:
        plain = timm.create_model("mobilevitv2_050", num_classes=3).eval()
        model = uora.inject(copy.deepcopy(plain), rank=4, targets="mlp")
        x = torch.randn(2, 3, 64, 64)
        wake(model.train(), 0.3)(x)
        check(model.eval(), plain, (x,), tmp_path)

    @pytest.mark.slow
    def test_spatial_convolutions(self, tmp_path: Path) -> None:
        plain = timm.create_model("resnet10t", num_classes=3).eval()
        model = wake(uora.inject(copy.deepcopy(plain), rank=4, targets="conv"), 3.0)
        check(model, plain, (torch.randn(2, 3, 64, 64),), tmp_path)

    def test_a_new_adapter_has_nothing_to_say(self, images: Tensor, tmp_path: Path) -> None:
        model = uora.inject(small_vit(), rank=8)
        to_peft_lora(model, tmp_path)
        torch.testing.assert_close(loaded(small_vit(), tmp_path)(images), model(images))

    def test_the_active_one_of_several(self, images: Tensor, tmp_path: Path) -> None:
        model = trained()
        wake(uora.inject(model, rank=4, name="other"), 3.0, seed=9)
        check(model, small_vit(), (images,), tmp_path)


class TestTruncatedLora:
    @pytest.mark.parametrize("scope", [None, "layer"])
    @pytest.mark.parametrize("rank", [1, 3, 7])
    def test_is_the_closest_of_its_rank_and_says_how_far(self, tmp_path: Path, rank: int, scope: str | None) -> None:
        model = trained(scope=scope)
        report = to_peft_lora(model, tmp_path, rank=rank)
        files = load_file(tmp_path / "adapter_model.safetensors")
        for path, adapter in uora.adapters(model).items():
            exact = torch.cat(adapter.delta_weight(torch.float64)).detach()
            values = torch.linalg.svdvals(exact)
            want = (values[rank:].norm() / values.norm()).item()
            a, b = (files[f"base_model.model.{path}.lora_{side}.weight"].double() for side in "AB")
            assert len(a) == rank and report.ranks[path] == rank
            assert float((b @ a - exact).norm() / exact.norm()) == pytest.approx(want, abs=1e-6)
            assert report.errors[path] == pytest.approx(want, abs=1e-6)
        assert report.worst == max(report.errors.values()) and report.mean < report.worst
        assert "at worst" in str(report)

    def test_more_than_there_is(self, images: Tensor, tmp_path: Path) -> None:
        report = check(trained(), small_vit(), (images,), tmp_path, lambda m, f: to_peft_lora(m, f, rank=500))
        assert set(report.ranks.values()) == {8} and "exact" in str(report)

    @pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8"])
    def test_ranks_that_are_none(self, tmp_path: Path, rank: Any) -> None:
        with pytest.raises(uora.ConfigError, match="rank"):
            to_peft_lora(trained(), tmp_path, rank=rank)


def beit() -> nn.Module:
    return make_one("beit")[0]


def tied() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.GELU(), layer)


def mixture() -> nn.Module:
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=24, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
            first_k_dense_replace=1,
        )
    )  # fmt: skip


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "read": (beit, {}, r"blocks.0.attn.qkv: the model reads this weight"),
    "experts": (lambda: make_one("mixtral, eager")[0], {}, r"experts.gate_up_proj.*a tensor of its own"),
    "renamed": (lambda: mixture(), {"exclude": "*.experts.*"}, r"layers.0.mlp.gate_proj.*PEFT renames"),
    "lstm": (lambda: nn.Sequential(nn.LSTM(6, 8)), {}, r"0.weight_ih_l0.*a tensor of its own"),
    "out_proj": (lambda: make_one("clip")[0], {}, r"attn.out_proj.*twice"),
    "fast path": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48), 1), {},
                  r"in_proj_weight.*fast path"),
    "widths": (lambda: nn.Sequential(nn.MultiheadAttention(16, 2, kdim=12, vdim=8)), {}, r"q_proj_weight.*of its own"),
    "groups": (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), {"targets": "conv"}, "groups"),
    "root": (lambda: nn.Linear(4, 4), {"targets": "other"}, "the model itself"),
    "tied": (tied, {"targets": "other"}, "several names"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("export", [to_peft_lora, to_peft_vera])
def test_what_peft_would_pass_by_is_refused_and_named(name: str, export: Any, tmp_path: Path) -> None:
    make, options, message = REFUSED[name]
    if name == "renamed" and export is to_peft_vera:
        pytest.skip("PEFT renames for LoRA only")
    model = wake(uora.inject(make(), rank=2, **options))
    with pytest.raises(uora.ExportError, match=message if export is to_peft_lora else "PEFT's VeRA cannot express"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_that_peft_does_pass_by_a_weight_that_is_read() -> None:
    """The reason for the refusal: PEFT's own layers do nothing there."""
    model, (x,) = make_one("beit")
    want = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()
    torch.testing.assert_close(adapted(x), want)


def test_that_peft_adds_an_out_projection_twice() -> None:
    """The reason for that refusal; should PEFT mend it, the export can carry out_proj."""
    attention, args = nn.MultiheadAttention(16, 2), torch.randn(2, 3, 16)
    adapted = peft.get_peft_model(nn.Sequential(copy.deepcopy(attention)), peft.LoraConfig(target_modules=["0"], r=2))
    layer = adapted.base_model.model[0]
    out = layer.base_layer.out_proj
    nn.init.normal_(out.lora_B.default.weight)
    weight = attention.out_proj.weight + 2 * out.get_delta_weight("default")
    with torch.no_grad():
        attention.out_proj.weight.copy_(weight)
        torch.testing.assert_close(layer(args, args, args)[0], attention(args, args, args)[0])


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    for export in (to_peft_lora, to_peft_vera):
        with pytest.raises(uora.ExportError, match=r"head\.bias"):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_that_peft_cannot_take_are_refused(tmp_path: Path) -> None:
    model = trained()
    model.cls_token.requires_grad_(True)
    with pytest.raises(uora.ExportError, match="cls_token was trained too"):
        to_peft_lora(model, tmp_path / "out")


def test_plain_models() -> None:
    for export in (to_peft_lora, to_peft_vera):
        with pytest.raises(uora.StateError, match="no adapter"):
            export(small_vit(), "never")


class TestVera:
    def test_one_a_one_b_one_d_per_layer_is_written_as_it_is(self, images: Tensor, tmp_path: Path) -> None:
        model = trained(targets="proj+mlp", layout="slice", init="kaiming")
        report = check(model, small_vit(), (images,), tmp_path, to_peft_vera)
        assert set(report.ranks.values()) == {8}
        mine = sum(a.b.numel() + a.d.numel() for a in uora.adapters(model).values())
        assert report.parameters == mine
        files = load_file(tmp_path / "adapter_model.safetensors")
        assert torch.equal(files["base_model.model.blocks.1.mlp.fc1.vera_lambda_d"],
                           uora.adapters(model)["blocks.1.mlp.fc1"].d[0])  # fmt: skip

    @pytest.mark.parametrize("layout", ["shape", "slice"])
    @pytest.mark.parametrize("scope", [None, "shared", "layer"])
    @pytest.mark.parametrize("targets", ["attention+mlp", "v+fc2"])
    def test_any_other_is_the_same_function_at_a_larger_rank(
        self, images: Tensor, tmp_path: Path, scope: str | None, targets: str, layout: str
    ) -> None:
        model = trained(scope=scope, targets=targets, layout=layout)
        report = check(model, small_vit(), (images,), tmp_path, to_peft_vera)
        assert scope == "layer" or report.ranks["blocks.0.attn.qkv"] % 8 == 0

    @pytest.mark.parametrize("name", ["vit", "sequence", "gpt2"])
    def test_every_kind_of_layer_that_peft_adapts(self, name: str, tmp_path: Path) -> None:
        plain, args = make_one(name)
        check(wake(uora.inject(copy.deepcopy(plain), rank=4), 2.0), plain, args, tmp_path, to_peft_vera)

    def test_float64(self, images: Tensor, tmp_path: Path) -> None:
        model = trained(lambda: small_vit().double())
        check(model, small_vit().double(), (images.double(),), tmp_path, to_peft_vera)

    def test_gradient_free_interleaved_heads(self, tmp_path: Path) -> None:
        options = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "intermediate_size": 48, "max_position_embeddings": 32}  # fmt: skip
        plain = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**options)).eval()
        model = wake(uora.inject(copy.deepcopy(plain), rank=4), 2.0)
        ids = torch.randint(50, (2, 7))
        check(model, plain, (ids,), tmp_path / "vera", to_peft_vera)
        check(model, plain, (ids,), tmp_path / "lora")

    def test_convolutions_are_refused(self, tmp_path: Path) -> None:
        model = uora.inject(make_one("convnext")[0], rank=4)
        with pytest.raises(uora.ExportError, match="Linear layers alone"):
            to_peft_vera(model, tmp_path)
