"""A program has set another default device or type, or computes under autocast: nothing comes out other for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from redrawn import Net, X, made, out, redraw, wake
from safetensors.torch import load_file, save_file
from torch import Tensor

import uora_vision as uora
from uora_vision import export

Setting = Callable[[], AbstractContextManager[object]]


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


# On the meta device, every tensor that the library makes where it does not mean to has no values.
SETTINGS: dict[str, Setting] = {
    "a device around it": lambda: torch.device("meta"),
    "a default device": lambda: _default_device("meta"),
    "float64": lambda: _default_type(torch.float64),
    "bfloat16": lambda: _default_type(torch.bfloat16),
}


def _adapted(setting: Setting, folder: Path) -> list[Tensor]:
    """Outputs of a model that is adapted, looked at, informed, saved, loaded, switched and merged in a setting."""
    model, other = Net().eval(), Net()
    with setting():
        uora.inject(model, rank=4, targets="all", example_input=X)
        uora.verify(model, X)
        shares = uora.inform(model, [X], lambda model, x: model(x).square().mean())
        wake(model, 1)
        uora.save(model, folder / "informed")
        base = uora.Base(other)
        for name in ("a", "b"):
            uora.load(other, folder / "informed", name=name, activate=False, base=base)
        uora.activate(other, "a")
    wake(other, 2)
    with setting(), torch.no_grad(), uora.route(other.eval(), ["a", "b", "b", None, "a"]):
        mixed = other(X)
    with setting():
        uora.merge(model, X, reversible=True)
    merged = out(model)
    with setting():
        uora.unmerge(model)
    return [torch.tensor(list(shares.values())), mixed, merged, out(model), out(other)]


def _redrawn(setting: Setting, folder: Path) -> list[Tensor]:
    """The same of redraws in every scope, and of what a state dict and a file carry of them."""
    results = []
    for scope in ("shared", "quorum", "layer"):
        model, again, loaded = made(), uora.inject(Net(), rank=4, targets="all"), Net()
        optimizer = torch.optim.Adam(uora.param_groups(model, lr=0.1))
        model(X).square().mean().backward()
        optimizer.step()
        for adapter in uora.adapters(model).values():
            adapter.d.data[:, 1:3] = 0
        with setting():
            reinit = uora.Reinitializer(model, scope=scope, reset_moments=True, optimizer=optimizer)  # type: ignore[arg-type]
            assert reinit.step() == 8 and len(reinit.history()) == 8
            reinit.load_state_dict(reinit.state_dict())
            again.load_state_dict(model.state_dict())
            uora.save(model, folder / scope, save_banks="all")
            uora.load(loaded, folder / scope)
        results += [out(model), out(again), out(loaded)]
    return results


def _exchanged(setting: Setting, folder: Path) -> list[Tensor]:
    """The same of what is written for PEFT, of several ranks, and read again with A and B and without."""
    model = redraw(made(train=()), "layer")
    vera, drawn = Net(), Net()
    with setting():
        export.to_peft_lora(model, folder / "lora")
        export.to_peft_lora(model, folder / "small", rank=1)
        export.to_peft_vera(model, folder / "vera")
        export.from_peft_vera(vera, folder / "vera")
    written = [load_file(folder / name / "adapter_model.safetensors") for name in ("lora", "small")]
    tensors = load_file(folder / "vera" / "adapter_model.safetensors")
    config = json.loads((folder / "vera" / "adapter_config.json").read_text())
    save_file({n: t for n, t in tensors.items() if "vera_A" not in n and "vera_B" not in n},
              folder / "vera" / "adapter_model.safetensors")  # fmt: skip
    (folder / "vera" / "adapter_config.json").write_text(json.dumps(config | {"save_projection": False}))
    with setting():
        export.from_peft_vera(drawn, folder / "vera")
    return [*(t for tensors in written for _, t in sorted(tensors.items())), out(vera), out(drawn)]


@pytest.mark.parametrize("what", [_adapted, _redrawn, _exchanged])
@pytest.mark.slow
def test_another_default_device_or_type_changes_nothing(
    what: Callable[[Setting, Path], list[Tensor]], tmp_path: Path
) -> None:
    want = what(nullcontext, tmp_path / "as ever")
    for name, setting in SETTINGS.items():
        got = what(setting, tmp_path / name)
        odd = [i for i, (one, two) in enumerate(zip(want, got, strict=True)) if not torch.equal(one, two)]
        assert not odd, f"{name}: {odd}"


def test_the_sum_of_a_merge_is_not_rounded_under_autocast() -> None:
    model, under = made(), made()
    with torch.autocast("cpu", torch.bfloat16):
        deltas = {path: a.delta_weight(torch.float32) for path, a in uora.adapters(under).items()}
    for path, adapter in uora.adapters(model).items():
        assert torch.equal(adapter.delta_weight(torch.float32)[0], deltas[path][0])
    uora.merge(model)
    with torch.autocast("cpu", torch.bfloat16):
        uora.merge(under)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), under.parameters(), strict=True))
