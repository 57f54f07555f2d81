"""What `step.py` and `llm.py` measure: one model under one method, with a batch to train on."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import typer
from torch import Tensor, nn

import uora_vision as uora

from .choices import Dtype, Method

TARGETS = "attention+mlp"
CLASSES = 100


@dataclass(frozen=True)
class Settings:
    """What all methods have in common: here a timm model that classifies images.

    Args:
        model: name of a timm model.
        batch: images per step.
        img_size: side of an image in pixels; None for the model's own.
        threads: of torch on the CPU; None for torch's choice.
    """

    model: str
    batch: int
    device: str
    dtype: Dtype
    img_size: int | None
    threads: int | None
    compile: bool

    @property
    def clock(self) -> str:
        """One thread on a CPU is timed by the processor time it gets: other jobs on the machine disturb that less."""
        if self.device.startswith("cuda"):
            return "CUDA events"
        return "processor time" if self.threads == 1 else "wall time"

    @property
    def weights(self) -> torch.dtype:
        """Type in which the weights are stored."""
        return torch.bfloat16 if self.dtype is Dtype.bf16 else torch.float32

    @property
    def packages(self) -> list[str]:
        """What a process that measures imports."""
        return ["timm", "uora_vision", "peft"]

    def make(self) -> nn.Module:
        """The model with random weights, in float32 on the CPU.

        Raises:
            typer.BadParameter: an image size is given and the model takes none.
        """
        import timm

        size = {} if self.img_size is None else {"img_size": self.img_size}
        try:
            return timm.create_model(self.model, num_classes=CLASSES, **size)
        except TypeError as error:
            raise typer.BadParameter(f"{self.model} cannot be made: {error}") from error

    def head(self, model: nn.Module) -> list[nn.Parameter]:
        """What every method trains besides."""
        return list(model.get_classifier().parameters())  # type: ignore[operator]  every timm model has it

    def data(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """A random batch: inputs, (batch, ...), and labels, one per row of logits."""
        import timm

        channels, height, width = timm.data.resolve_model_data_config(model)["input_size"]
        images = torch.randn(self.batch, channels, self.img_size or height, self.img_size or width)
        return images.to(self.weights), torch.randint(CLASSES, (self.batch,))

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """(..., classes)."""
        logits: Tensor = model(inputs)
        return logits


class Subject:
    """A model under one method, with a batch of random inputs: `forward()` and `step()` are what is timed.

    Args:
        base: the model of the settings, shared with other subjects and not changed; only full fine-tuning copies its
            weights.
    """

    def __init__(self, settings: Settings, method: Method, base: nn.Module) -> None:
        torch.manual_seed(0)
        memo: dict[int, Any] = {}
        if method.kind != "full":
            memo = {id(p): nn.Parameter(p.detach()) for p in base.parameters()}
        self.settings = settings
        self.base = copy.deepcopy(base, memo)
        self.paths = [p.path for p in uora.plan(base, targets=TARGETS).projections]
        head = settings.head(self.base)
        model, groups = self._adapt(method, head)
        self.trained = sum(p.numel() for group in groups for p in group["params"])
        self.head = sum(p.numel() for p in head)
        self.model = torch.compile(model) if settings.compile else model
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4)
        self.reinit = uora.Reinitializer(self.base, optimizer=self.optimizer) if method.kind == "uora" else None
        self.inputs, self.labels = (t.to(settings.device) for t in settings.data(base))

    def _adapt(self, method: Method, head: list[nn.Parameter]) -> tuple[nn.Module, list[dict[str, Any]]]:
        """The model to call, and what it trains."""
        model = self.base
        match method.kind:
            case "uora":
                uora.inject(model, rank=method.rank, targets=TARGETS, train=(), token_sampling=method.sampling)
            case "lora":
                import peft

                config = peft.LoraConfig(r=method.rank, lora_alpha=method.rank, target_modules=self.paths)
                model = peft.get_peft_model(model, config)
            case "vera":
                import peft

                config = peft.VeraConfig(r=method.rank, target_modules=self.paths, projection_prng_key=0)
                model = peft.get_peft_model(model, config)
            case "floor" | "linear":
                model.requires_grad_(False)
        for p in head:
            p.requires_grad_(True)
        if method.kind not in ("linear", "full"):
            for path in self.paths:
                self.base.get_submodule(path).register_forward_pre_hook(_gradient_starts(self.settings.device))
        if method.kind == "uora":
            return model, uora.param_groups(model, lr=1e-4)
        return model, [{"params": [p for p in model.parameters() if p.requires_grad]}]

    @torch.no_grad()
    def forward(self) -> None:
        self.model.eval()
        with self._autocast():
            self.settings.logits(self.model, self.inputs)

    def step(self, samples: int | None = None, watch: contextlib.AbstractContextManager[Any] | None = None) -> None:
        """One step on the first `samples` of the batch, the forward inside `watch`."""
        self.model.train()
        self.optimizer.zero_grad()
        with watch or contextlib.nullcontext(), self._autocast():
            logits = self.settings.logits(self.model, self.inputs[:samples])
            loss = nn.functional.cross_entropy(logits.float().flatten(0, -2), self.labels[:samples].flatten())
        loss.backward()
        self.optimizer.step()
        if self.reinit:
            self.reinit.step()

    def warm_up(self) -> None:
        """What only the first call does. One sample is enough, unless kernels are made for each shape."""
        whole = self.settings.compile or self.settings.device.startswith("cuda")
        self.step(None if whole else 1)

    def seconds(self, call: Callable[[], None]) -> float:
        """How long a call takes, by the clock that `Settings.clock` names."""
        if self.settings.device.startswith("cuda"):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3
        now = time.thread_time if self.settings.clock == "processor time" else time.perf_counter
        before = now()
        call()
        return now() - before

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.dtype is Dtype.autocast
        return torch.autocast(torch.device(self.settings.device).type, torch.bfloat16, enabled=enabled)


def _gradient_starts(device: str) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor] | None]:
    """A hook that lets the gradient begin at a projection's input, where nothing before it is trained."""
    # An added 0 and not requires_grad_ on the input, which torch.compile cannot trace.
    zero = nn.Parameter(torch.zeros((), device=device))

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if torch.is_grad_enabled() and not args[0].requires_grad:
            return (args[0] + zero,)
        return None

    return hook


def make_base(settings: Settings) -> nn.Module:
    """The settings' model on their device and in their type.

    Raises:
        typer.BadParameter: see `Settings.make`.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # Compiled code is kept per function, and all methods share the functions of the model's class.
    torch._dynamo.config.cache_size_limit = 64
    torch.manual_seed(0)
    with torch.device(settings.device):  # where random weights are drawn sooner
        return settings.make().to(settings.weights)
