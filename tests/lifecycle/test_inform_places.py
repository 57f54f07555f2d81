"""`inform` where people train: checkpointing, autocast, two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_vit
from processes import in_two_processes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import uora_vision as uora

Batch = tuple[Tensor, Tensor]


def fresh(**options: Any) -> nn.Module:
    model = small_vit()
    nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(9))
    return uora.inject(model, rank=8, **options)


def batch(k: int) -> Batch:
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(k))
    return images, (torch.arange(16) + k) % 7


def rows(model: nn.Module) -> dict[str, Tensor]:
    return {path: adapter.matrices()[0][0].clone() for path, adapter in uora.adapters(model).items()}


def informed(batches: list[Batch], loss: Any = None, **options: Any) -> dict[str, Tensor]:
    model = fresh()
    uora.inform(model, batches, loss, **options)
    return rows(model)


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest sine of an angle between the spans of rows of the same weight."""
    assert one.keys() == two.keys()
    within = [torch.linalg.svdvals(one[path].double() @ two[path].double().t()).min() for path in one]
    return max(float((1 - w.clamp(max=1).square()).sqrt()) for w in within)


def test_of_other_batches_the_rows_are_others() -> None:
    """What the bounds below are to be read against."""
    assert apart(informed([batch(0)], store="float32"), informed([batch(1)], store="float32")) > 0.9


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_rows(reentrant: bool) -> None:
    def checkpointed(model: nn.Module, pair: Batch) -> Tensor:
        x = model._pos_embed(model.patch_embed(pair[0])).requires_grad_()
        for block in model.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        return cross_entropy(model.forward_head(model.norm(x)), pair[1])

    got, want = (informed([batch(0)], loss, store="float32") for loss in (checkpointed, None))
    assert apart(got, want) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_autocast_gives_them_to_its_precision(dtype: torch.dtype) -> None:
    def cast(model: nn.Module, pair: Batch) -> Tensor:
        with torch.autocast("cpu", dtype):
            return cross_entropy(model(pair[0]), pair[1])

    got, want = informed([batch(0)], cast, store="float32"), informed([batch(0)], store="float32")
    held = [(got[path] @ want[path].t()).square().sum() / 8 for path in want]
    assert sum(held) / len(held) > 0.8  # the last singular values lie close together


class TestProcesses:
    @pytest.mark.parametrize("wrap", ["ddp", "sharded"])
    def test_sketches_are_summed_over_them(self, tmp_path: Path, wrap: str) -> None:
        one, two = in_two_processes(tmp_path, in_one_of_two, wrap=wrap)
        assert all(torch.equal(t, two[path]) for path, t in one.items())
        assert apart(one, informed([batch(0), batch(1)], store="float32")) < 1e-3


def in_one_of_two(rank: int, world: int, wrap: str) -> dict[str, Tensor]:
    model = fresh()
    if wrap == "ddp":
        whole: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        whole = fully_shard(model)
    uora.inform(model, [batch(rank)], store="float32")
    cross_entropy(whole(batch(rank)[0]), batch(rank)[1]).backward()
    assert all(a.b.grad is not None for a in uora.adapters(model).values())
    return rows(model)
