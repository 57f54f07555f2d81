"""What trains in a model of two towers: for each of them nothing, an adapter, or all."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

import uora_vision as uora
from uora_vision.predict.dual import Dual

from ..command.choices import Method, Tower
from ..command.options import LR, PEFT_LR, Defaults, MethodOptions
from ..errors import MethodError
from ..training.methods import AdaptedModel, apply_method

PROJECTIONS = (
    "visual.proj", "visual.head.proj.", "text_projection", "text.text_projection", "text.proj.", "visual_projection.",
    "text_model.head.",
)  # fmt: skip
DEFAULTS = {  # the second rate is for a tower that trains in full beside an adapter, and for the logit scale
    Method.uora: Defaults(256, LR, 1e-5),
    Method.vera: Defaults(256, LR, 1e-5),
    Method.vera_peft: Defaults(256, PEFT_LR, 1e-5),
    Method.lora: Defaults(8, 1e-3, 1e-5),
    Method.linear: Defaults(None, 1e-3, 1e-3),
    Method.full: Defaults(None, 1e-5, 1e-5),
    Method.bitfit: Defaults(None, 1e-3, 1e-3),
}
ADAPTERS = (Method.uora, Method.vera, Method.lora)


@dataclass(frozen=True)
class Towers:
    """What trains where.

    Args:
        image, text: of each tower; None for what the method does.
        last: only that many last blocks of each tower; None for all.
        scale: whether the logit scale (and SigLIP's bias) trains.
    """

    image: Tower | None = None
    text: Tower | None = None
    last: int | None = None
    scale: bool = False

    @property
    def whole(self) -> bool:
        """Whether more trains than what a method adds."""
        return self.scale or Tower.full in (self.image, self.text)


@dataclass(frozen=True)
class TowerPlan:
    """What of a model trains where, by name.

    Args:
        targets: the projections to adapt, in the words of `uora.inject`; None for the methods that adapt none.
        whole: the parameters of the towers that train as they are.
        scale: the logit scale and SigLIP's bias, where they train.
    """

    targets: str | None
    whole: list[str]
    scale: list[str]


class DualAdapted(AdaptedModel):
    """Trains by way of `Dual`, and names parameters as the model in it does."""

    def trained_tensors(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().contiguous() for name, p in self.base.named_parameters() if p.requires_grad}


def plan_towers(dual: Dual, options: MethodOptions, towers: Towers) -> TowerPlan:
    """What a method would train; the model stays as it is.

    Raises:
        MethodError: the method and what is asked of the towers do not go together, or nothing would train.
        uora.UoraError: nothing matches `targets`.
    """
    model, method = dual.model, options.method
    modes = {"image": _mode(method, towers.image, "image"), "text": _mode(method, towers.text, "text")}
    blocks = _last_blocks(dual, towers.last)
    names = [name for name, _ in model.named_parameters() if _in_scope(name, blocks)]
    targets = None
    if method in ADAPTERS:
        targets = _targets(dual, options, modes, blocks)
        whole = [name for name in names if modes.get(dual.tower(name) or "") is Tower.full]
    else:
        whole = [name for name in names if modes.get(dual.tower(name) or "", Tower.frozen) is not Tower.frozen]
    if method is Method.linear:
        whole = [name for name in whole if name.startswith(PROJECTIONS)]
    elif method is Method.bitfit:
        whole = [name for name in whole if name.endswith("bias")]
    if targets is None and not whole:
        raise MethodError(f"--method {method} would train nothing in the towers: {_why(method)}")
    scale = ["logit_scale", *(["logit_bias"] if dual.sigmoid else [])] if towers.scale else []
    return TowerPlan(targets, whole, scale)


def adapt_towers(dual: Dual, options: MethodOptions, plan: TowerPlan) -> DualAdapted:
    """Freeze and adapt a model, in place, by a method that UORA is compared with: for UORA itself, recipes show how.

    Raises:
        MethodError: see `apply_method`.
        uora.UoraError: an option of the adapter is wrong.
    """
    dual.model.requires_grad_(False)
    if plan.targets is None:
        return with_whole_parts(dual, options, plan, [])
    groups = apply_method(dual.model, replace(options, targets=plan.targets)).groups
    if options.method is Method.lora:
        _keep_base_exact(dual.model)
    return with_whole_parts(dual, options, plan, groups)


def with_whole_parts(dual: Dual, options: MethodOptions, plan: TowerPlan, groups: list[dict[str, Any]]) -> DualAdapted:
    """A model ready to train, in which those parts of the base train that the plan says.

    Args:
        groups: parameter groups of what the method adds.
    """
    parameters = dict(dual.model.named_parameters())
    rate = options.head_lr if plan.targets is not None else options.lr
    whole = [parameters[name] for name in plan.whole]
    groups = [
        *groups,
        _group("tower", [p for p in whole if p.dim() > 1], rate, options.weight_decay),
        _group("tower_vectors", [p for p in whole if p.dim() <= 1], rate),
        _group("scale", [parameters[name] for name in plan.scale], options.head_lr),
    ]
    groups = [group for group in groups if group["params"]]
    for group in groups:
        for p in group["params"]:
            p.requires_grad_(True)
    return DualAdapted(dual, dual.model, groups, options)


def trains(dual: Dual, side: str) -> bool:
    """Whether anything in a tower, `image` or `text`, trains."""
    return any(p.requires_grad and dual.tower(name) == side for name, p in dual.model.named_parameters())


def _mode(method: Method, asked: Tower | None, side: str) -> Tower:
    """What happens to a tower; `uora` stands for whatever the method adds."""
    if method is Method.vera_peft:
        raise MethodError("--method vera-peft wraps a whole model and knows no towers; use --method vera")
    if asked is Tower.uora and method is not Method.uora:
        raise MethodError(f"--{side}-tower uora goes with --method uora, not {method}; leave it out")
    if asked is Tower.full and method not in (*ADAPTERS, Method.full):
        raise MethodError(f"--{side}-tower full does not go with --method {method}, which trains less; leave it out")
    return asked or (Tower.full if method is Method.full else Tower.uora)


def _why(method: Method) -> str:
    if method is Method.linear:
        return "they have no projection into the common space, or are frozen. Use bitfit or uora"
    return "both are frozen"


def _targets(dual: Dual, options: MethodOptions, modes: dict[str, Tower], blocks: set[str] | None) -> str:
    """`targets`, or the projections one by one where only some of them are to be adapted."""
    found = uora.plan(dual.model, targets=options.targets).projections
    kept = [
        p for p in found if modes.get(dual.tower(p.path) or "") is Tower.uora and _in_scope(f"{p.module_path}.", blocks)
    ]
    if not kept:
        raise MethodError(
            f"no tower is left for --method {options.method}: "
            f"image {modes['image']}, text {modes['text']}. Adapt one of them, or use --method full"
        )
    if len(kept) == len(found):
        return options.targets
    return "+".join(f"{p.path}.{role.name}" for p in kept for role in p.roles)


def _last_blocks(dual: Dual, last: int | None) -> set[str] | None:
    """Paths of the last blocks of each tower; None where all train."""
    if last is None:
        return None
    kept: set[str] = set()
    found = uora.plan(dual.model).projections
    for side in ("image", "text"):
        paths = dict.fromkeys(_block(p.module_path) for p in found if dual.tower(p.path) == side)
        kept |= set([path for path in paths if path is not None][-last:])
    return kept


def _block(path: str) -> str | None:
    """The innermost numbered module: `visual.transformer.resblocks.3` of `visual.transformer.resblocks.3.attn`."""
    match = re.match(r"(.*\.\d+|\d+)\.", path)
    return match[1] if match else None


def _in_scope(name: str, blocks: set[str] | None) -> bool:
    """Whether a parameter may train: with `last`, those of the last blocks and the projections behind them."""
    if blocks is None or name.startswith(PROJECTIONS):
        return True
    return any(name.startswith(f"{path}.") for path in blocks)


def _keep_base_exact(model: nn.Module) -> None:
    """PEFT adds LoRA to the weights of an nn.MultiheadAttention in each forward and subtracts it again, in new
    parameters: rounding moves the base at each step, and a resumed run would start from another. So the parameters
    that were there before come back after each forward."""

    def before(module: Any, args: Any) -> None:
        base = module.get_base_layer()
        module.__dict__["_exact"] = base.in_proj_weight, base.out_proj.get_base_layer().weight

    def after(module: Any, args: Any, output: Any) -> None:
        base = module.get_base_layer()
        base.in_proj_weight, base.out_proj.get_base_layer().weight = module.__dict__.pop("_exact")

    for module in model.modules():
        if type(module).__name__ == "MultiheadAttention" and hasattr(module, "lora_A"):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)


def _group(name: str, params: Iterable[nn.Parameter], lr: float, decay: float = 0.0) -> dict[str, Any]:
    return {"name": name, "params": list(params), "lr": lr, "weight_decay": decay}
