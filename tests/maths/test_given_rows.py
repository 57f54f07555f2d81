"""Redraws with rows from outside, which the log holds."""

from __future__ import annotations

import pytest
import torch

import uora_vision as uora
from uora_vision.maths.bank import Bank
from uora_vision.maths.redraw_log import log_from_bytes, log_to_bytes, pack_log, unpack_log
from uora_vision.maths.widths import OwnMatrix, Widths

OWN = {"l.q/A": OwnMatrix("l.q/A", "A32", 32)}


def bank(ins: tuple[int, ...] = (32,)) -> Bank:
    return Bank(uora.UoraConfig(rank=8), Widths(frozenset(ins), frozenset({32})))


def test_they_come_back_from_a_packed_log_and_from_bytes() -> None:
    b, rows = bank(), torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    first = b.redraw("A32", torch.tensor([1, 5]), torch.zeros(2), 1, rows)
    b.redraw(OWN["l.q/A"], torch.tensor([3]), torch.zeros(1), 1, rows[:1])
    b.redraw("A32", torch.tensor([5]), torch.full((1,), 0.5), 2)
    assert first.rows is not None and (b.get_buffer("A32")[1] == first.rows[0]).all()
    assert ((first.rows - rows).abs() <= rows.abs().amax(1, keepdim=True) / 64 / 2).all()
    for log in (unpack_log(*pack_log(b.log)), log_from_bytes(log_to_bytes(b.log, {"seed": 0}))[0]):
        again = bank()
        again.replay(log, OWN)
        assert again.digest == b.digest
        assert torch.equal(again.get_buffer("A32"), b.get_buffer("A32"))
        assert torch.equal(again.own("l.q/A")[1], b.own("l.q/A")[1])
    other = bank()
    other.replay(b.log[:1], OWN)
    assert other.digest != b.digest
    changed = bank()
    changed.redraw("A32", torch.tensor([1, 5]), torch.zeros(2), 1, 2 * rows)
    assert changed.digest != other.digest, "what is given is a part of what the redraws are"


def test_damage_is_told() -> None:
    b = bank(ins=(32, 64))
    b.redraw("A32", torch.tensor([1]), torch.zeros(1), 1, torch.ones(1, 32))
    b.redraw("A64", torch.tensor([1]), torch.zeros(1), 1, torch.ones(1, 64))
    tensors, names = pack_log(b.log)
    for damaged in (
        {k: v for k, v in tensors.items() if k != "lengths"},
        {k: v for k, v in tensors.items() if k in ("entries", "alpha")},
        tensors | {"values": tensors["values"][:-1]},
        tensors | {"values": tensors["values"].short()},
        tensors | {"lengths": 0 * tensors["lengths"]},
        tensors | {"exponents": tensors["exponents"][:-1]},
    ):
        with pytest.raises(uora.FormatError, match="given rows"):
            unpack_log(damaged, names)
    for name, value in (("exponents", 127 + 0 * tensors["exponents"]), ("lengths", tensors["lengths"].flip(0))):
        with pytest.raises(uora.FormatError, match="rows at step 1 that it cannot have"):
            bank(ins=(32, 64)).replay(unpack_log(tensors | {name: value}, names), OWN)
