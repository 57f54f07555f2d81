"""Putting an adapter into a model and taking it out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .bank import Bank
from .config import UoraConfig
from .errors import StateError
from .functional import WIDE
from .fusing import allow_fusing, forbid_fusing
from .layers import CHILD, REDUCED, Adapter, adapters_of, attach, detach, is_adapted
from .plan import Plan, plan
from .quantised import is_quantised
from .reduced import Reduced
from .sharded import is_sharded
from .verify import verify
from .walker import head_names

FLAGS = "_uora_flags"
UNSENT = "_uora_unsent"
TORCH_UNSENT = "_ddp_params_and_buffers_to_ignore"
"""Where DistributedDataParallel looks for names of tensors that it shall not send."""


def inject(
    model: nn.Module, config: UoraConfig | None = None, *, example_input: Any = None, **options: Any
) -> nn.Module:
    """Adapt a model in place: freeze it, and give every chosen projection its trained vectors.

    The model computes what it did before, since b starts at 0: to the last bit over a float32 or float64 base; over a
    base stored in bfloat16 or float16 to within rounding of that type.

    Args:
        model: of timm, open_clip, transformers or one's own; see `plan` for what would be adapted.
        config: options; the keyword arguments change single ones. See `UoraConfig`.
        example_input: if given, a trace of it corrects the rules (see `plan`), and `verify` is run on it; the model is
            left as it was when that fails.

    Returns:
        The same model.

    Raises:
        StateError: the model already has an adapter.
        ConfigError, OptionError, TargetError: see `plan`.
        DeadAdapterError: see `verify`.
    """
    if is_injected(model):
        raise StateError("this model already has an adapter; merge() or remove() it first")
    if hasattr(model, CHILD):
        raise StateError(f"{type(model).__name__} has an attribute {CHILD!r} of its own, where the bank would go")
    apply_plan(model, plan(model, config, example_input=example_input, **options))
    if example_input is not None:
        try:
            verify(model, example_input)
        except BaseException:
            remove(model)
            raise
    return model


def apply_plan(model: nn.Module, what: Plan) -> None:
    """Carry out a plan. Everything that can fail is made before the model is touched."""
    config = what.config
    modules = dict(model.named_modules())
    weights = [modules[p.module_path]._parameters[p.tensor] for p in what.projections]
    coarse = [p.path for p, w in zip(what.projections, weights, strict=True) if p.read and w.dtype not in WIDE]
    if coarse:
        warnings.warn(
            f"{len(coarse)} weights ({coarse[0]}, ...) are read by the model itself and stored in a half type: small "
            "updates to them are rounded away. Keep the base in float32 and use torch.autocast.",
            stacklevel=3,
        )
    first = weights[0]
    bank = Bank(
        config,
        (p.shape[1] for p in what.projections),
        (role.rows for p in what.projections for role in p.roles),
        device=first.device,
        dtype=torch.float32 if is_quantised(first) else first.dtype,
    )
    adapters = [
        Adapter(p.path, p.roles, p.shape[1], bank, p.form, config.d_init, config.dropout, first.device)
        for p in what.projections
    ]
    trained = set(base_parameters(model, config.train))
    bank.__dict__[REDUCED] = Reduced()
    bank.__dict__[FLAGS] = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_module(CHILD, bank)
    try:
        for name, p in model.named_parameters():
            if p.is_floating_point() or p.is_complex():
                p.requires_grad_(name in trained)
            elif name in trained:
                warnings.warn(f"{name} is of {p.dtype} and does not train", stacklevel=3)
        for projection, adapter in zip(what.projections, adapters, strict=True):
            module = modules[projection.module_path]
            attach(module, projection.tensor, adapter.train(module.training), projection.read)
        forbid_fusing(model, (p.module_path for p in what.projections))
        _keep_from_sending(model)
    except BaseException:
        remove(model)
        raise


def remove(model: nn.Module) -> nn.Module:
    """Take the adapter out without merging it: the base as it was, its parameters trainable as they were."""
    bank = bank_of(model)
    check_whole(model)
    allow_fusing(model)
    for module in model.modules():
        if is_adapted(module):
            detach(module)
    delattr(model, CHILD)
    _allow_sending(model, bank)
    flags = bank.__dict__[FLAGS]
    for name, p in model.named_parameters():  # parts without adapters may have been replaced since
        if name in flags and (p.is_floating_point() or p.is_complex()):
            p.requires_grad_(flags[name])
    return model


def check_whole(model: nn.Module) -> None:
    """Adapters go into, and out of, models that each process holds as a whole.

    Raises:
        StateError: the model holds DTensors.
    """
    if any(map(is_sharded, model.parameters())):
        raise StateError(
            "the parameters of this model are spread over processes. Call load() before fully_shard(); to "
            "merge or remove, save() the adapter and load() it into a base that is not sharded."
        )


def _keep_from_sending(model: nn.Module) -> None:
    """Tell DistributedDataParallel to leave the matrices alone: by default it sends every buffer of the first process
    to the others before each forward, and every process makes and re-draws its own, equal ones."""
    bank = bank_of(model)
    names = {f"{CHILD}.{name}" for name, _ in bank.named_buffers()}
    for path, module in model.named_modules():
        if isinstance(module, Adapter):
            # Those that a re-draw in the scope `layer` will give it.
            names |= {f"{path}.own_{part}_{k}" for k in range(len(module.roles)) for part in ("index", "a", "b")}
    there = set(getattr(model, TORCH_UNSENT, ()))
    bank.__dict__[UNSENT] = names - there
    setattr(model, TORCH_UNSENT, there | names)


def _allow_sending(model: nn.Module, bank: Bank) -> None:
    left = set(getattr(model, TORCH_UNSENT, ())) - bank.__dict__.get(UNSENT, set())
    if left:
        setattr(model, TORCH_UNSENT, left)
    elif hasattr(model, TORCH_UNSENT):
        delattr(model, TORCH_UNSENT)


def is_injected(model: nn.Module) -> bool:
    return any(is_adapted(m) for m in model.modules())


def bank_of(model: nn.Module) -> Bank:
    """The bank of an injected model.

    Raises:
        StateError: there is none.
    """
    bank = getattr(model, CHILD, None)
    if not isinstance(bank, Bank):
        raise StateError(f"this {type(model).__name__} has no adapter; call inject() or load() on it first")
    return bank


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of an injected model by the path of their weight, in the model's order.

    Raises:
        StateError: there are none.
    """
    bank_of(model)
    return {adapter.name: adapter for m in model.modules() for adapter in adapters_of(m).values()}


def base_parameters(model: nn.Module, parts: Iterable[str]) -> list[str]:
    """Names of the base's parameters that belong to `head`, `norm` or `bias`."""
    heads = head_names(model)
    chosen = []
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            in_head = any(full.startswith(head + ".") for head in heads)
            norm = "norm" in type(module).__name__.lower()
            bias = name == "bias" or name.endswith("_bias")
            if ("head" in parts and in_head) or ("norm" in parts and norm) or ("bias" in parts and bias):
                chosen.append(full)
    return chosen
