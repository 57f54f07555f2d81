"""Models of PEFT, compiled, wrapped and distributed ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import small_vit
from refusals import QKV, adapted, refused
from torch import Tensor, nn

import uora_vision as uora


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

    @pytest.mark.parametrize("path", ["", "blocks.1", QKV])
    def test_compiled(self, path: str) -> None:
        model = compiled(small_vit(), path, in_place=False)
        refused(model, uora.StateError, path or "the model", "compile it after", "part.compile()")

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
