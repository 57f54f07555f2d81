"""The ways to fine-tune that a recipe can compare, each as: prepare the model, say what trains at which rate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import uora_vision as uora
from uora_vision.lifecycle.informing import informed_rows
from uora_vision.lifecycle.parameter_groups import layer_shares
from uora_vision.maths.informed import pack
from uora_vision.structure.heads import head_names
from uora_vision.structure.survey import Survey

from ..command.choices import Method
from ..command.options import LR, PEFT_LR, Defaults, MethodOptions
from ..errors import MethodError

DEFAULTS = {
    Method.uora: Defaults(256, LR, 4e-3),
    Method.vera: Defaults(256, LR, 4e-3),
    Method.vera_peft: Defaults(256, PEFT_LR, 4e-3),
    Method.lora: Defaults(8, 2e-3, 4e-3),
    Method.linear: Defaults(None, 4e-3, 4e-3),
    Method.full: Defaults(None, 3e-4, 4e-3),
    Method.bitfit: Defaults(None, 2e-3, 4e-3),
}


@dataclass
class AdaptedModel:
    """A model ready to train.

    Args:
        model: what to call; for PEFT's VeRA a wrapper around `base`.
        base: the model itself.
        groups: parameter groups for an optimizer.
        options: what was asked for.
    """

    model: nn.Module
    base: nn.Module
    groups: list[dict[str, Any]]
    options: MethodOptions

    @property
    def is_uora(self) -> bool:
        """Whether the adapter is the package's own (VeRA is, with other random matrices)."""
        return self.options.method in (Method.uora, Method.vera)

    @property
    def trained(self) -> int:
        """Number of trained parameters, with the head."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def trained_without_head(self) -> int:
        return sum(p.numel() for p in self._kept())

    @property
    def adapter_bytes(self) -> int:
        """Size of what has to be kept for a task besides the head, in bytes."""
        rows = informed_rows(self.base).get("rows") if self.is_uora else None
        return sum(t.nbytes for t in [*self._kept(), *(pack(rows).values() if rows else ())])

    def _kept(self) -> list[nn.Parameter]:
        head = head_ids(self.base)
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in head]

    def trained_tensors(self) -> dict[str, Tensor]:
        """What was trained, by the name it has in the model."""
        return {name: p.detach().cpu().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}


def apply_method(model: nn.Module, options: MethodOptions) -> AdaptedModel:
    """Freeze and adapt a model, in place, by a method that UORA is compared with: for UORA itself, recipes show how.

    The head trains by every method, where there is one.

    Raises:
        MethodError: the method cannot be applied to this model, or needs a package that is missing, or trains nothing.
        uora.UoraError: an option of the adapter is wrong, or nothing matches `targets`.
    """
    if options.rank is not None and options.rank < 1:
        raise MethodError(f"rank must be at least 1, got {options.rank}")
    base = model
    share = layer_shares(Survey(model), options.layer_decay) if options.layer_decay != 1 else lambda _: 1.0
    match options.method:
        case Method.uora:
            raise ValueError("a recipe calls uora.inject itself")
        case Method.vera:
            same = {name: getattr(options, name) for name in ("rank", "targets", "seed", "token_sampling")}
            uora.inject(model, **same, init="kaiming", layout="slice")
        case Method.lora:
            model = _with_lora(model, options)
        case Method.vera_peft:
            model = _with_peft_vera(model, options)
        case Method.linear:
            model.requires_grad_(False)
        case Method.bitfit:
            for name, p in model.named_parameters():
                p.requires_grad_(name.endswith("bias"))
        case Method.full:
            model.requires_grad_(True)
    head = head_ids(base)
    for p in model.parameters():
        if id(p) in head:
            p.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        lacks = "neither biases nor a head" if options.method is Method.bitfit else "no head"
        raise MethodError(
            f"--method {options.method} would train nothing: {type(base).__name__} has {lacks}; "
            "uora, vera, vera-peft, lora and full train it"
        )
    return AdaptedModel(model, base, _groups(model, base, options, share), options)


def head_ids(model: nn.Module) -> set[int]:
    """Ids of the parameters of the classifier, or classifiers. A language model's output embedding is none."""
    return {id(p) for name in head_names(model) for p in model.get_submodule(name).parameters()}


def _groups(
    model: nn.Module, base: nn.Module, options: MethodOptions, share: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Matrices decay and vectors do not, as the field does it; UORA's vectors never, or a decaying d would fire.

    Args:
        share: of the rate, by the path of a parameter in `base`.
    """
    if options.method is Method.vera:
        return uora.param_groups(
            base, lr=options.lr, head_lr=options.head_lr, weight_decay=options.weight_decay,
            layer_decay=options.layer_decay,
        )  # fmt: skip
    head, vectors = head_ids(base), options.method is Method.vera_peft
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for path, p in base.named_parameters():
        if not p.requires_grad:
            continue
        part, decays = ("head" if id(p) in head else "adapter"), p.dim() > 1 and not (vectors and id(p) not in head)
        name = part if decays or (part == "adapter" and vectors) else f"{part}_vectors"
        decay = options.weight_decay if decays else 0.0
        lr = options.head_lr if part == "head" else options.lr * share(path)
        group = {"name": name, "params": [], "lr": lr, "weight_decay": decay}
        groups.setdefault((name, lr), group)["params"].append(p)
    return sorted(groups.values(), key=lambda group: group["name"])


def _with_lora(model: nn.Module, options: MethodOptions) -> nn.Module:
    peft = _peft(options.method)
    paths = _modules(model, options.targets)
    config = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=paths)
    with warnings.catch_warnings():  # of transposed weights, which it handles
        warnings.simplefilter("ignore")
        return peft.inject_adapter_in_model(config, model)


def _with_peft_vera(model: nn.Module, options: MethodOptions) -> nn.Module:
    peft = _peft(options.method)
    paths = _modules(model, options.targets)
    if bare := [path for path in paths if isinstance(model.get_submodule(path), nn.MultiheadAttention)]:
        raise MethodError(f"PEFT's VeRA cannot adapt {bare[0]}, an nn.MultiheadAttention; use --method vera")
    with warnings.catch_warnings():  # of matrices drawn again from the seed, as we want them
        warnings.simplefilter("ignore")
        config = peft.VeraConfig(
            r=options.rank, target_modules=paths, projection_prng_key=options.seed, d_initial=0.1, save_projection=False
        )
        return peft.get_peft_model(model, config)


def _modules(model: nn.Module, targets: str) -> list[str]:
    """Paths of the modules that PEFT must adapt: it takes an nn.MultiheadAttention as a whole."""
    paths = [p.module_path for p in uora.plan(model, targets=targets).projections]
    above = {path: path.rpartition(".")[0] for path in paths}
    whole = {up for up in above.values() if isinstance(model.get_submodule(up), nn.MultiheadAttention)}
    return list(dict.fromkeys(above[path] if above[path] in whole else path for path in paths))


def _peft(method: Method) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MethodError(f"--method {method} needs the package peft: pip install peft") from error
    return peft
