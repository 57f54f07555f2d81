"""Small runs in training tools: models, data, and what makes two runs equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import banks, small_vit, wake
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import uora_vision as uora
from uora_vision.integrations.state import changing_state

transformers = pytest.importorskip("transformers", reason="needs transformers")


# Awake d are normal: at 0.2 some 16 % of them are dead.
REDRAW: dict[str, Any] = {"threshold": 0.2, "alpha": uora.AlphaDecay(0.9), "every": 2}
SALIENT: dict[str, Any] = {
    "criterion": "saliency", "relative": True, "threshold": 0.5, "scope": "layer", "source": "informed",
}  # fmt: skip
WORDS = ["[PAD]", "[EOS]", "[UNK]", *"abcdefghijklmnop"]


def vit() -> nn.Module:
    return wake(uora.inject(small_vit(), rank=8))


def same(one: nn.Module, two: nn.Module) -> None:
    """Two models are equal to the bit in b, d, head, A and B."""
    first, second = changing_state(one) | banks(one), changing_state(two) | banks(two)
    assert first.keys() == second.keys()
    assert [name for name, t in first.items() if not torch.equal(t, second[name])] == []


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def base_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters() if not p.requires_grad)


class Overflow(nn.Module):
    """Its output is infinite in the second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, loss: Tensor) -> Tensor:
        self.calls += 1
        return loss * float("inf") if self.calls == 2 else loss


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return wake(uora.inject(transformers.BertForSequenceClassification(config), rank=8))


def examples() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(WORDS), (32, 6), generator=g)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 3} for row in ids]


def arguments(folder: Path, kind: Any = transformers.TrainingArguments, **options: Any) -> Any:
    given = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1, "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "seed": 3,
    }  # fmt: skip
    return kind(**{**given, **options})


def tensorboard(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (path,) = folder.rglob("events.out*")
    events = EventAccumulator(str(path))
    events.Reload()
    return [e.value for e in events.Scalars(tag)]


def pictures(batch: int = 4, n: int = 48) -> DataLoader:
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(n, 3, 32, 32, generator=g), torch.arange(n) % 7), batch)
