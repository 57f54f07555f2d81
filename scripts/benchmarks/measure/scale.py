"""How the growth of a step is predicted and measured; see the command."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import uora_vision as uora
from uora_vision.maths.cost import Shape
from uora_vision.structure.targets import Projection
from uora_vision.tables import render

from .choices import PATCH, Dtype, Method
from .routing import register
from .step import machine, ratios, seconds, versions
from .subject import CLASSES, TARGETS, Settings, Subject, make_base


@dataclass(frozen=True)
class VitSettings(Settings):
    """A timm vision transformer of any depth and width, with random weights.

    Args:
        depth: number of blocks.
        width: of the stream.
    """

    depth: int = 4
    width: int = 384

    def make(self) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        heads = 1 if self.width % 64 else self.width // 64
        return VisionTransformer(self.img_size, PATCH, num_classes=CLASSES, embed_dim=self.width, depth=self.depth,
                                 num_heads=heads)  # fmt: skip

    def data(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        return torch.randn(self.batch, 3, self.img_size, self.img_size), torch.randint(CLASSES, (self.batch,))


@dataclass(frozen=True)
class Point:
    """What is varied; `registered` counts the adapters of the model, the active one among them."""

    depth: int
    width: int
    batch: int
    rank: int
    registered: int = 1


@dataclass
class Pair:
    """The floor and UORA at one point: operations of a step, and seconds of every round."""

    floor: Subject
    step: Subject
    floor_operations: int
    extra_operations: int
    floor_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    switch_seconds: list[float] = field(default_factory=list)

    @property
    def predicted(self) -> float:
        """The step's operations to the floor's."""
        return 1 + self.extra_operations / self.floor_operations

    @property
    def measured(self) -> tuple[float, float, float]:
        """Median, smallest and largest ratio."""
        return ratios(self.step_seconds, self.floor_seconds)

    def round(self, reverse: bool) -> None:
        order = [(self.floor, self.floor_seconds), (self.step, self.step_seconds)]
        for subject, times in order[::-1] if reverse else order:
            times.append(subject.seconds(subject.step))


def make_pair(settings: VitSettings, point: Point, rounds: int) -> Pair:
    settings = replace(settings, depth=point.depth, width=point.width, batch=point.batch)
    base = make_base(settings)
    floor, step = Subject(settings, Method("floor"), base), Subject(settings, Method("uora", point.rank), base)
    work = floor_operations(base, point.batch), extra_operations(base, point.batch, point.rank)
    switches = register_and_switch(step, point.registered, rounds) if point.registered > 1 else []
    floor.warm_up()
    step.warm_up()
    return Pair(floor, step, *work, switch_seconds=switches)


def register_and_switch(subject: Subject, count: int, rounds: int) -> list[float]:
    """Add adapters until there are `count`; seconds of a switch, the mean of one away and one back."""
    model, head = subject.base, subject.settings.head(subject.base)
    for p in head:
        p.requires_grad_(False)  # the adapters do not hold it, and a part that trains outside of them forbids a switch
    with tempfile.TemporaryDirectory() as folder:
        register(model, uora.save(model, folder), 1, count, uora.Base(model))
    there = uora.active_adapter(model)

    def both() -> None:
        uora.activate(model, "1")
        uora.activate(model, there)

    both()  # the first time makes the modules
    times = [subject.seconds(both) / 2 for _ in range(rounds)]
    for p in head:
        p.requires_grad_(True)
    return times


def floor_operations(model: nn.Module, batch: int) -> int:
    """Of a step of the frozen floor; the head of this file says what counts."""
    each, patches = model.pos_embed.shape[1], model.patch_embed.num_patches
    projections = sum(2 * Shape(batch * each, *p.shape, rank=0).base for p in projections_of(model))
    attention = 7 * len(model.blocks) * 2 * batch * each * each * model.embed_dim
    embedding = 2 * batch * patches * model.patch_embed.proj.weight.numel()
    return projections + attention + embedding + 3 * 2 * batch * model.head.weight.numel()


def extra_operations(model: nn.Module, batch: int, rank: int) -> int:
    """Of a UORA step, beyond the floor's."""
    tokens = batch * model.pos_embed.shape[1]
    shapes = [Shape(tokens, *p.shape, rank, sum(role.rows for role in p.roles)) for p in projections_of(model)]
    return sum(shape.step for shape in shapes)


def projections_of(model: nn.Module) -> tuple[Projection, ...]:
    return uora.plan(model, targets=TARGETS).projections


def table(title: str, rows: list[tuple[str, int, Pair]]) -> str:
    lines: list[list[object]] = []
    for name, value, pair in rows:
        mid, low, high = pair.measured
        extra = median(s - f for s, f in zip(pair.step_seconds, pair.floor_seconds, strict=True))
        cells = [seconds(v) for v in (median(pair.floor_seconds), median(pair.step_seconds), extra)]
        switch = seconds(median(pair.switch_seconds)) if pair.switch_seconds else ""
        lines.append([name, value, *cells, f"{mid:.3f} ({low:.3f} to {high:.3f})", f"{pair.predicted:.3f}", switch])
    return render(title, ("variable", "value", "floor", "step", "extra", "to floor", "predicted", "switch"), lines)


def draw(path: Path, title: str, names: dict[str, str], rows: list[tuple[str, int, Pair]]) -> None:
    """A panel for each variable: measured ratios with their spread, and the predicted line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3.8), sharey=True, layout="constrained")
    for axis, (name, label) in zip(axes, names.items(), strict=True):
        values, pairs = zip(*((value, pair) for variable, value, pair in rows if variable == name), strict=True)
        mids, lows, highs = torch.tensor([pair.measured for pair in pairs]).T
        axis.plot(values, [pair.predicted for pair in pairs], color="#b5532f", label="predicted")
        axis.errorbar(values, mids, yerr=[mids - lows, highs - mids], fmt="o", color="#0b6e99", ecolor="#20242a",
                      capsize=3, elinewidth=1, markersize=5, label="measured, with spread")  # fmt: skip
        axis.axhline(1, color="#20242a", linewidth=1, linestyle=":", label="frozen floor")
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [f"{v:,}" for v in values])
        axis.minorticks_off()
        axis.margins(x=0.12)
        axis.set_xlabel(label)
        axis.set_title(name, fontsize=11, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("step, ratio to the frozen floor")
    axes[0].legend(fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(
    middle: Point, lists: dict[str, list[int]], img_size: int, device: str, threads: int, rounds: int, folder: Path
) -> None:
    """Measure; print the table, and write the numbers and a picture.

    Args:
        middle: the values of what is not varied.
        lists: the values of what is, by its name in `Point`.
    """
    settings = VitSettings(
        "vision transformer", middle.batch, device, Dtype.fp32, img_size, threads, False, middle.depth, middle.width
    )
    points = [(name, n, replace(middle, **{name: n})) for name in lists for n in lists[name]]
    folder.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(), transient=True) as bar:
        different = list(dict.fromkeys(point for *_, point in points))
        pairs = {point: make_pair(settings, point, rounds) for point in bar.track(different, description="warm-up")}
        for n in bar.track(range(rounds), description="rounds"):
            for pair in pairs.values():
                pair.round(reverse=n % 2 == 1)
    rows = [(name, n, pairs[point]) for name, n, point in points]
    where, tokens = machine(settings), (img_size // PATCH) ** 2 + 1
    title = (f"ViT of depth {middle.depth}, width {middle.width}, batch {middle.batch} x {tokens} tokens, "
             f"UORA r{middle.rank}, fp32, {where['gpu'] or where['cpu']}, threads: {where['threads']}, "
             f"rounds: {rounds}, {settings.clock}")  # fmt: skip
    print(table(title, rows))
    result = {
        "settings": asdict(settings)
        | {"rank": middle.rank, "tokens": tokens, "clock": settings.clock, "rounds": rounds},
        "machine": where,
        "versions": versions(),
        "rows": [
            {"variable": name, "value": n, "predicted": pair.predicted}
            | {f.name: getattr(pair, f.name) for f in fields(pair) if f.name not in ("floor", "step")}
            for name, n, pair in rows
        ],
    }
    (folder / "benchmark.json").write_text(json.dumps(result, indent=2) + "\n")
    labels = {"depth": "blocks", "width": "columns of the stream", "batch": f"images of {tokens} tokens",
              "rank": "directions r", "registered": "adapters in the model"}  # fmt: skip
    draw(folder / "benchmark.png", title, labels, rows)
    print(f"\nwritten: {folder / 'benchmark.json'}, {folder / 'benchmark.png'}")
