"""One walk over a model: every weight that could be adapted, and what the rules say of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .layers import Role
from .rules import CONV, OTHER, POSITION, ROUTERS, TALKING_HEADS, apply_rules
from .sites import Site, Unit, find_sites, units

UNKNOWN = "no rule knows it"


@dataclass(frozen=True)
class Finding:
    """What the walk says of one weight: its roles, or why it has none.

    Args:
        site: where it is.
        roles: the projections in it, empty if it is never adapted.
        rule: name of the rule that decided, or the reason for leaving it.
        block: number of its block through the model, None outside of blocks.
    """

    site: Site
    roles: tuple[Role, ...]
    rule: str
    block: int | None


def walk(model: nn.Module) -> Iterator[Finding]:
    """Every weight that could be adapted, in the model's order, with what the rules say of it."""
    sites = find_sites(model)
    heads, outputs = head_names(model), output_names(model)
    decided: dict[str, tuple[Unit, str, tuple[Role, ...]]] = {}
    for unit in units(model, sites):
        known = apply_rules(unit)
        for name, site in unit.members.items():
            if _within(site.path, heads):
                decided[site.path] = unit, "part of the head", ()
            elif _within(site.path, outputs):
                decided[site.path] = unit, "output embedding", ()
            else:
                decided[site.path] = unit, *known.get(name, _left(site))
    blocks: dict[str, int] = {}
    for site in sites:
        unit, rule, roles = decided[site.path]
        projects = any(role.group not in (CONV, OTHER) for role in roles)
        path = _block(f"{unit.path}.") if projects else None
        yield Finding(site, roles, rule, None if path is None else blocks.setdefault(path, len(blocks)))


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that turn features into predictions, which are trained with the adapter: what timm calls the
    classifier, or a last module of a customary name. An attention pool (of CLIP's ResNets) is not a head but for its
    last projection."""
    config = getattr(model, "pretrained_cfg", None)
    named = config.get("classifier") if isinstance(config, dict) else None
    names = [named] if isinstance(named, str) else list(named or ())
    names += [name for name in _HEADS if name not in names]
    present = dict(model.named_modules())
    kept: list[str] = []
    for name in names:
        if name not in present or any(_within(name, (other,)) for other in kept):
            continue
        if {"proj"} < {child for child, _ in present[name].named_children()} & {"q", "qkv", "proj"}:
            name = f"{name}.proj"
        kept = [other for other in kept if not _within(other, (name,))] + [name]
    outputs = output_names(model)
    return tuple(name for name in kept if name not in outputs and any(True for _ in present[name].parameters()))


_HEADS = (
    "head", "head_dist", "heads", "heads_dist", "aux_head", "fc", "classifier", "classif", "last_linear", "score",
    "qa_outputs", "cls", "cls_classifier", "distillation_classifier",
)  # fmt: skip


def output_names(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that turn features into logits over a vocabulary. They are as large as the embedding, with
    which they are often tied, so they are neither adapted nor trained."""
    get = getattr(model, "get_output_embeddings", None)
    output = get() if callable(get) else None
    return tuple(
        name for name, module in model.named_modules()
        if name and (module is output or name.rpartition(".")[2] in ("lm_head", "embed_out"))
    )  # fmt: skip


def _left(site: Site) -> tuple[str, tuple[Role, ...]]:
    """Of a weight that no rule knows: adapted on request only, or never."""
    if ROUTERS.search(site.module_path):
        return "routes to experts", ()
    if POSITION.search(site.path):
        return "position bias", ()
    if TALKING_HEADS.search(site.module_path):
        return "mixes heads", ()
    kernel = site.form == "kernel"
    name, rows = re.sub(r"\W", "_", site.module_path.rpartition(".")[2]) or "weight", site.shape[0] // site.groups
    group = CONV if kernel else OTHER
    if site.groups == 1:
        return UNKNOWN, (Role(name, group, 0, rows),)
    return UNKNOWN, tuple(Role(f"{name}_{g}", group, g * rows, rows) for g in range(site.groups))


def _within(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(name + ".") for name in names)


def _block(path: str) -> str | None:
    """The innermost numbered module: `blocks.3.attn.` lies in `blocks.3`."""
    match = re.match(r"(.*\.\d+|\d+)\.", path)
    return match[1] if match else None
