"""Small beds on which many short runs can be made: a frozen backbone, images in memory, one training loop.

Each bed is a real task far from what its backbone has learnt, at a size at which a run takes seconds on one core.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

ROOT = Path(__file__).resolve().parents[2]
BATCH = 32


@dataclass(frozen=True)
class Bed:
    """A backbone and three sets of examples: `train`, `tune` (held out of the training images) and `test`.

    Args:
        make: gives a fresh copy of the backbone with a new head; call it under a seed.
    """

    make: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    tune: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def all_train(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.train[0], self.tune[0]]), torch.cat([self.train[1], self.tune[1]])


def digits(pixels: int, classes: range = range(10), tune: float = 0.3) -> list[tuple[Tensor, Tensor]]:
    """scikit-learn's digits as (n, 3, pixels, pixels), every third image a test image: train, tune, test."""
    raw = load_digits()
    x = torch.from_numpy(raw.images).float().div(16).mul(255).round().div(255)[:, None]
    if pixels != 8:
        x = interpolate(x, size=(pixels, pixels), mode="bicubic", antialias=True).clamp(0, 1)
    x, y = ((x - 0.3) / 0.35).expand(-1, 3, -1, -1), torch.from_numpy(raw.target)
    test = torch.arange(len(y)) % 3 == 0
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    order = order[(y[order, None] == torch.tensor(list(classes))).any(1)]
    rest, held = order[~test[order]], order[test[order]]
    n = round(tune * len(rest))
    return [(x[i].contiguous(), y[i] - classes.start) for i in (rest[n:], rest[:n], held)]


class Tail(nn.Module):
    """The last blocks of a timm ViT, over what its first blocks give for the images: (n, tokens, width) -> (n, 10).

    The first blocks are frozen and not adapted, so their output is computed once for all runs.
    """

    def __init__(self, vit: nn.Module, first: int) -> None:
        super().__init__()
        self.blocks, self.norm, self.fc_norm = vit.blocks[first:], vit.norm, vit.fc_norm
        self.head = nn.Linear(vit.num_features, 10)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc_norm(self.norm(self.blocks(x)).mean(1)))


def vit(pixels: int) -> nn.Module:
    name = f"local-dir:{ROOT / 'recipes/weights/vit_cifar60'}"
    return timm.create_model(name, pretrained=True, num_classes=10, img_size=pixels)


@functools.lru_cache(maxsize=1)
def cifar60(pixels: int = 16) -> Bed:
    """All digits, from the ViT of recipes/weights (width 192, depth 7), which has seen none."""
    return Bed(functools.partial(vit, pixels), *digits(pixels))


@functools.lru_cache(maxsize=1)
def cifar60_tail(first: int = 3, pixels: int = 16) -> Bed:
    """The same, with the blocks from `first` on alone to be adapted."""
    with torch.no_grad():
        model = vit(pixels).eval()
        embed = lambda x: model.blocks[:first](model._pos_embed(model.patch_embed(x)))  # noqa: E731
        sets = [(torch.cat([embed(part) for part in x.split(64)]), y) for x, y in digits(pixels)]
    return Bed(lambda: Tail(vit(pixels), first), *sets)


@functools.lru_cache(maxsize=1)
def tiny(width: int) -> Bed:
    """The digits 5 to 9, from a ViT of depth 2 and this width that has learnt 0 to 4."""
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": width, "depth": 2, "num_heads": max(1, width // 48)}
    blank = functools.partial(
        timm.create_model, "vit_tiny_patch16_224", num_classes=5, class_token=False, global_pool="avg", **sizes
    )
    torch.manual_seed(0)
    source = blank()
    (x1, y1), (x2, y2), _ = digits(8, range(5))
    optimizer = torch.optim.AdamW(source.parameters(), lr=5e-3 * (48 / width) ** 0.75, weight_decay=0.05)
    for _ in fit(source, optimizer, torch.cat([x1, x2]), torch.cat([y1, y2]), epochs=10, seed=0):
        pass
    weights = {k: v for k, v in source.state_dict().items() if not k.startswith("head.")}

    def make() -> nn.Module:
        model = blank()
        model.load_state_dict(weights, strict=False)
        nn.init.zeros_(model.head.weight)
        return model

    return Bed(make, *digits(8, range(5, 10)))


class ClassTail(nn.Module):
    """The last blocks of a timm ViT with a class token, as `Tail`."""

    def __init__(self, vit: nn.Module, first: int) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = vit.blocks[first:], vit.norm, nn.Linear(vit.num_features, 10)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x))[:, 0])


@functools.lru_cache(maxsize=1)
def signs_tail(first: int = 8, pixels: int = 56) -> Bed:
    """Photographs of hands that show a digit, from the ViT-S/14 of ../shared/models: every third is a test image."""
    from PIL import Image

    name = f"local-dir:{ROOT.parent / 'shared/models/vit_small_patch14_dinov2'}"
    make = lambda: timm.create_model(name, pretrained=True, num_classes=10, img_size=pixels).float().eval()  # noqa: E731
    files = sorted((ROOT.parent / "shared/data/sign_digits").glob("[0-9]/*"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = [Image.open(f).convert("RGB").resize((pixels, pixels), Image.Resampling.BICUBIC) for f in files]
    x = torch.stack([((torch.from_numpy(np.array(i)) / 255 - mean) / std).permute(2, 0, 1) for i in images])
    y, model = torch.tensor([int(f.parent.name) for f in files]), make()
    with torch.no_grad():
        x = torch.cat([model.blocks[:first](model._pos_embed(model.patch_embed(part))) for part in x.split(64)])
    test = torch.arange(len(y)) % 3 == 0
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    rest = order[~test[order]]
    n = round(0.3 * len(rest))
    sets = [(x[i].contiguous(), y[i]) for i in (rest[n:], rest[:n], order[test[order]])]
    return Bed(lambda: ClassTail(make(), first), *sets)


class TextTail(nn.Module):
    """The last layers of a BERT over the states (n, tokens, width) of the first; a last feature of each token says
    whether it is one (1) or fills up (0)."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, there = x[..., :-1], x[..., -1]
        mask = (1 - there)[:, None, None] * torch.finfo(torch.float32).min
        for layer in self.layers:
            states = layer(states, attention_mask=mask)
        return self.head((states * there[..., None]).sum(1) / there.sum(1, keepdim=True))


@functools.lru_cache(maxsize=1)
def sst2_tail(first: int = 3, tokens: int = 24) -> Bed:
    """SST-2 from MiniLM-L6 (the folder MINILM), of which the layers from `first` on are adapted; 1,600 sentences."""
    from transformers import AutoModel, AutoTokenizer

    folder = os.environ["MINILM"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bert = lambda: AutoModel.from_pretrained(folder, attn_implementation="eager").float()  # noqa: E731
    model, sets = bert().eval(), []

    def load(name: str, count: int) -> tuple[Tensor, Tensor]:
        lines = [line.split("\t", 1) for line in (ROOT / f"../shared/data/sst2/{name}.tsv").read_text().splitlines()]
        chosen = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))[:count]]
        coded = tokenizer([text for _, text in chosen], padding="max_length", truncation=True, max_length=tokens,
                          return_tensors="pt")  # fmt: skip
        parts = []
        with torch.no_grad():
            for ids, mask in zip(coded["input_ids"].split(64), coded["attention_mask"].split(64), strict=True):
                states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[first]
                parts.append(torch.cat([states, mask[..., None].to(states)], dim=-1))
        return torch.cat(parts), torch.tensor([int(label) for label, _ in chosen])

    x, y = load("train", 1600)
    sets = [(x[400:], y[400:]), (x[:400], y[:400]), load("test", 800)]
    return Bed(lambda: TextTail(list(bert().encoder.layer[first:]), 384), *sets)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    epochs: int,
    seed: int,
    warmup: float = 0.1,
) -> Iterator[float]:
    """Train as the recipes do: linear warm-up, cosine, gradients clipped to norm 1. Yields each step's loss."""
    order, step, warmup = np.random.default_rng(seed), 0, 0.1
    per_epoch = math.ceil(len(y) / BATCH)
    total = epochs * per_epoch
    base = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    for _ in range(epochs):
        for part in np.array_split(order.permutation(len(y)), per_epoch):
            step += 1
            rise = step / (warmup * total)
            share = rise if rise < 1 else 0.5 * (1 + math.cos(math.pi * (step / total - warmup) / (1 - warmup)))
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * share
            loss = cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            yield loss.item()


@torch.no_grad()
def score(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Mean loss and accuracy (%), and which examples were right (as text of 0 and 1)."""
    model.eval()
    logits = torch.cat([model(x) for x in data[0].split(128)])
    right = logits.argmax(1) == data[1]
    return {
        "loss": round(cross_entropy(logits, data[1]).item(), 5),
        "accuracy": round(100 * right.double().mean().item(), 3),
        "right": "".join(map(str, right.int().tolist())),
    }


class Results:
    """Runs by their settings, in one JSON file that grows; what is there is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def find(self, **settings: Any) -> dict[str, Any] | None:
        return next((run for run in self.runs if all(run.get(k) == v for k, v in settings.items())), None)

    def get(self, run: Callable[..., dict[str, Any]], **settings: Any) -> dict[str, Any]:
        if (found := self.find(**settings)) is None:
            found = settings | run(**settings)
            self.runs.append(found)
            new = self.path.with_suffix(".new")
            new.write_text("[\n" + ",\n".join(json.dumps(r) for r in self.runs) + "\n]\n")
            os.replace(new, self.path)
            print({k: v for k, v in found.items() if k != "right"}, flush=True)
        return found
