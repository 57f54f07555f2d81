"""A Llama-shaped model, as the subject of `step`; see the command."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .subject import Settings


@dataclass(frozen=True)
class LlamaSettings(Settings):
    """A Llama with random weights, and sequences of random tokens.

    Args:
        sequence: tokens of a sample.
        hidden: width of the stream; the others as in transformers' LlamaConfig.
    """

    sequence: int = 512
    hidden: int = 768
    intermediate: int = 2048
    layers: int = 12
    heads: int = 12
    kv_heads: int = 12
    vocabulary: int = 32_000

    @property
    def packages(self) -> list[str]:
        return ["transformers", "uora_vision", "peft"]

    def make(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.sequence,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        return list(model.get_submodule("model.norm").parameters())

    def data(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        shape = (self.batch, self.sequence)
        return torch.randint(self.vocabulary, shape), torch.randint(self.vocabulary, shape)

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=inputs).logits
        return logits
