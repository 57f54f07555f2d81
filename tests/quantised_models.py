"""Small quantised language models of every kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from uora_vision.weights.quantised import is_quantised

bnb = pytest.importorskip("bitsandbytes", reason="the quantised layers are bitsandbytes'")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchao = pytest.importorskip("torchao", reason="the quantised weights are torchao's")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup


WIDTH, TOKENS = 64, 6


def bitsandbytes(make: Callable[[nn.Linear], nn.Linear]) -> Callable[[nn.Module], None]:
    """Replaces every Linear but the head by what is made of it."""

    def change(model: nn.Module) -> None:
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and path != "lm_head":
                new = make(module)
                new.load_state_dict(module.state_dict())
                new.support_avx512bf16_for_cpu = False  # or the layers' own outputs depend on the processor
                model.set_submodule(path, new.to("cpu"))

    return change


def four_bit(kind: str, nested: bool) -> Callable[[nn.Module], None]:
    return bitsandbytes(
        lambda m: bnb.nn.Linear4bit(
            m.in_features, m.out_features, m.bias is not None, quant_type=kind, compress_statistics=nested
        )
    )


def ao(config: Any) -> Callable[[nn.Module], None]:
    return lambda model: quantize_(model, config, lambda m, path: type(m) is nn.Linear and path != "lm_head")


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "nf4": four_bit("nf4", nested=False),
    "nf4 double": four_bit("nf4", nested=True),
    "fp4": four_bit("fp4", nested=False),
    "8bit": bitsandbytes(
        lambda m: bnb.nn.Linear8bitLt(m.in_features, m.out_features, m.bias is not None, has_fp16_weights=False)
    ),
    "torchao int8": ao(Int8WeightOnlyConfig()),
    "torchao int4": ao(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}
EXACT = [kind for kind in KINDS if kind != "8bit"]
"""bitsandbytes' 8-bit layers quantise their inputs too, so their outputs are not those of the dequantised matrix."""


def llama(seed: int = 0, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_bias=True, max_position_embeddings=32, pad_token_id=0, **options,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(std=0.1) if name.endswith("bias") else p
                p.mul_(6.0) if p.dim() > 1 and "embed" not in name else p
    return model.eval()


def quantised_llama(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = llama().to(dtype)
    KINDS[kind](model)
    return model.eval()


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits


def codes(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if is_quantised(m._parameters.get("weight"))]
