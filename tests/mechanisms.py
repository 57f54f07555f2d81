"""Small real models of every mechanism by which a projection is held."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import open_clip
import timm
import torch
import transformers
from conftest import wake
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.structure.example import float_tensors

Made = tuple[nn.Module, tuple[Tensor, ...]]
PLAIN: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
STAGED: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16), "conv_mlp": True, "num_classes": 5}
TOWERS = ({"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
          {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1})  # fmt: skip
GPT2: dict[str, Any] = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
MIXTURE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16,
}  # fmt: skip
IDS = torch.tensor([[1, 7, 3, 9, 2], [4, 4, 8, 30, 11]])
draw = torch.randn

MODELS: dict[str, Callable[[], Made]] = {
    "vit": lambda: (timm.create_model("vit_tiny_patch16_224", **PLAIN), (draw(2, 3, 32, 32),)),
    "convnext": lambda: (timm.create_model("convnext_tiny", **STAGED), (draw(2, 3, 32, 32),)),
    "beit": lambda: (timm.create_model("beit_base_patch16_224", **PLAIN), (draw(2, 3, 32, 32),)),
    "sequence": lambda: (nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), (draw(2, 5, 16),)),
    "attention": lambda: (nn.MultiheadAttention(16, 2, kdim=12, vdim=8),
                          (draw(3, 2, 16), draw(5, 2, 12), draw(5, 2, 8))),
    "encoder": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True), 1),
                        (draw(2, 5, 32),)),
    "clip": lambda: (open_clip.CLIP(16, *TOWERS), (draw(2, 3, 32, 32), torch.randint(50, (2, 8)))),
    "lstm": lambda: (nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True, proj_size=3), (draw(2, 5, 6),)),
    "gpt2": lambda: (transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), (IDS,)),
    **{f"{name}, {experts}": lambda m=model, c=config, e=experts: (m(c(**MIXTURE, experts_implementation=e)), (IDS,))
       for name, model, config in (
           ("mixtral", transformers.MixtralForCausalLM, transformers.MixtralConfig),
           ("gpt_oss", transformers.GptOssForCausalLM, transformers.GptOssConfig))
       for experts in ("eager", "grouped_mm", "batched_mm")},
}  # fmt: skip


def make(name: str) -> Made:
    """A model as after training: no weight, bias or scale is at a start that would hide something."""
    model, args = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p.shape[-1] ** -0.5) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return model.eval(), args


def both(name: str) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """A plain model, the same adapted, and their input."""
    plain, args = make(name)
    return plain, wake(uora.inject(copy.deepcopy(plain), rank=4), 2.0), args


def run(model: Any, args: tuple[Tensor, ...]) -> Tensor:
    """All that a model puts out, in one vector."""
    return torch.cat([t.flatten() for t in float_tensors(model(*args))])
