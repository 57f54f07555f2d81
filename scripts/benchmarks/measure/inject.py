"""How injection, its memory and reinitialisation are measured; see the command."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import timm
import torch
from torch import nn

import uora_vision as uora
from uora_vision.tables import render

from .choices import LLAMAS, VITS, Dtype, Method
from .step import machine, seconds, versions
from .subject import Settings, Subject, make_base

matplotlib.use("agg")
from matplotlib import pyplot as plt

LIMIT = 5.0
"""Seconds within which the largest is to be injected."""


def make(name: str) -> nn.Module:
    """A model of the tables above, without values."""
    with torch.device("meta"):
        if name not in LLAMAS:
            return timm.create_model(VITS.get(name, name))
        import transformers

        hidden, intermediate, layers, heads, pairs, words = LLAMAS[name]
        config = transformers.LlamaConfig(
            vocab_size=words, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=pairs, tie_word_embeddings=hidden < 1024,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)


def processor(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def injection(name: str, rank: int, rounds: int) -> dict[str, Any]:
    """Parameters, adapted weights and seconds."""
    models = [make(name) for _ in range(rounds)]
    count = sum(p.numel() for p in models[0].parameters())
    times = [processor(lambda m=model: uora.inject(m, rank=rank)) for model in models]
    return {"model": name, "parameters": count, "weights": len(uora.adapters(models[0])), "seconds": times}


def memory(name: str, rank: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of a model and its banks, resident before and at the most; for a process of its own, on Linux."""
    torch.set_num_threads(1)
    uora.inject(timm.create_model("test_vit"), rank=4)  # what is imported or set up at the first use is not counted
    model = make(name).to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.zero_()  # or its pages would not be resident
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # from here on, the largest resident set counts anew
    before = resident("VmRSS")
    uora.inject(model, rank=rank)
    bank = model.get_submodule("uora")
    stored = sum(t.numel() * t.element_size() for t in (*bank.buffers(), *bank._first.values()))  # type: ignore[operator]
    vectors = sum(p.numel() * p.element_size() for a in uora.adapters(model).values() for p in a.parameters())
    return {"model": size, "before": before, "peak": resident("VmHWM"), "after": resident("VmRSS"), "banks": stored,
            "vectors": vectors}  # fmt: skip


def resident(field: str) -> int:
    """A line of this process's status, in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def reinitialisation(settings: Settings, rank: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a training step, and of `Reinitializer.step()` by scope and number of directions that fire."""
    base = make_base(settings)
    subject = Subject(settings, Method("uora", rank), base)
    subject.warm_up()
    times = {"training step": [subject.seconds(subject.step) for _ in range(rounds)]}
    for scope in ("shared", "layer"):
        for firing in (0, 1, 16):
            label = f"{scope}, {firing} firing"
            # A fresh adapter each time: rows that a layer has of its own already are not what a first firing costs.
            model = Subject(settings, Method("uora", rank), base).model
            reinit, each = uora.Reinitializer(model, scope=scope), list(uora.adapters(model).values())  # type: ignore[arg-type]
            times[label] = []
            for n in range(rounds):
                with torch.no_grad():
                    for adapter in each:
                        adapter.d.fill_(0.1)
                    for i in range(firing):
                        each[(n * firing + i) % len(each)].d[0, (n * firing + i) % rank] = 0.0
                times[label].append(processor(reinit.step))
            if reinit.firings != firing * rounds:
                raise RuntimeError(f"{reinit.firings} directions fired where {firing * rounds} should have")
    return times


def draw(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Seconds of injecting against parameters."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, color in (("Llama", "#0b6e99"), ("ViT", "#d08c3f")):
        line = sorted((r["parameters"], median(r["seconds"]), r["model"]) for r in rows if r["model"].startswith(kind))
        if line:
            axes.plot([p for p, _, _ in line], [s for _, s, _ in line], "o-", color=color, label=kind)
        for count, value, name in line:
            axes.annotate(name, (count, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(LIMIT, color="#20242a", linewidth=1, linestyle=":", label=f"{LIMIT:g} s")
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="seconds to inject")
    axes.margins(0.12)
    axes.set_title(title, fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(
    models: list[str],
    rank: int,
    resident_model: str,
    dtype: str,
    vit: str,
    batch: int,
    rounds: int,
    folder: Path,
) -> None:
    """Measure; print the table, and write the numbers and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    injection("ViT-B/16", rank, 1)  # warm
    rows = [injection(name, rank, rounds) for name in models]
    lines = []
    for row in rows:
        mid, what = median(row["seconds"]), f"{row['parameters'] / 1e6:,.0f}M parameters, {row['weights']} weights"
        lines.append([f"inject {row['model']}, {what}", seconds(mid), f"{mid / LIMIT:.1%} of {LIMIT:g} s"])
    held: dict[str, int] = {}
    if resident_model:
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            held = pool.submit(memory, resident_model, rank, kind).result()
        for name in ("model", "banks", "vectors"):
            lines.append([f"{name} of {resident_model}, {dtype}", f"{held[name] / 1e6:,.1f} MB",
                          f"{held[name] / held['model']:.2%} of the model"])  # fmt: skip
        grown = held["peak"] - held["before"]
        lines.append(["most resident while injecting, above before", f"{grown / 1e6:,.1f} MB",
                      f"{1 + grown / held['model']:.4f} models"])  # fmt: skip
    settings = Settings(vit, batch, "cpu", Dtype.fp32, img_size=None, threads=1, compile=False)
    times = reinitialisation(settings, rank, rounds)
    whole = median(times["training step"])
    lines += [[label if label == "training step" else f"reinitialisation, {label}", seconds(median(t)),
               f"{median(t) / whole:.2%} of a step"] for label, t in times.items()]  # fmt: skip
    where = machine(settings)
    title = ", ".join([f"UORA r{rank}", f"{vit} at batch {batch}", where["cpu"], f"threads: {where['threads']}",
                       f"rounds: {rounds}"])  # fmt: skip
    print(render(title, ["", "cost", "share"], lines))
    result = {"title": title, "machine": where, "versions": versions(), "injection": rows, "memory": held,
              "reinitialisation": times}  # fmt: skip
    (folder / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(folder / "benchmark.png", title, rows)
    print(f"\nwritten: {folder / 'benchmark.json'}, {folder / 'benchmark.png'}")
