"""Two processes train what one trains: torch's DDP and FSDP2, over gloo on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import small_vit, wake
from processes import in_two_processes
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

import uora_vision as uora

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

STEPS, BATCH = 6, 8
OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)
TOLERANCE = 1e-10
Wrap = Callable[[nn.Module], nn.Module]
Spawn = Callable[..., list[Any]]


def vit() -> nn.Module:
    return small_vit().double()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).double().eval()


def attention() -> nn.Module:
    """The module with the adapters is one that can be sharded itself, and its forward is its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Attentions([nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(2)]).double().eval()


class _Attentions(nn.Module):
    def __init__(self, layers: list[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(layers), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :64].reshape(len(x), 4, 16)
        for block in self.blocks:
            x = x + block(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


MAKERS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "llama": llama, "attention": attention}


def loss_of(model: nn.Module, step: int, rank: int, world: int) -> Tensor:
    """Mean over this process's part of the batch of a step."""
    g = torch.Generator().manual_seed(100 + step)
    if "Llama" in type(getattr(model, "module", model)).__name__:
        tokens = torch.randint(50, (BATCH, 7), generator=g).chunk(world)[rank]
        return model(input_ids=tokens, labels=tokens).loss
    images = torch.randn(BATCH, 3, 32, 32, generator=g, dtype=torch.float64).chunk(world)[rank]
    labels = torch.randint(7, (BATCH,), generator=g).chunk(world)[rank]
    return nn.functional.cross_entropy(model(images), labels)


def alone(model: nn.Module) -> nn.Module:
    return model


def ddp(model: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, **options)


def sharded(model: nn.Module) -> nn.Module:
    inner = model.model if hasattr(model, "model") else model
    for block in inner.layers if hasattr(inner, "layers") else inner.blocks:  # type: ignore[union-attr]
        fsdp.fully_shard(block)
    return fsdp.fully_shard(model)


def sharded_root(model: nn.Module) -> nn.Module:
    return fsdp.fully_shard(model)


class Run:
    """A training run that can be left and continued."""

    def __init__(self, kind: str, wrap: Wrap, scope: Any, rank: int, world: int, folder: Path | None = None) -> None:
        self.rank, self.world = rank, world
        self.model = MAKERS[kind]()
        if folder is None:
            wake(uora.inject(self.model, rank=8), scale=0.3)
        else:
            uora.load(self.model, folder)
        self.model.double()
        self.wrapped = wrap(self.model)
        groups = uora.param_groups(self.model, lr=1e-2, head_lr=3e-3, weight_decay=0.05)
        self.optimizer = torch.optim.AdamW(groups)
        self.reinit = uora.Reinitializer(
            self.model, threshold=0.2, relative=True, every=2, scope=scope, reset_moments=True,
            optimizer=self.optimizer,
        )  # fmt: skip
        if folder is not None:
            state = torch.load(folder / "state.pt")
            self.reinit.load_state_dict(state["reinit"])
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=OPTIONS)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            loss_of(self.wrapped, step, self.rank, self.world).backward()
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.reinit.step()

    def leave(self, folder: Path) -> None:
        with torch.no_grad():  # load() makes b and d in float32
            for adapter in uora.adapters(self.model).values():
                for p in adapter.parameters():
                    p.copy_(p.float().double())
        uora.save(self.model, folder)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=OPTIONS)
        if self.rank == 0:
            torch.save({"reinit": self.reinit.state_dict(), "optimizer": optimizer}, folder / "state.pt")

    def result(self) -> dict[str, Any]:
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        types = {type(p).__name__ for p in trained.values()}
        return {
            "trained": {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in trained.items()},
            "banks": {n: t.clone() for n, t in self.model.uora.named_buffers()},
            "counts": self.reinit.state_dict()["counts"],
            "history": torch.from_numpy(self.reinit.history()),
            "firings": self.reinit.firings,
            "types": types,
        }


def trained(rank: int, world: int, *, kind: str, wrap: Wrap, scope: str = "shared") -> dict[str, Any]:
    run = Run(kind, wrap, scope, rank, world)
    run.steps(0, STEPS)
    return run.result()


def first_half(rank: int, world: int, *, wrap: Wrap, folder: Path) -> None:
    run = Run("vit", wrap, "layer", rank, world)
    run.steps(0, STEPS // 2)
    run.leave(folder)


def second_half(rank: int, world: int, *, wrap: Wrap, folder: Path) -> dict[str, Any]:
    run = Run("vit", wrap, "layer", rank, world, folder)
    run.steps(STEPS // 2, STEPS)
    return run.result()


@pytest.fixture
def spawn(tmp_path: Path) -> Spawn:
    return functools.partial(in_two_processes, tmp_path)


@functools.cache
def reference(kind: str, scope: str = "shared") -> dict[str, Any]:
    return trained(0, 1, kind=kind, wrap=alone, scope=scope)


def assert_same(got: list[dict[str, Any]], want: dict[str, Any]) -> None:
    assert want["firings"] > 0 and len(set(want["history"][:, 0].tolist())) > 1
    for one in got:
        assert torch.equal(one["history"], want["history"]) and torch.equal(one["counts"], want["counts"])
        assert all(torch.equal(t, want["banks"][n]) for n, t in one["banks"].items())
        assert one["trained"].keys() == want["trained"].keys()
        differences = {n: (t - want["trained"][n]).abs().max().item() for n, t in one["trained"].items()}
        print(f"largest difference {max(differences.values()):.1e}, {want['firings']} firings")
        assert max(differences.values()) < TOLERANCE, differences
    assert all(torch.equal(t, got[1]["trained"][n]) for n, t in got[0]["trained"].items())


def buffers_sent(rank: int, world: int, *, clear: bool, outer: bool = False, **options: Any) -> dict[str, Any]:
    """Bytes that DDP sends for buffers in two forwards."""
    model = wake(uora.inject(vit(), rank=8), scale=0.3)
    if clear:
        del model._ddp_params_and_buffers_to_ignore
    model.register_buffer("statistics", torch.full((3,), float(rank), dtype=torch.float64))
    wrapped = ddp(nn.Sequential(model) if outer else model, **options)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    sent: list[int] = []
    original = wrapped._distributed_broadcast_coalesced

    def count(tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        sent.append(sum(t.nbytes for t in tensors))
        return original(tensors, *args, **kwargs)

    wrapped._distributed_broadcast_coalesced = count  # type: ignore[method-assign]
    for images in (x, x + 1):
        wrapped(images).square().mean().backward()
    return {"bytes": sum(sent), "statistics": model.statistics.tolist()}


BANKS = (64 + 256) * 2 * 8 * 8 + 16 * 4  # with the mark
"""Bytes of A and B of the small ViT: two widths, rank 8, float64."""


class TestDdp:
    @pytest.mark.parametrize(
        ("kind", "scope"), [pytest.param("vit", "shared", marks=pytest.mark.slow), ("vit", "layer")]
    )
    @pytest.mark.slow
    def test_two_processes_train_what_one_trains(self, spawn: Spawn, kind: str, scope: str) -> None:
        assert_same(spawn(trained, kind=kind, wrap=ddp, scope=scope), reference(kind, scope))

    def test_without_sending_any_buffers(self, spawn: Spawn) -> None:
        wrap = functools.partial(ddp, broadcast_buffers=False)
        assert_same(spawn(trained, kind="vit", wrap=wrap), reference("vit"))

    def test_banks_are_not_sent_and_other_buffers_are(self, spawn: Spawn) -> None:
        for got in spawn(buffers_sent, clear=False):
            assert got == {"bytes": 2 * 3 * 8, "statistics": [0.0] * 3}

    def test_they_would_be_sent_before_every_forward(self, spawn: Spawn) -> None:
        """What torch does without the list that inject() leaves: the reason for it."""
        assert [got["bytes"] for got in spawn(buffers_sent, clear=True)] == [2 * (3 * 8 + BANKS)] * 2

    def test_a_module_around_the_injected_one_hides_the_list(self, spawn: Spawn) -> None:
        assert spawn(buffers_sent, clear=False, outer=True)[0]["bytes"] == 2 * (3 * 8 + BANKS)
        assert spawn(buffers_sent, clear=False, outer=True, broadcast_buffers=False)[0]["bytes"] == 0

    def test_the_list_names_all_of_the_bank_and_goes_with_the_adapter(self) -> None:
        model = vit()
        model._ddp_params_and_buffers_to_ignore = ["mine"]
        wake(uora.inject(model, rank=8), scale=0.3)
        uora.Reinitializer(model, threshold=0.2, relative=True, scope="layer").step()
        present = {n for n, _ in model.named_buffers() if "uora" in n}
        assert present and present | {"mine"} == set(model._ddp_params_and_buffers_to_ignore)
        uora.remove(model)
        assert set(model._ddp_params_and_buffers_to_ignore) == {"mine"}
        other = uora.remove(uora.inject(vit(), rank=8))
        assert not hasattr(other, "_ddp_params_and_buffers_to_ignore")


class TestFsdp2:
    @pytest.mark.parametrize(
        ("kind", "wrap", "scope"),
        [
            ("vit", sharded, "shared"),
            pytest.param("vit", sharded, "layer", marks=pytest.mark.slow),
            pytest.param("vit", sharded_root, "shared", marks=pytest.mark.slow),
            ("attention", sharded, "shared"),
        ],
    )
    @pytest.mark.slow
    def test_two_processes_train_what_one_trains(self, spawn: Spawn, kind: str, wrap: Wrap, scope: str) -> None:
        got = spawn(trained, kind=kind, wrap=wrap, scope=scope)
        assert got[0]["types"] == {"DTensor"}
        assert_same(got, reference(kind, scope))

    def test_what_needs_whole_parameters_says_so(self, spawn: Spawn) -> None:
        for messages in spawn(refused):
            assert len(messages) == 4 and all("before fully_shard()" in m for m in messages)

    def test_save_writes_what_one_process_writes_and_only_once(self, spawn: Spawn, tmp_path: Path) -> None:
        assert spawn(saved, folder=tmp_path / "two") == [True, False]
        uora.save(wake(uora.inject(vit(), rank=8), scale=0.3), tmp_path / "one")
        two = tmp_path / "two" / "0"
        assert (two / "adapter_config.json").read_bytes() == (tmp_path / "one" / "adapter_config.json").read_bytes()
        got, want = (load_file(folder / "adapter_model.safetensors") for folder in (two, tmp_path / "one"))
        assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


def refused(rank: int, world: int) -> list[str]:
    plain, injected = sharded(vit()), sharded(uora.inject(vit(), rank=8))
    out = []
    for act in (
        lambda: uora.inject(plain), lambda: uora.load(plain, "nowhere"),
        lambda: uora.merge(injected), lambda: uora.remove(injected),
    ):  # fmt: skip
        with pytest.raises(uora.UoraError) as caught:
            act()
        out.append(str(caught.value))
    return out


def saved(rank: int, world: int, *, folder: Path) -> bool:
    model = sharded(wake(uora.inject(vit(), rank=8), scale=0.3))
    return uora.save(model, folder / str(rank)).exists()


@pytest.mark.slow
class TestLlama:
    def test_two_processes_train_what_one_trains(self, spawn: Spawn) -> None:
        for got in zip(*spawn(llamas), strict=True):
            assert_same(list(got), reference("llama"))


def llamas(rank: int, world: int) -> list[dict[str, Any]]:
    return [trained(rank, world, kind="llama", wrap=wrap) for wrap in (ddp, sharded)]


class TestCheckpoint:
    @pytest.mark.parametrize("wrap", [pytest.param(ddp, marks=pytest.mark.slow), sharded])
    @pytest.mark.slow
    def test_from_two_processes_into_one_and_back(self, spawn: Spawn, tmp_path: Path, wrap: Wrap) -> None:
        folders = [tmp_path / n for n in ("one", "two")]
        first_half(0, 1, wrap=alone, folder=folders[0])
        spawn(first_half, wrap=wrap, folder=folders[1])
        want = second_half(0, 1, wrap=alone, folder=folders[0])
        assert_same([second_half(0, 1, wrap=alone, folder=folders[1])] * 2, want)
        assert_same(spawn(second_half, wrap=wrap, folder=folders[0]), want)
