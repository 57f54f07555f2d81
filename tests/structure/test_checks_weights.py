"""Weights that are stored otherwise than as plain parameters: refused, left alone, or adapted rightly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_vit
from refusals import QKV, Change, adapted, refusal, refused
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import uora_vision as uora
from uora_vision.structure.survey import Survey


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Packed4bit(nn.Parameter):
    """Two entries of a weight in a byte, (n, 1): as bitsandbytes stores them."""


class Linear4bit(nn.Linear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = Packed4bit(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features) + self.bias


class Int8Tensor(Tensor):
    """A weight that takes part in operations as if it were of floats: as torchao stores them."""

    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor) -> Int8Tensor:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        floats = [a.codes.float() / 64 if isinstance(a, cls) else a for a in args]
        return func(*floats, **(kwargs or {}))


class QuantLinear(nn.Module):
    """A projection whose weight is in buffers: as GPTQ and AWQ have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def stored(change: Callable[[Tensor], Tensor]) -> Change:
    def apply(module: nn.Module) -> None:
        module.weight = change(module.weight.detach())

    return apply


def frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


ODD: dict[str, tuple[type[Exception], str, Change]] = {
    "parametrize": (uora.StateError, "remove_parametrizations(module, 'weight')",
                    lambda m: parametrize.register_parametrization(m, "weight", Double())),
    "parametrized bias": (uora.StateError, "remove_parametrizations(module, 'bias')",
                          lambda m: parametrize.register_parametrization(m, "bias", Double())),
    "weight_norm": (uora.StateError, "remove_parametrizations", parametrizations.weight_norm),
    "spectral_norm": (uora.StateError, "remove_parametrizations", parametrizations.spectral_norm),
    "old weight_norm": (uora.StateError, "remove_weight_norm()", utils.weight_norm),
    "old spectral_norm": (uora.StateError, "remove_spectral_norm()", utils.spectral_norm),
    "pruned": (uora.StateError, "prune.remove()", lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "bitsandbytes": (uora.TargetError, "a Packed4bit of torch.uint8", Linear4bit),
    "torchao": (uora.TargetError, "an adapter goes on a dense torch.nn.Parameter",
                stored(lambda w: frozen(Int8Tensor((w * 64).to(torch.int8))))),
    "gptq": (uora.TargetError, "QuantLinear, a projection 192 x 64", QuantLinear),
    "dynamic": (uora.TargetError, "quantized.dynamic",
                lambda m: torch.ao.quantization.quantize_dynamic(nn.Sequential(m), {nn.Linear})[0]),
    "tensor subclass": (uora.TargetError, "a Masked of torch.float32",
                        stored(lambda w: nn.Parameter(w.as_subclass(type("Masked", (Tensor,), {}))))),
    "parameter subclass": (uora.TargetError, "a Tagged of torch.float32",
                           stored(type("Tagged", (nn.Parameter,), {}))),
    "complex": (uora.TargetError, "torch.complex64", stored(lambda w: nn.Parameter(w.to(torch.complex64)))),
    "integer": (uora.TargetError, "torch.int8", stored(lambda w: frozen((w * 64).to(torch.int8)))),
    "float8": (uora.TargetError, "torch.float8_e4m3fn", stored(lambda w: frozen(w.to(torch.float8_e4m3fn)))),
    "sparse": (uora.TargetError, "layout torch.sparse_coo", stored(lambda w: nn.Parameter(w.to_sparse()))),
}  # fmt: skip
RUNS = ("parametrize", "parametrized bias", "weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm",
        "pruned", "bitsandbytes", "torchao", "gptq", "dynamic", "tensor subclass", "parameter subclass")  # fmt: skip


def made_odd(kind: str, *paths: str) -> nn.Module:
    model = small_vit()
    for path in paths:
        new = ODD[kind][2](model.get_submodule(path))
        if isinstance(new, nn.Module):
            model.set_submodule(path, new)
    return model


@pytest.mark.parametrize("kind", ODD)
class TestWeightsThatAreOdd:
    def test_one_that_was_to_be_adapted_is_refused_by_name(self, kind: str) -> None:
        error, words, _ = ODD[kind]
        refused(made_odd(kind, QKV), error, QKV, words, f"exclude='{QKV}'")

    def test_a_role_that_all_blocks_hide_is_not_passed_over(self, kind: str) -> None:
        refused(made_odd(kind, "blocks.0.attn.qkv", QKV), ODD[kind][0], "blocks.0.attn.qkv", targets="qv+mlp")

    @pytest.mark.parametrize("options", [{"targets": "mlp"}, {"exclude": QKV}, {"blocks": [0]}], ids=str)
    def test_one_that_was_not_is_no_obstacle(self, kind: str, options: dict[str, Any], images: Tensor) -> None:
        model = made_odd(kind, QKV)
        held = type(model.get_submodule(QKV))
        paths = adapted(model, images if kind in RUNS else None, **options)
        assert len(paths) == {"targets": 4, "exclude": 7, "blocks": 4}[next(iter(options))] and QKV not in paths
        assert type(model.get_submodule(QKV)) is held

    def test_nor_is_a_head(self, kind: str) -> None:
        model = made_odd(kind, "head")
        if whole := kind in ("integer", "bitsandbytes"):
            with pytest.warns(UserWarning, match=r"head.weight is of torch.u?int8 and does not train"):
                assert len(adapted(model, None)) == 8
        else:
            assert len(adapted(model, None)) == 8
        base = {n: p.requires_grad for n, p in model.named_parameters() if ".uora." not in n}
        assert base.get("head.weight", not whole) != whole
        assert not any(trains for n, trains in base.items() if not n.startswith("head."))

    def test_nor_does_it_take_an_adapter_from_a_file(self, kind: str, tmp_path: Path) -> None:
        uora.save(uora.inject(small_vit(), rank=4, train=()), tmp_path)
        model = made_odd(kind, QKV)
        with refusal(model, ODD[kind][0], QKV, ODD[kind][1]):
            uora.load(model, tmp_path)


def test_a_parametrized_bare_weight_is_named() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    parametrize.register_parametrization(layer.self_attn, "in_proj_weight", Double())
    refused(layer, uora.StateError, "self_attn", "'in_proj_weight'", "exclude='self_attn.in_proj_weight'")
    assert [p.path for p in uora.plan(layer, exclude="self_attn.in_proj_weight", rank=4).projections] == [
        "self_attn.out_proj", "linear1", "linear2",
    ]  # fmt: skip


def test_asking_does_not_move_the_state_of_a_spectral_norm() -> None:
    """In training mode every look at such a weight is a step of its power iteration."""
    model = made_odd("spectral_norm", QKV).train()
    before = {n: t.clone() for n, t in model.named_buffers() if n.endswith("._u")}
    refused(model, uora.StateError, QKV)
    uora.plan(model, targets="mlp")
    assert len(before) == 1 and all(torch.equal(model.get_buffer(n), t) for n, t in before.items())


def test_a_plain_model_is_looked_at_itself() -> None:
    model = small_vit()
    survey = Survey(model)
    assert survey.shown is survey
