"""How a mixed batch is measured; see the command."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.lifecycle.library import library_of
from uora_vision.maths import forms
from uora_vision.tables import render

from .step import default_device, has, versions

matplotlib.use("agg")
from matplotlib import pyplot as plt


@dataclass
class Row:
    """One way to compute the batch.

    Args:
        label: what it is.
        run: computes the batch once.
        seconds: of every round.
    """

    label: str
    run: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(torch.tensor(self.seconds).median())


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.process_time()
    call()
    return time.process_time() - begin


def register(model: nn.Module, folder: Path, first: int, count: int, base: uora.Base) -> float:
    """Load an adapter under new names until there are `count`, each with vectors of its own; seconds per load."""
    entries, spent = library_of(model).entries, 0.0
    for i in range(first, count):
        begin = time.perf_counter()
        uora.load(model, folder, name=f"{i}", activate=False, base=base)
        spent += time.perf_counter() - begin
        vector = entries[f"{i}"].vector
        assert vector is not None
        vector.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    return spent / max(1, count - first)


def factored(model: nn.Module, images: Tensor) -> Tensor:
    """The forward of the active adapter, without folding."""
    folds, forms.folds_weight = forms.folds_weight, lambda tokens, weight: False
    try:
        return model(images)
    finally:
        forms.folds_weight = folds


def lora(name: str, images: Tensor, rank: int, count: int) -> Callable[[], Tensor]:
    """A batch of PEFT's LoRA adapters, each sample with its own."""
    import peft

    base = timm.create_model(name, num_classes=0).eval()
    targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    config = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(base, config, adapter_name="0")
    for i in range(1, count):
        model.add_adapter(f"{i}", config)
    model = model.to(images.device, images.dtype).eval()
    names = [f"{i % count}" for i in range(len(images))]
    return lambda: model(images, adapter_names=names)


def run(
    model: str,
    batch: int,
    rank: int,
    lora_rank: int,
    counts: list[int],
    device: str,
    dtype: str,
    threads: int | None,
    rounds: int,
    folder: Path,
) -> None:
    """Measure; print the table, and write the numbers and a picture.

    Args:
        counts: numbers of registered adapters, ascending.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    where, kind = torch.device(device or default_device()), torch.bfloat16 if dtype == "bf16" else torch.float32
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    images = torch.randn(batch, *timm.get_pretrained_cfg(model).input_size).to(where, kind)
    net = timm.create_model(model, num_classes=0).to(where, kind).eval()
    plain = timm.create_model(model, num_classes=0).to(where, kind).eval()
    rows = [Row("base", lambda: plain(images))]
    memory: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        saved = uora.save(uora.inject(net, rank=rank), name)
        vectors = sum(a.b.numel() + a.d.numel() for a in uora.adapters(net).values()) * 4
        for adapter in uora.adapters(net).values():
            adapter.b.normal_(std=0.1)
        base, there = uora.Base(net), 0
        rows += [Row("UORA, one for all", lambda: net(images)), Row("factored", lambda: factored(net, images))]
        for count in counts:
            gc.collect()
            before = psutil.Process().memory_info().rss
            each = register(net, saved, there, count, base)
            gc.collect()
            grown = (psutil.Process().memory_info().rss - before) / max(1, count - there)
            memory.append({"registered": count, "bytes_per_adapter": grown, "seconds_per_load": each})
            console.print(f"{count:,} registered: {grown / 1e3:,.0f} kB and {each * 1e3:.1f} ms each")
            there = count
            names = [f"{(i * max(1, count // batch)) % count}" for i in range(batch)]

            def mixed(names: list[str] = names) -> Tensor:
                with uora.route(net, names):
                    return net(images)

            rows.append(Row(f"mixed, {count:,} registered", mixed))
        if has("peft"):
            rows.append(Row("PEFT LoRA, one for all", lora(model, images, lora_rank, 1)))
            rows.append(Row("PEFT LoRA, mixed", lora(model, images, lora_rank, batch)))
        for row in rows:
            row.run()  # warm, and routing finds the samples
        for n in range(rounds):
            for row in rows:
                row.seconds.append(timed(row.run, where))
            console.print(f"round {n + 1} of {rounds}")
    one = next(row for row in rows if row.label == "factored").median
    parts = [model, f"batch {batch}", f"UORA r{rank}", f"LoRA r{lora_rank}", dtype, where.type]
    title = ", ".join([*parts, f"threads: {torch.get_num_threads()}", f"rounds: {rounds}"])
    times = [(r.label, r.median, batch / r.median, r.median / rows[0].median, r.median / one) for r in rows]
    text = [[label, *(f"{value:.2f}" for value in values)] for label, *values in times]
    print(render(title, ["", "seconds", "images/s", "to base", "to factored"], text))
    print(f"vectors of an adapter: {vectors:,} bytes")
    result = {
        "title": title, "vector_bytes": vectors, "memory": memory, "versions": versions(),
        "rows": [{"label": r.label, "seconds": r.seconds, "median": r.median} for r in rows],
    }  # fmt: skip
    (folder / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")
    figure, axes = plt.subplots(figsize=(7, 0.4 * len(rows) + 1))
    axes.barh([r.label for r in rows][::-1], [batch / r.median for r in rows][::-1], color="#3b6ea5")
    axes.set_xlabel("images per second")
    axes.set_title(title, fontsize=8)
    figure.savefig(folder / "benchmark.png", dpi=150, bbox_inches="tight")
    print(f"\nwritten: {folder / 'benchmark.json'}, {folder / 'benchmark.png'}")
