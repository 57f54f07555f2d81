"""Adapters over quantised layers, merged and written for PEFT, and models that are loaded quantised."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import wake
from quantised_models import KINDS, TOKENS, codes, llama, logits, quantised_llama
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.export import to_peft_lora, to_peft_vera


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 50, (2, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reversible_merge_gives_the_quantised_layers_back(kind: str, tokens: Tensor) -> None:
    model = wake(uora.inject(quantised_llama(kind), rank=8, train=()), scale=0.3)
    layers = {path: model.get_submodule(path) for path in uora.adapters(model)}
    with torch.no_grad():
        want = logits(model, tokens)
        uora.merge(model, reversible=True, dequantize=True)
        assert [type(m) for m in model.modules()] == [type(m) for m in llama().modules()]
        assert not torch.equal(logits(model, tokens), want)
        uora.unmerge(model)
        assert torch.equal(logits(model, tokens), want)
    assert all(model.get_submodule(path) is layer for path, layer in layers.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_into_a_half_type_states_its_rounding(kind: str, tokens: Tensor) -> None:
    model = wake(uora.inject(quantised_llama(kind, torch.bfloat16), rank=8, train=()), scale=0.3)
    report = uora.merge(model, {"input_ids": tokens}, dequantize=True)
    weights = [m.weight for m in model.modules() if type(m) is nn.Linear]
    assert {w.dtype for w in weights} == {torch.bfloat16}
    assert 1e-4 < report.weight_error < 2**-8 * max(w.abs().max().item() for w in weights)
    assert report.output_error is not None and report.output_error > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_that_transformers_loads_quantised(bits: int, tokens: Tensor, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    how = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
               "bnb_4bit_compute_dtype": torch.float32}, 8: {"load_in_8bit": True}}[bits]  # fmt: skip
    config = transformers.BitsAndBytesConfig(**how)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    assert len(codes(model)) == 14
    for layer in codes(model):
        layer.support_avx512bf16_for_cpu = False  # or this first call packs the weights on some processors
    with torch.no_grad():
        before = logits(model, tokens)
    uora.inject(model, rank=8, train=())
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert all(a.b.grad.abs().max() > 0 for a in uora.adapters(model).values())
    with torch.no_grad():
        assert torch.equal(logits(model, tokens), before)
        uora.merge(wake(model, scale=0.3), dequantize=True)
        assert model.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, TOKENS + 3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "torchao" not in kind])
@pytest.mark.slow
def test_peft_takes_the_adapter_over_the_same_codes(kind: str, tokens: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = wake(uora.inject(quantised_llama(kind), rank=8, train=()), scale=0.3)
    for name, export in (("lora", to_peft_lora), ("vera", to_peft_vera)):
        export(model, tmp_path / name)
        base = quantised_llama(kind)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain, want = logits(base, tokens), logits(model, tokens)
            got = logits(peft.PeftModel.from_pretrained(base, tmp_path / name).eval(), tokens)
        assert (got - want).abs().max() < 1e-4 * want.abs().max() < 1e-2 * (want - plain).abs().max()
