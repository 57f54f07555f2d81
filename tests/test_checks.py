"""What cannot be adapted is refused by name before anything changes, and only if it was to be adapted."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import transformers
from conftest import need_timm, small_vit, wake
from timm.models import ByobNet
from timm.models.byobnet import ByoBlockCfg, ByoModelCfg
from timm.models.repghost import RepGhostNet
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import uora_vision as uora
from uora_vision.structure import rules
from uora_vision.structure.survey import Survey

QKV = "blocks.1.attn.qkv"
Change = Callable[[nn.Module], Any]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a refusal must leave alone."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": {
            n: (type(m), m.training, sorted(vars(m)), [k for k, _ in m.named_children()])
            for n, m in model.named_modules()
        },
        "hooks": {n: {k: len(v) for k, v in vars(m).items() if "hooks" in k} for n, m in model.named_modules()},
        "tensors": {n: (id(t), type(t), t.requires_grad) for n, t in tensors.items()},
        "values": {n: t.detach().clone() for n, t in tensors.items() if has_values(t)},
        "keys": list(model.state_dict()) if not any(map(nn.parameter.is_lazy, tensors.values())) else None,
    }


def has_values(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_meta


@contextmanager
def refusal(model: nn.Module, error: type[Exception], *words: str) -> Iterator[None]:
    """Check that this error is raised, that it says all of the words, and that nothing happens to the model."""
    before = snapshot(model)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), str(caught.value)
    after = snapshot(model)
    for part in ("modules", "hooks", "tensors", "keys"):
        assert before[part] == after[part], part
    assert all(torch.equal(t, after["values"][n]) for n, t in before["values"].items())


def refused(model: nn.Module, error: type[Exception], *words: str, **options: Any) -> None:
    """Check that planning and injecting are refused."""
    for call in (uora.plan, uora.inject):
        with refusal(model, error, *words):
            call(model, **options)


def adapted(model: nn.Module, images: Tensor | None, **options: Any) -> list[str]:
    """Inject, and check that the adapters act and merge right; paths of what was adapted."""
    before = None if images is None else model(images)
    uora.inject(model, rank=4, **options)
    paths = list(uora.adapters(model))
    if images is not None:
        assert torch.equal(model(images), before)
        awake = wake(model)(images)
        assert (awake - before).abs().max() > 1e-3
        torch.testing.assert_close(uora.merge(model)(images), awake, rtol=1e-4, atol=1e-5)
    return paths


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


class TestSharing:
    def test_one_parameter_in_two_modules(self) -> None:
        model = small_vit()
        model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
        refused(model, uora.StateError, "blocks.0.attn.qkv is shared with blocks.1.attn.qkv.weight", "clone()")
        refused(model, uora.StateError, "blocks.1.attn.qkv is shared with blocks.0.attn.qkv.weight", blocks=[1])

    def test_two_parameters_in_one_storage(self) -> None:
        model = small_vit()
        model.blocks[1].norm1.weight = nn.Parameter(model.blocks[0].attn.proj.weight.detach()[3])
        refused(model, uora.StateError, "blocks.0.attn.proj is shared with blocks.1.norm1.weight")
        assert len(adapted(model, None, exclude="blocks.0.attn.proj")) == 7

    def test_also_on_the_meta_device(self) -> None:
        model = small_vit().to("meta")
        assert len(uora.plan(model).projections) == 8
        model.blocks[1].attn.proj.weight = nn.Parameter(model.blocks[0].attn.proj.weight.detach())
        refused(model, uora.StateError, "blocks.0.attn.proj is shared with blocks.1.attn.proj.weight")

    def test_parts_of_one_storage_side_by_side_are_not_shared(self, images: Tensor) -> None:
        model = small_vit()
        weights = [model.blocks[i].attn.proj for i in range(2)]
        flat = torch.cat([m.weight.detach().flatten() for m in weights])
        for m, part in zip(weights, flat.split(64 * 64), strict=True):
            m.weight = nn.Parameter(part.view(64, 64))
        assert len(adapted(model, images)) == 8

    def test_ties_between_weights_that_are_left_are_no_obstacle(self) -> None:
        config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert len(adapted(model, None)) == 4

    def test_one_module_in_two_places_is_not_a_shared_weight(self, images: Tensor) -> None:
        model = small_vit()
        model.blocks[1].mlp = model.blocks[0].mlp
        assert len(adapted(model, images)) == 6


class TestDevices:
    def test_wholly_on_meta_works(self) -> None:
        model = uora.inject(small_vit().to("meta"), rank=4)
        assert uora.summary(model).adapter_parameters == uora.plan(small_vit(), rank=4).parameters
        assert all(p.is_meta for p in model.parameters())

    @pytest.mark.parametrize("path", [QKV, "blocks.0", "patch_embed", "head"])
    def test_partly_on_meta(self, path: str) -> None:
        model = small_vit()
        model.get_submodule(path).to("meta")
        refused(model, uora.StateError, f"{path}.", "meta", "load_state_dict")

    def test_mixed(self, other_device: str) -> None:
        model = small_vit()
        model.get_submodule(QKV).to(other_device)
        refused(model, uora.StateError, f"{QKV} is on {other_device}", "blocks.0.attn.qkv on cpu", "one device")
        assert len(uora.plan(model, exclude=QKV).projections) == 7

    @pytest.mark.parametrize("kind", ["head", "mlp"])
    def test_lazy(self, kind: str) -> None:
        model, path = small_vit(), {"head": "head", "mlp": "blocks.0.mlp.fc1"}[kind]
        model.set_submodule(path, nn.LazyLinear(256))
        refused(model, uora.StateError, f"weight of {path}", "batch")


@pytest.fixture(scope="module")
def other_device() -> str:
    """A device that is not the CPU: torch's lazy one on machines that have no other."""
    if torch.cuda.is_available():
        return "cuda:0"
    from torch._lazy import ts_backend

    ts_backend.init()
    return "lazy:0"


class TestTypes:
    def test_a_half_base_beside_single_norms_is_fine(self, images: Tensor) -> None:
        model = small_vit(depth=1)
        mixed(model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc2)
        with torch.no_grad():
            base = model(images)
            uora.inject(model, rank=4, targets="mlp")
            assert (model(images) - base).abs().max() < 1e-2 < (wake(model)(images) - base).abs().max()

    @pytest.mark.parametrize("half", ["fc1", "fc2"])
    def test_two_types_among_the_adapted_compute_what_one_does(self, half: str, images: Tensor) -> None:
        """Whichever of them comes first."""
        model = small_vit(depth=1)
        mixed(getattr(model.blocks[0].mlp, half))
        exact = copy.deepcopy(model).double()
        for each in (model, exact):
            wake(uora.inject(each, rank=4, targets="mlp"))
        wanted = exact(images.double())
        base = uora.remove(exact)(images.double())
        error = (model(images) - wanted).abs().max()
        assert error < 0.02 * (wanted - base).abs().max()
        merged = uora.merge(model)
        assert merged.blocks[0].mlp.get_submodule(half).weight.dtype == torch.bfloat16
        assert (merged(images) - wanted).abs().max() < 0.05 * (wanted - base).abs().max()


def mixed(*modules: nn.Module) -> None:
    """Store these in bfloat16, in a model that computes in float32 around them."""
    for module in modules:
        module.bfloat16()
        module.register_forward_pre_hook(lambda m, args: (args[0].to(m._parameters["weight"].dtype),))
        module.register_forward_hook(
            lambda m, args, out: out.to(torch.float64 if out.dtype.itemsize > 4 else torch.float32)
        )


class TestFreezing:
    def test_complex_parameters_too_and_back(self) -> None:
        model = small_vit()
        model.blocks[0].filter = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        uora.inject(model, rank=4)
        assert not model.blocks[0].filter.requires_grad
        assert uora.remove(model).blocks[0].filter.requires_grad


class TestPeft:
    @pytest.mark.parametrize(
        ("kind", "inner"), [("LoraConfig", "blocks.0.attn.qkv"), ("VeraConfig", "blocks.0.mlp.fc1")]
    )
    def test_timm(self, kind: str, inner: str, images: Tensor) -> None:
        peft = pytest.importorskip("peft")
        config = getattr(peft, kind)(r=2, target_modules=[inner.rpartition(".")[2]])
        wrapped = peft.get_peft_model(small_vit(), config)
        refused(wrapped, uora.StateError, "PeftModel", "merge_and_unload()")
        refused(wrapped.base_model.model, uora.StateError, f"{inner} is a Linear of PEFT", "unload()")
        assert len(adapted(wrapped.merge_and_unload(), images)) == 8

    def test_transformers(self) -> None:
        peft = pytest.importorskip("peft")
        config = transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32
        )
        model = transformers.ViTModel(config)
        query = uora.plan(model, targets="q").projections[0].path
        assert len(uora.plan(model).projections) == 6
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[query.rpartition(".")[2]]), model)
        refused(model, uora.StateError, f"{query} is a Linear of PEFT")


class TestCompiled:
    def test_scripted_and_traced(self, images: Tensor) -> None:
        mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        for made in (torch.jit.script(mlp), torch.jit.trace(mlp, torch.randn(2, 8))):
            refused(made, uora.StateError, "the model", "scripted or traced Sequential", "Python model")
        model = small_vit()
        model.blocks[1].mlp = torch.jit.script(model.blocks[1].mlp)
        refused(model, uora.StateError, "blocks.1.mlp is a scripted or traced Mlp")

    def test_a_scripted_head_or_activation_is_no_obstacle(self, images: Tensor) -> None:
        model = small_vit()
        model.blocks[0].mlp.act, model.head = torch.jit.script(nn.GELU()), torch.jit.script(model.head)
        assert len(adapted(model, images)) == 8

    @pytest.mark.parametrize("in_place", [True, False])
    @pytest.mark.parametrize("path", ["", "blocks.1", QKV])
    def test_compiled(self, path: str, in_place: bool) -> None:
        model = compiled(small_vit(), path, in_place)
        refused(model, uora.StateError, path or "the model", "compile it after")

    @pytest.mark.parametrize("in_place", [True, False])
    def test_a_compiled_part_that_is_left_is_no_obstacle(self, in_place: bool) -> None:
        model = compiled(compiled(small_vit(), "head", in_place), "blocks.1", in_place)
        assert adapted(model, None, exclude="blocks.1.*") == [
            "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
        ]  # fmt: skip


def compiled(model: nn.Module, path: str, in_place: bool) -> nn.Module:
    part = model.get_submodule(path)
    if in_place:
        part.compile(backend="eager")
    elif path:
        model.set_submodule(path, torch.compile(part, backend="eager"))
    else:
        return torch.compile(model, backend="eager")
    return model


class TestWrapped:
    def test_data_parallel(self) -> None:
        refused(nn.DataParallel(small_vit()), uora.StateError, "the model (DataParallel)", "wrap it after")
        model = small_vit()
        model.blocks[0] = nn.DataParallel(model.blocks[0])
        refused(model, uora.StateError, "blocks.0 is a DataParallel")
        assert len(uora.plan(model, exclude="blocks.0.*").projections) == 4

    def test_distributed(self, group: None) -> None:
        refused(nn.parallel.DistributedDataParallel(small_vit()), uora.StateError, "DistributedDataParallel", "after")

    def test_sharded(self, group: None) -> None:
        class FullyShardedDataParallel(nn.Module):
            """FSDP of the first kind cannot be made without an accelerator."""

            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

        refused(FullyShardedDataParallel(small_vit()), uora.StateError, "FullyShardedDataParallel", "wrap it after")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = small_vit()
        fully_shard(model.blocks[1], mesh=init_device_mesh("cpu", (1,)))
        refused(model, uora.TargetError, QKV, "DTensor", "before fully_shard()")
        assert len(uora.plan(model, exclude="blocks.1.*").projections) == 4


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Volume(nn.Module):
    """A weight of five dimensions that no layer of torch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Parameter(torch.randn(2, 3, 4, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cells.sum()


class Ensemble(nn.Linear):
    """Two weights in one, (2, out, in)."""

    def __init__(self) -> None:
        super().__init__(64, 32)
        self.weight = nn.Parameter(torch.randn(2, 32, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.weight)


class TestPaths:
    """A target that names what is there but is no projection is answered with what it is."""

    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("blocks.0.extra", "is a Volume with cells (2, 3, 4, 4, 4). Adapters go on"),
            ("blocks.0.extra.cells", "is cells of a Volume, of shape (2, 3, 4, 4, 4). Adapters go on"),
            ("blocks.0.norm1", "is a LayerNorm with weight (64,), bias (64,)"),
            ("blocks.0.attn.qkv.bias", "is bias of a Linear, of shape (192,)"),
            ("blocks.0.attn.qkv.weight", "is the weight of a projection that goes by 'blocks.0.attn.qkv'"),
            ("blocks.0.attn", "is a Attention, not a weight; 'blocks.0.attn.*' adapts all that is in it"),
            ("blocks.0.mlp.act", "is a GELU with no parameter of its own"),
            ("head", "(Linear, 7 x 64) is never adapted: part of the head"),
            ("pos_embed", "is pos_embed of a VisionTransformer, of shape (1, 65, 64)"),
        ],
    )
    def test_what_is_there(self, path: str, words: str) -> None:
        model = small_vit()
        model.blocks[0].extra = Volume()
        refused(model, uora.TargetError, f"'{path}' {words}", targets=path)
        refused(model, uora.TargetError, f"'{path}' {words}", targets=["mlp", path])

    def test_what_is_not_there_is_answered_with_the_roles(self) -> None:
        refused(small_vit(), uora.TargetError, "no projection matched 'blocks.0.extra'", targets="blocks.0.extra")

    @pytest.mark.parametrize("path", ["blocks.0.attn.qkv", "blocks.0.attn.qkv.v", "patch_embed.proj"])
    def test_projections_are(self, path: str) -> None:
        assert len(uora.plan(small_vit(), targets=path).projections) == 1

    def test_a_weight_of_other_dimensions_than_its_layer_has(self) -> None:
        model = small_vit()
        model.blocks[0].extra = Ensemble()
        refused(model, uora.TargetError, "blocks.0.extra (Ensemble)", "(2, 32, 64)", "2 dimensions", targets="other")
        assert len(uora.plan(model).projections) == 8

    @pytest.mark.parametrize("named", ["class", "name"])
    def test_a_registered_rule(self, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rules, "registered", [])
        monkeypatch.setattr("uora_vision.structure.checks.registered", rules.registered)
        model = small_vit()
        model.blocks[0].extra = Volume()
        uora.register_rule(Volume if named == "class" else "Volume", {"cells": "cells"})
        refused(
            model, uora.TargetError, "registered for Volume names 'cells'", "blocks.0.extra is a Volume with cells (2,"
        )
        assert len(uora.plan(small_vit()).projections) == 8


def byob(kind: str) -> nn.Module:
    stages = tuple(ByoBlockCfg(type=kind, d=2, c=channels, s=2, gs=0) for channels in (16, 24))
    return ByobNet(ByoModelCfg(stages, stem_type=kind, stem_chs=8), num_classes=5)


FUSING: dict[str, tuple[Callable[[], nn.Module] | dict[str, Any], bool]] = {
    "levit_128s": ({"img_size": 64, "embed_dim": (32, 48, 64), "key_dim": 16, "num_heads": (2, 3, 4),
                    "depth": (1, 1, 1)}, True),
    "efficientvit_m0": ({"img_size": 64, "embed_dim": (16, 32, 48), "depth": (1, 1, 1), "num_heads": (2, 2, 2)}, True),
    "shvit_s1": ({"embed_dim": (16, 24, 32), "depth": (1, 1, 1), "partial_dim": (8, 8, 8)}, True),
    "nextvit_small": ({"stem_chs": (16, 8, 16), "depths": (1, 2, 5, 1)}, True),
    "repvit_m0_9": ({"embed_dim": (16, 24, 32, 48), "depth": (1, 1, 1, 1)}, True),
    "iformer_t": ({"dims": (16, 16, 32, 32), "depths": (1, 1, 3, 3), "attn_groups": (0, 0, 1, 1)}, True),
    "efficientvim_m1": ({"embed_dim": (16, 32, 32), "depths": (1, 1, 1)}, True),
    "repvgg": (lambda: byob("rep"), True),
    "mobileone": (lambda: byob("one"), True),
    "repghost": (lambda: RepGhostNet([[[3, 16, 16, 0, 1]], [[3, 48, 24, 0.25, 2]]], num_classes=5), True),
    "tiny_vit_5m_224": ({"embed_dims": (16, 32, 32, 32), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2),
                         "window_sizes": (4, 4, 4, 2)}, False),
    "fastvit_sa12": ({"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "layer_scale_init_value": 1.0}, False),
}  # fmt: skip
"""Options or maker, and whether the model would fuse adapted weights."""


def fusing(name: str) -> tuple[nn.Module, Tensor]:
    """An injected model with awake adapters and the statistics of a batch in its norms, and images for it."""
    make = FUSING[name][0]
    model = make() if callable(make) else timm.create_model(name, num_classes=5, **make)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    uora.inject(model.eval(), rank=4, targets="conv" if callable(make) else "all")
    return wake(model), torch.randn(2, 3, 64, 64)


def assert_near(got: Tensor, wanted: Tensor) -> None:
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


class TestFusing:
    @pytest.mark.parametrize("name", FUSING)
    def test_never_makes_a_wrong_model(self, name: str) -> None:
        need_timm(name)
        model, images = fusing(name)
        with torch.no_grad():
            wanted = model(images)
            if FUSING[name][1]:
                before = list(vars(model))
                for inner in (model, pickle.loads(pickle.dumps(model))):
                    with pytest.raises(uora.StateError, match=r"merge\(\) the model first"):
                        reparameterize_model(inner)
                assert list(vars(model)) == before
            else:
                other = reparameterize_model(model)
                assert type(other) is type(model) and len(list(other.modules())) < len(list(model.modules()))
                assert_near(other(images), wanted)
                assert_near(uora.merge(other)(images), wanted)
            assert torch.equal(model(images), wanted)
            asleep = uora.remove(copy.deepcopy(model))(images)
            assert (asleep - wanted).abs().max() > 1e-2 * wanted.abs().max()
            assert_near(reparameterize_model(uora.merge(model))(images), wanted)

    def test_the_method_of_the_model_itself_refuses_before_it_begins(self) -> None:
        model, _ = fusing("shvit_s1")
        before = snapshot(model)
        with pytest.raises(uora.StateError, match=r"^fuse\(\) would"):
            model.fuse()
        assert snapshot(model)["modules"] == before["modules"]

    def test_remove_gives_the_methods_back(self) -> None:
        model, images = fusing("levit_128s")
        with torch.no_grad():
            uora.remove(model)
            assert not any("fuse" in vars(m) for m in model.modules())
            assert_near(reparameterize_model(model)(images), model(images))

    def test_remove_leaves_what_was_fused_or_replaced_since(self) -> None:
        model, images = fusing("tiny_vit_5m_224")
        fused = reparameterize_model(model)
        fused.patch_embed.conv1.bias.requires_grad_(False)
        uora.remove(fused), uora.remove(model)
        assert not fused.patch_embed.conv1.bias.requires_grad and fused.head.fc.weight.requires_grad
        with torch.no_grad():
            assert_near(fused(images), model(images))

    def test_a_forward_that_is_called_so_is_left_alone(self, images: Tensor) -> None:
        class Joint(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = small_vit(), small_vit(seed=2)
                self.reparameterize = nn.Identity()

            def fuse(self, x: Tensor, y: Tensor) -> Tensor:
                return x * y

            def forward(self, x: Tensor) -> Tensor:
                return self.reparameterize(self.fuse(self.one(x), self.two(x)))

        assert len(adapted(Joint(), images)) == 16
