"""Over families of models: what is written for PEFT computes the same in PEFT, and the rest is refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import need_timm, wake
from families import FAMILIES as TIMM
from families import HELD, small
from proof.zoo import call, entries
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.export import to_peft_lora, to_peft_vera
from uora_vision.interop.peft_folder import adapted_weights, check_expressible
from uora_vision.structure.example import float_tensors

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow
NAMES = ["llama", "bloom", "falcon", "bert", "vit", "clip", "siglip", "dinov2", "bart", "swin", "gptj", "opt"]
CONVOLUTIONS = {
    "timm/mobilevitv2_050", "timm/efficientvit_b0", "timm/efficientvim_m1", "timm/lambda_resnet26t", "timm/halonet26t",
}  # fmt: skip
"""All of whose projections are convolutions, which PEFT's VeRA does not take."""
CASES = [name for name in HELD.values() if name != "timm/test_resnet"]
CASES += [*(f"transformers/{name}" for name in NAMES), *TIMM]


def made(name: str) -> tuple[nn.Module, Any]:
    if "/" in name:
        need_timm(name)
    return entries(name)[0].real() if "/" in name else small(name)


def outputs(model: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([t.float().flatten() for t in float_tensors(call(model, example))])


def refused(model: nn.Module, method: str) -> list[str]:
    out = []
    for w in adapted_weights(model):
        try:
            check_expressible(model, [w], method)
        except uora.ExportError as error:
            assert w.path in str(error)
            out.append(w.path)
    return out


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "LoRA") for name in CASES), *((name, "VeRA") for name in CASES if "/" in name)]
)
def test_the_same_function_or_a_refusal(name: str, method: str, tmp_path: Path) -> None:
    """In VeRA those that hold their projections in ways of their own; the others are held as these are."""
    export = to_peft_lora if method == "LoRA" else to_peft_vera
    plain, example = made(name)
    plain.eval()
    model = uora.inject(copy.deepcopy(plain), rank=4)
    out = refused(model, method)
    if out:
        with pytest.raises(uora.ExportError, match=method):
            export(model, tmp_path)
        assert not any(tmp_path.iterdir())
    nothing = len(out) == len(uora.adapters(model))
    assert nothing == (method == "VeRA" and name in CONVOLUTIONS), "what can be written has changed"
    if nothing:
        return  # all that there is to this case: refused, and no file
    uora.remove(model)
    wake(uora.inject(model, rank=4, exclude=out))
    export(model, tmp_path)
    base, want = outputs(plain, example), outputs(model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = outputs(peft.PeftModel.from_pretrained(plain, tmp_path).eval(), example)
    error, change = (got - want).abs().max(), (want - base).abs().max()
    assert error < 1e-4 * want.abs().max() and error < 1e-3 * change
