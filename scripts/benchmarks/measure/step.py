"""How a training step is measured, and the table, numbers and picture of it; see the command."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.tables import render

from .choices import PEFT, Method
from .subject import Settings, Subject, make_base

COLORS = {"uora": "#0b6e99", "lora": "#d08c3f", "vera": "#b5532f"}


@dataclass(frozen=True)
class Memory:
    """What one step holds, in bytes, and what it trains.

    Args:
        saved: kept by the forward for the backward.
        peak: see the head of this file; None where the system does not tell.
        trained: trained parameters without the head.
        head: trained parameters of the head.
    """

    saved: int
    peak: int | None
    trained: int
    head: int


@dataclass(frozen=True)
class Row:
    """The measurements of one method; times in seconds, one per round."""

    method: Method
    memory: Memory
    forward: list[float]
    step: list[float]


@contextlib.contextmanager
def count_saved(model: nn.Module, held: dict[int, int]) -> Iterator[None]:
    """Collect the storages, address to bytes, that the forward saves for the backward, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def measure_memory(settings: Settings, method: Method) -> Memory:
    """One step of one method, to be called in a process of its own.

    Raises:
        torch.OutOfMemoryError: it does not fit on the GPU.
    """
    subject = Subject(settings, method, make_base(settings))
    # So that the optimizer's state is there in the step that counts.
    subject.warm_up()
    cuda, held = settings.device.startswith("cuda"), dict[int, int]()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    subject.step(watch=count_saved(subject.model, held))
    peak = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    return Memory(sum(held.values()), peak, subject.trained - subject.head, subject.head)


def peak_resident() -> int | None:
    """The largest resident set that this process had, in bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(
    settings: Settings, methods: list[Method], rounds: int, minutes: float, say: Callable[[str], None], bar: Progress
) -> list[Row]:
    """Memory first, a process per method; then the rounds, all in this process.

    A further round starts only while it can be expected to end within `minutes` from now; the first always runs.
    """
    start, memory = time.perf_counter(), dict[Method, Memory]()
    # Children of a server that has imported everything and done nothing else: they start at once, and equally large.
    processes = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    processes.set_forkserver_preload(settings.packages)
    for method in bar.track(methods, description="memory"):
        with ProcessPoolExecutor(max_workers=1, mp_context=processes) as pool:
            try:
                memory[method] = pool.submit(measure_memory, settings, method).result()
            except torch.OutOfMemoryError:
                if method.kind == "floor":
                    raise
                say(f"{method.label} does not fit on {settings.device} and is left out")
    base = make_base(settings)
    subjects = {method: Subject(settings, method, base) for method in memory}
    rows = {method: Row(method, memory[method], [], []) for method in memory}
    for subject in bar.track(subjects.values(), description="warm-up"):
        subject.warm_up()
        if settings.compile or settings.device.startswith("cuda"):
            subject.forward()
    task, began = bar.add_task("rounds", total=rounds * len(rows)), time.perf_counter()
    for r in range(rounds):
        ordered = list(rows)
        shift = r % len(ordered)
        for method in ordered[shift:] + ordered[:shift]:
            subject = subjects[method]
            rows[method].forward.append(subject.seconds(subject.forward))
            rows[method].step.append(subject.seconds(subject.step))
            bar.advance(task)
        now = time.perf_counter()
        if r + 1 < rounds and now - start + (now - began) / (r + 1) > 60 * minutes:
            say(f"{r + 1} of {rounds} rounds fitted into {minutes:g} minutes; --minutes and --rounds change that")
            break
    return list(rows.values())


def ratios(times: list[float], floor: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest ratio to the floor of the same round."""
    each = [t / f for t, f in zip(times, floor, strict=True)]
    return median(each), min(each), max(each)


def table(title: str, rows: list[Row]) -> str:
    """The rows as text: parameters, time and memory together."""
    floor = rows[0]
    lines = []
    for row in rows:
        cells: list[object] = [row.method.label, row.memory.trained]
        for times, base in ((row.forward, floor.forward), (row.step, floor.step)):
            mid, low, high = ratios(times, base)
            cells += [seconds(median(times)), f"{mid:.2f} ({low:.2f} to {high:.2f})"]
        beyond = row.memory.saved - floor.memory.saved
        peak = "" if row.memory.peak is None else f"{row.memory.peak / 1e6:,.0f}"
        lines.append([*cells, f"{row.memory.saved / 1e6:,.1f}", f"{beyond / 1e6:+,.1f}", peak])
    columns = ("method", "trained besides", "forward", "to floor", "step", "to floor", "saved MB",
               "beyond floor", "peak MB")  # fmt: skip
    return render(title, columns, lines)


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def draw(path: Path, title: str, rows: list[Row]) -> None:
    """Bars of the step and of the saved activations, both as ratios to the floor, beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    floor = rows[0]
    steps = [ratios(row.step, floor.step) for row in rows]
    saved = [row.memory.saved / floor.memory.saved for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.6 + 0.38 * len(rows)), sharey=True, layout="constrained")
    spread = [[mid - low for mid, low, _ in steps], [high - mid for mid, _, high in steps]]
    panels = (("training step, time", [s[0] for s in steps], spread), ("saved activations, bytes", saved, None))
    for axis, (name, values, error) in zip(axes, panels, strict=True):
        colors = [COLORS.get(row.method.kind, "#8a9199") for row in rows]
        style = {"ecolor": "#20242a", "capsize": 3, "elinewidth": 1}
        axis.barh([row.method.label for row in rows], values, xerr=error, color=colors, error_kw=style, height=0.66)
        axis.axvline(1, color="#20242a", linewidth=1, linestyle=":")
        ends = [value + (error[1][i] if error else 0) for i, value in enumerate(values)]
        for i, (value, end) in enumerate(zip(values, ends, strict=True)):
            axis.annotate(f"{value:.2f}", (end, i), (5, 0), textcoords="offset points", va="center", fontsize=9,
                          bbox={"color": "white", "pad": 1})  # fmt: skip
        axis.set_xlim(0, 1.12 * max(ends))
        axis.set_title(name, fontsize=11, loc="left")
        axis.set_xlabel("ratio to the frozen floor")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def machine(settings: Settings) -> dict[str, Any]:
    """What the measurements were made on."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    cuda = settings.device.startswith("cuda")
    return {
        "system": platform.platform(),
        "cpu": names[0] if names else platform.processor(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(settings.device) if cuda else None,
    }


def versions() -> dict[str, str]:
    known = {"python": platform.python_version(), "uora_vision": uora.__version__}
    return known | {
        name: importlib.metadata.version(name) for name in ("torch", "timm", "transformers", "peft") if has(name)
    }


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def run(settings: Settings, chosen: list[Method], rounds: int, minutes: float, parts: list[str], output: Path) -> None:
    """Measure; print the table, and write the numbers and a picture.

    Args:
        parts: what the title says of the model and its input.
    """
    console = Console()
    if not has("peft") and any(m.kind in PEFT for m in chosen):
        left = ", ".join(m.label for m in chosen if m.kind in PEFT)
        console.print(f"PEFT is not installed, so these are left out: {left}. To have them: pip install peft")
        chosen = [m for m in chosen if m.kind not in PEFT]
    output.mkdir(parents=True, exist_ok=True)
    with Progress(console=console, transient=True) as bar:
        rows = measure(settings, chosen, rounds, minutes, console.print, bar)
    where = machine(settings)
    parts = [*parts, settings.dtype.value] + (["compiled"] if settings.compile else [])
    parts += [where["gpu"]] if where["gpu"] else [where["cpu"], f"threads: {where['threads']}"]
    title = ", ".join([*parts, f"rounds: {len(rows[0].step)}", settings.clock])
    print(table(title, rows))
    result = {
        "settings": asdict(settings) | {"clock": settings.clock, "rounds": len(rows[0].step)},
        "machine": where,
        "versions": versions(),
        "rows": [{"name": row.method.name, "label": row.method.label} | asdict(row) for row in rows],
    }
    (output / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(output / "benchmark.png", title, rows)
    print(f"\nwritten: {output / 'benchmark.json'}, {output / 'benchmark.png'}")
