"""What a training step costs on a Llama-shaped language model: `step.py` with tokens in place of images.

    python scripts/benchmarks/llm.py --threads 1
    python scripts/benchmarks/llm.py --device cuda --dtype bf16 --batch 4 --hidden 2048 --intermediate 5632 \
        --layers 22 --heads 32 --kv-heads 4 --rounds 20

The second is a model of 1.1B parameters. Weights are random. Adapters sit on q, k, v, o, gate, up and down of every
layer. The frozen floor and every method train the last norm besides, so that there is something to train; the embedding
and the output layer are frozen. What is measured, and how, is said at the head of `step.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from step import default_device, new_folder, run
from subject import Dtype, Settings
from torch import Tensor, nn


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


def main(
    batch: Annotated[int, typer.Option(min=1, help="sequences per step")] = 1,
    sequence: Annotated[int, typer.Option(min=2, help="tokens per sequence")] = 512,
    hidden: Annotated[int, typer.Option(min=1, help="width of the model")] = 768,
    intermediate: Annotated[int, typer.Option(min=1, help="width of the MLP")] = 2048,
    layers: Annotated[int, typer.Option(min=1)] = 12,
    heads: Annotated[int, typer.Option(min=1, help="of attention")] = 12,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="for keys and values; by default as many")] = None,
    vocabulary: Annotated[int, typer.Option(min=2, help="number of tokens")] = 32_000,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default the GPU if there is one")] = "",
    dtype: Annotated[Dtype, typer.Option(help="bf16 also stores the weights so")] = Dtype.fp32,
    threads: Annotated[int | None, typer.Option(min=1, help="on the CPU; by default torch's choice")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often every method is timed")] = 3,
    minutes: Annotated[float, typer.Option(min=0, help="no further round if it would end later")] = 15.0,
    methods: Annotated[str, typer.Option(help="names, separated by commas")] = "floor,uora-256,vera-256,lora-16",
    compile: Annotated[bool, typer.Option("--compile", help="with torch.compile")] = False,
    output: Annotated[Path | None, typer.Option(help="folder; by default a new one in runs/")] = None,
) -> None:
    settings = LlamaSettings(
        "llama", batch, device or default_device(), dtype, None, threads, compile, sequence, hidden, intermediate,
        layers, heads, kv_heads or heads, vocabulary,
    )  # fmt: skip
    with torch.device("meta"):
        size = sum(p.numel() for p in settings.make().parameters())
    parts = [f"Llama shape of {size / 1e6:,.0f}M", f"batch {batch} x {sequence}"]
    run(settings, methods, rounds, minutes, parts, output or new_folder("benchmark_llm"))


if __name__ == "__main__":
    typer.run(main)
