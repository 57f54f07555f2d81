"""VeRA adapters that PEFT trained, put into models of this library: the same outputs, and all of its life after."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged, small_vit, trained
from mechanisms import make as make_one
from mechanisms import run
from peft_models import close, loaded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from unchanged import assert_same, snapshot

import uora_vision as uora
from uora_vision.export import from_peft_vera, to_peft_vera

peft = pytest.importorskip("peft")


def by_peft(base: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """A VeRA adapter as after training, saved by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.VeraConfig(**{"r": 6, **options})).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "vera_lambda" in name:
                    p.normal_()
                if "modules_to_save" in name:
                    p.add_(torch.randn_like(p))
        model.save_pretrained(folder)
    return model


VIT = r"blocks\.\d\.(attn\.(qkv|proj)|mlp\.fc[12])"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {"target_modules": VIT, "modules_to_save": ["head", "norm"]}),
    "drawn again": ("vit", {"target_modules": VIT, "save_projection": False, "projection_prng_key": 11}),
    "some": ("vit", {"target_modules": ["fc1", "qkv"], "d_initial": 0.02}),
    "biases": ("vit", {"target_modules": ["fc1", "qkv"], "bias": "all"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "mlp.c_proj"]}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_same_function(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    kind, options = CASES[case]
    plain, args = make_one(kind)
    plain = plain.to(dtype)
    args = tuple(t.to(dtype) if t.is_floating_point() else t for t in args)
    with torch.no_grad():
        reference = by_peft(copy.deepcopy(plain), tmp_path / "peft", **options)
        want, base = run(reference, args), run(plain, args)
        model = from_peft_vera(copy.deepcopy(plain), tmp_path / "peft")
        close(run(model, args), want, base, 1e-5 if dtype == torch.float32 else 1e-6)
        if dtype == torch.float32:
            close(run(merged(copy.deepcopy(model)), args), want, base)
            uora.save(model, tmp_path / "uora")
            assert torch.equal(run(uora.load(copy.deepcopy(plain), tmp_path / "uora"), args), run(model, args))
            to_peft_vera(model, tmp_path / "back")
            close(run(loaded(copy.deepcopy(plain), tmp_path / "back"), args), want, base)
            there, back = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("peft", "back"))
            assert all(torch.equal(there[name], back[name]) for name in there if "bias" not in name)


def test_it_trains_and_is_drawn_again(images: Tensor, tmp_path: Path) -> None:
    by_peft(small_vit(), tmp_path / "peft", target_modules=VIT)
    model = from_peft_vera(small_vit(), tmp_path / "peft")
    assert set(uora.verify(model, images)) == {f"blocks.{i}.{p}" for i in range(2) for p in (
        "attn.qkv.qkv", "attn.proj.proj", "mlp.fc1.fc1", "mlp.fc2.fc2")}  # fmt: skip
    reinit = uora.Reinitializer(model, threshold=1e-9, scope="layer")
    with torch.no_grad():
        next(iter(uora.adapters(model).values())).d[0, 2] = 0
    assert reinit.step() == 1
    uora.save(model, tmp_path / "uora")
    assert torch.equal(uora.load(small_vit(), tmp_path / "uora")(images), model(images))


def test_beside_other_adapters(images: Tensor, tmp_path: Path) -> None:
    by_peft(small_vit(), tmp_path / "peft", target_modules=VIT)
    want = from_peft_vera(small_vit(), tmp_path / "peft")(images)
    model = trained(rank=6, layout="slice", init="kaiming")
    mine = model(images)
    from_peft_vera(model, tmp_path / "peft", name="peft", activate=False)
    assert torch.equal(model(images), mine)
    uora.save(model, tmp_path / "mine")
    assert torch.equal(uora.load(small_vit(), tmp_path / "mine")(images), mine)
    with pytest.raises(uora.StateError, match="already has an adapter 'peft'"):
        from_peft_vera(model, tmp_path / "peft", name="peft")
    other = from_peft_vera(small_vit(), tmp_path / "peft")
    assert torch.equal(other(images), want)
    uora.load(other, tmp_path / "mine", name="mine")
    assert torch.equal(other(images), mine), "banks of PEFT's matrices must not serve adapters of our own"


def damage(change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        change(config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        try:
            save_file(tensors, folder / "adapter_model.safetensors")
        except KeyError as error:  # of one that came before it had complex numbers
            pytest.skip(f"this safetensors writes no {error}")

    return apply


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


KEY = "base_model.model.blocks.0.mlp.fc1.vera_lambda_"
HEAD = "base_model.model.head.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()], "does not exist"),
    "lora": (damage(lambda c, t: c.update(peft_type="LORA")), "not a VeRA adapter"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "does not exist"),
    "truncated": (truncate, "truncated"),
    "no d": (damage(lambda c, t: t.pop(KEY + "d")), "blocks.0.mlp.fc1 has b of"),
    "other width": (damage(lambda c, t: t.update({KEY + "b": torch.ones(9)})), "blocks.0.mlp.fc1 has b of"),
    "other layer": (damage(lambda c, t: t.update({KEY.replace("fc1", "fc9") + "b": torch.ones(9)})), "fc9"),
    "no A": (damage(lambda c, t: t.pop("base_model.vera_A")), "lacks vera_A"),
    "small A": (damage(lambda c, t: t.update({"base_model.vera_A": torch.ones(6, 3)})), "do not serve"),
    "other head": (damage(lambda c, t: t.update({"base_model.model.head.weight": torch.ones(3, 3)})), "head.weight"),
    "rank": (damage(lambda c, t: c.update(r="6")), "rank"),
    "no rank": (damage(lambda c, t: c.update(r=None)), "rank"),
    "seed": (damage(lambda c, t: c.update(projection_prng_key=2**64)), "seed must be below"),
    "start of d": (damage(lambda c, t: c.update(d_initial=1e308)), "d_init must be between"),
    "start of d in digits": (damage(lambda c, t: c.update(d_initial=10**400)), "d_init must be between"),
    "dropout": (damage(lambda c, t: c.update(vera_dropout=1)), "vera_dropout"),
    "A of no dimensions": (damage(lambda c, t: t.update({"base_model.vera_A": torch.tensor(1.0)})), "do not serve"),
    "b of whole numbers": (damage(lambda c, t: t.update({KEY + "b": t[KEY + "b"].int()})), "not of floats"),
    "b too large": (damage(lambda c, t: t.update({KEY + "b": t[KEY + "b"].double() + 1e300})), "too large for"),
    "head of complex numbers": (damage(lambda c, t: t.update({HEAD: t[HEAD].cfloat()})), "complex64"),
    "head too large": (damage(lambda c, t: t.update({HEAD: t[HEAD].double() + 1e300})), "too large for"),
    "not finite": (damage(lambda c, t: t[KEY + "b"].fill_(torch.nan)), "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_change_nothing(name: str, tmp_path: Path) -> None:
    by_peft(small_vit(), tmp_path, target_modules=["fc1", "qkv"], modules_to_save=["head"])
    spoil, message = DAMAGES[name]
    spoil(tmp_path)
    model = small_vit()
    before = snapshot(model)
    with pytest.raises(uora.FormatError, match=message):
        from_peft_vera(model, tmp_path)
    assert_same(before, model)


def test_a_weight_that_peft_passed_by(tmp_path: Path) -> None:
    plain, (x,) = make_one("beit")
    with torch.no_grad():
        model = by_peft(copy.deepcopy(plain), tmp_path, target_modules=["qkv", "fc1"])
        with pytest.raises(uora.FormatError, match="PEFT computes without it"):
            from_peft_vera(copy.deepcopy(plain), tmp_path)
        for name, p in model.named_parameters():
            if "qkv.vera_lambda_b" in name:
                p.zero_()  # as PEFT leaves it, since it gets no gradient
        model.save_pretrained(tmp_path)
        close(from_peft_vera(copy.deepcopy(plain), tmp_path)(x), model(x), plain(x))
